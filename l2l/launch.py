"""Meta-trains the optimizer that a configuration describes.

    python -m l2l.launch --config=configs/mlp.py [--workdir=runs/a] [--config.meta.num_problems=32]

The same command in the same directory goes on where it left off. launch/README.md says how several
processes share a run, and what every exit code means.
"""

import signal
import sys

from absl import flags

from l2l.cluster import collectives, environment, initialize
from l2l.console import configuration
from l2l.console.commands import command
from l2l.console.errors import UserError, fail


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    about = "The directory of the run; by default checkpoints/<config>."
    flags.DEFINE_string("workdir", None, about, flag_values=values)
    for name, variable in initialize.VARIABLES.items():
        about = f"For a run of several processes; by default ${variable}."
        flags.DEFINE_string(name, None, about, flag_values=values)
    return values


def _known():
    from l2l.training import sections  # It imports JAX.

    return sections.settings_of


@command
def main(argv) -> int:
    typed = configuration.parse(argv, _flags(), _known, __doc__)
    if typed.config is None:
        raise UserError("there is nothing to train: add --config=configs/mlp.py")
    try:
        member = initialize.find({name: typed.values[name].value for name in initialize.VARIABLES})
        environment.prepare(_num_problems(typed.config), member)
        initialize.join(member)  # After `prepare`: it starts JAX.
        from l2l.training.experiment import build_experiment
        from l2l.training.run import train

        # So that a second Ctrl-C ends the process at once, also while something is compiled.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        workdir = typed.values.workdir or f"checkpoints/{typed.name}"
        return collectives.guard(lambda: train(build_experiment(typed.config), workdir))
    except UserError as error:
        if not isinstance(error, collectives.Elsewhere):
            fail(error)
        collectives.leave(2)
        return 2


def _num_problems(config) -> int:
    """Of a configuration that is not checked yet."""
    from l2l.training import sections

    meta = config.get("meta")
    number = meta.get("num_problems") if hasattr(meta, "get") else None
    if isinstance(number, int) and number > 0:
        return number
    return sections.Running().num_problems


if __name__ == "__main__":
    sys.exit(main(sys.argv))
