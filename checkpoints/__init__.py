"""Released optimizers. In the wheel this directory is the package `l2l.checkpoints`."""
