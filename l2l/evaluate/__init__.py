"""The command `python -m l2l.evaluate`: see `l2l.evaluation.cli`."""
