"""The nouns (tasks, optimizers, meta-gradients) and inner training: what all the rest stands on."""
