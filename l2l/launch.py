"""Meta-trains the optimizer that a configuration describes.

    python -m l2l.launch --config=configs/mlp.py [--workdir=runs/a] [--config.meta.num_problems=32]

The same command in the same directory goes on where it left off. launch/README.md says how several
processes share a run, and what every exit code means.
"""

import signal
import sys

from absl import flags

from l2l.cluster import collectives as cluster
from l2l.cluster import environment as host
from l2l.cluster import initialize as joining
from l2l.console import configuration
from l2l.console.commands import command
from l2l.console.errors import UserError, fail


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    about = "Of the run; by default checkpoints/<config>."
    flags.DEFINE_string("workdir", None, about, flag_values=values)
    for name, variable in joining.VARIABLES.items():
        about = f"Of a run of several processes; by default ${variable}."
        flags.DEFINE_string(name, None, about, flag_values=values)
    return values


def _known():
    from l2l.training import experiment  # It imports JAX.

    return experiment.settings_of


@command
def main(argv) -> int:
    typed = configuration.parse(argv, _flags(), _known, __doc__)
    if typed.config is None:
        raise UserError("there is nothing to train: add --config=configs/mlp.py")
    try:
        member = joining.find({name: typed.values[name].value for name in joining.VARIABLES})
        host.prepare(_num_problems(typed.config), member)
        joining.join(member)  # After `prepare`: it starts JAX.
        from l2l.training import experiment as build
        from l2l.training import loop as train

        # So that a second Ctrl-C ends the process at once, also while something is compiled.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        workdir = typed.values.workdir or f"checkpoints/{typed.name}"
        return cluster.guard(lambda: train.run(build.experiment(typed.config), workdir))
    except UserError as error:
        if not isinstance(error, cluster.Elsewhere):
            fail(error)
        cluster.leave(2)
        return 2


def _num_problems(config) -> int:
    """Of a configuration that is not checked yet."""
    from l2l.training import experiment

    meta = config.get("meta")
    number = meta.get("num_problems") if hasattr(meta, "get") else None
    fine = isinstance(number, int) and number > 0
    return number if fine else experiment.Running().num_problems


if __name__ == "__main__":
    sys.exit(main(sys.argv))
