"""What tests of the command share: a configuration of seconds, and starting it as one or several
real processes of this machine."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
from quick import xla_flags

import l2l
from l2l.storage import exports
from l2l.training.experiment import build_experiment

CONFIG = """
from ml_collections import ConfigDict

def get_config():
    config = ConfigDict()
    config.seed = 3
    config.task = dict(name="quadratic", dimension=2, batch_size=3)
    config.optimizer = dict(name="lstm", hidden_size=2, learning_rate=0.01)
    config.objective = dict(on="train", form="log")
    config.inner = dict(length=4)
    config.horizon = dict(
        name="stages", horizons=(4, 8), every=30, patience=1, num_problems=2)
    config.meta = dict(steps=120, num_problems=8, group=3)
    config.evaluation = dict(horizons=(2,), num_problems=1, every=0)
    config.checkpoint = dict(every=30, keep=2)
    return config
"""
# No test waits for a process longer than that; none should come near.
HANG = 240


def config_of(folder) -> Path:
    """Writes the configuration to tiny.py in a folder."""
    path = Path(folder) / "tiny.py"
    path.write_text(CONFIG)
    return path


class Command:
    """`python -m l2l.launch` in `count` processes of `devices` devices each; or in one of
    `launcher`, a command that starts the processes itself."""

    def __init__(self, folder, workdir, *, count=1, devices=2, steps, every=30, launcher=()):
        self.workdir = Path(workdir)
        port = free_port()
        environment = os.environ | {
            "PYTHONPATH": str(Path(l2l.__file__).parent.parent),
            "XLA_FLAGS": xla_flags(devices),
            "JAX_PLATFORMS": "cpu",
            "MPLCONFIGDIR": str(folder),
        }
        member = ["--coordinator_address", f"127.0.0.1:{port}", "--num_processes", str(count)]
        self.logs = [Path(folder) / f"{self.workdir.name}.{i}.log" for i in range(count)]
        self.processes = []
        for i, log in enumerate(self.logs):
            mine = [*member, "--process_id", str(i)] if count > 1 else []
            program = [
                *launcher,
                sys.executable,
                "-m",
                "l2l.launch",
                f"--config={config_of(folder)}",
            ]
            program += [f"--workdir={workdir}", f"--config.meta.steps={steps}"]
            program += [f"--config.checkpoint.every={every}"]
            with open(log, "wb") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*program, *mine],
                        env=environment,
                        stdout=file,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self) -> str:
        return "\n".join(log.read_text(errors="replace") for log in self.logs)

    def until(self, ready) -> None:
        """Waits for `ready()`, while all processes are alive."""
        deadline = time.monotonic() + HANG
        while not ready():
            assert all(p.poll() is None for p in self.processes), self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def saved(self) -> list[int]:
        """The meta-steps of finished checkpoints, in order."""
        folder = self.workdir / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return sorted(int(name) for name in names if name.isdigit())

    def codes(self, within: float = HANG) -> list[int]:
        """Waits for the end: the exit codes."""
        return [process.wait(within) for process in self.processes]

    def began(self) -> int:
        """The meta-step that it went on from, as it says."""
        found = re.search(r"Going on from meta-step (\d+)", self.said())
        return int(found[1]) if found else 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def experiment(steps: int):
    """What the command trains, for this process."""
    names: dict = {}
    exec(CONFIG, names)
    config = names["get_config"]()
    config.meta["steps"] = steps
    return build_experiment(config)


def assert_same_theta(directory, other) -> None:
    one, two = (exports.read(Path(d) / exports.EXPORT)[1] for d in (directory, other))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
