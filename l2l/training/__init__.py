"""Meta-training: from a configuration to the files of a finished run."""
