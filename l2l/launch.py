"""Meta-trains the optimizer that a configuration describes.

    python -m l2l.launch --config=configs/mlp.py [--workdir=runs/a] [--config.meta.num_problems=32]

The same command in the same directory goes on where it left off. Exit codes: 0 done, 2 an error to
mend, 3 meta-gradients were not finite, 130 and 143 interrupted (Ctrl-C, SIGTERM) and saved.
"""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from l2l import files, host

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run; by default checkpoints/<config>.")


def parse(argv) -> list[str]:
    """Reads the flags; what is wrong with them is one sentence and exit code 2."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise flags.Error(f"unexpected arguments: {' '.join(rest[1:])}")
        if _CONFIG.value is None:
            raise flags.Error("there is nothing to train: add --config=configs/mlp.py")
        host.prepare(_CONFIG.value.get("meta", {}).get("num_problems", 1))
        return rest
    except AttributeError as error:  # ml_collections' word for a key that is not there.
        sys.exit(_fail("no such key in this configuration: " + str(error).strip("'\"\\")))
    except (OSError, TypeError, ValueError, flags.Error) as error:
        sys.exit(_fail(error))


def main(argv) -> int:
    del argv
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        from l2l import build, train  # After `host.prepare`: they import JAX.

        return train.run(build.experiment(_CONFIG.value), _WORKDIR.value or f"checkpoints/{name}")
    except (ValueError, OSError) as error:
        return _fail(error)


def _fail(error) -> int:
    print("l2l:", files.sentence(error), file=sys.stderr)
    return 2


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
