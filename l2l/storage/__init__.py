"""Files that outlive a process: exports to give away, checkpoints to resume from."""
