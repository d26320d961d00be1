"""Scores optimizers beside tuned baselines: see `l2l.evaluation.cli`."""

import sys

from l2l.evaluation import cli
from l2l.training import experiment

sys.exit(cli.main(sys.argv, experiment.settings_of))
