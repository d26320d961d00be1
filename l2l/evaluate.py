"""The command `python -m l2l.evaluate`: optimizers beside tuned baselines. See `evaluation/cli.py`.

python -m l2l.evaluate --optimizer=runs/mlp,"adam(1e-2)" --task=mlp --horizons=500,1000
"""

import sys

from l2l.evaluation import cli
from l2l.training import sections

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv, sections.settings_of))
