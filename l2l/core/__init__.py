"""The nouns (tasks, optimizers, meta-gradients) and inner training: the basis of all the rest."""
