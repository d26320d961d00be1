"""Meta-trains the optimizer that a configuration describes.

    python -m l2l.launch --config=configs/mlp.py [--workdir=runs/a] [--config.meta.num_problems=32]

The same command in the same directory goes on where it left off. Exit codes: 0 done, 2 an error to
mend, 3 meta-gradients were not finite, 130 and 143 interrupted (Ctrl-C, SIGTERM) and saved.
"""

import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Of the run; by default checkpoints/<config>.")


def prepare() -> None:
    """Settings that JAX reads when it starts: one device a core on a CPU, and a place to keep
    compiled programs between runs."""
    given = os.environ.get("XLA_FLAGS", "")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for flag, value in (
        ("--xla_force_host_platform_device_count", cores),
        ("--xla_cpu_multi_thread_eigen", "false"),
    ):
        if flag not in given:
            given += f" {flag}={value}"
    os.environ["XLA_FLAGS"] = given.strip()
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(cache) / "l2l" / "xla"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    prepare()
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    try:
        from l2l import build, train  # After `prepare`: they import JAX.

        return train.run(build.experiment(_CONFIG.value), _WORKDIR.value or f"checkpoints/{name}")
    except (ValueError, OSError) as error:
        print(f"l2l: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    app.run(main)
