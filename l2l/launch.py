"""Meta-trains the optimizer that a configuration describes.

    python -m l2l.launch --config=configs/mlp.py [--workdir=runs/a] [--config.meta.num_problems=32]

The same command in the same directory goes on where it left off. launch/README.md says how several
processes share a run, and what every exit code means.
"""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from l2l.cluster import collectives as cluster
from l2l.cluster import environment as host
from l2l.cluster import initialize as joining
from l2l.console import errors
from l2l.console.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run; by default checkpoints/<config>.")
for name, variable in joining.VARIABLES.items():
    flags.DEFINE_string(name, None, f"Of a run of several processes; by default ${variable}.")


def parse(argv) -> list[str]:
    """Reads the flags; what is wrong with them is one sentence and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected arguments: {' '.join(rest[1:])}")
        if _CONFIG.value is None:
            raise flags.Error("there is nothing to train: add --config=configs/mlp.py")
        member = joining.find({name: flags.FLAGS[name].value for name in joining.VARIABLES})
        host.prepare(_CONFIG.value.get("meta", {}).get("num_problems", 1), member)
        joining.join(member)  # After `prepare`: it starts JAX.
        return rest
    except (AttributeError, OSError, TypeError, ValueError, flags.Error) as error:
        sys.exit(_fail(error))


def main(argv) -> int:
    del argv
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        from l2l.training import experiment as build  # After `host.prepare`: they import JAX.
        from l2l.training import loop as train

        workdir = _WORKDIR.value or f"checkpoints/{name}"
        return cluster.guard(lambda: train.run(build.experiment(_CONFIG.value), workdir))
    except UserError as error:
        return _fail(error)


def _fail(error) -> int:
    if not isinstance(error, cluster.Elsewhere):
        errors.fail(error)
    cluster.leave(2)
    return 2


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
