"""Scores optimizers beside tuned baselines: see `l2l.evaluation.cli`."""

from l2l.evaluation import cli

cli.run()
