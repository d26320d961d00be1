"""Open MPI starts the processes, and they find each other: really, on this machine.

python -m pytest -m slow tests/test_mpirun.py    # Skipped where there is no mpirun.
"""

import os
import shutil
import signal
from pathlib import Path

import jax
import pytest
from together import Command, assert_same_theta, experiment

from l2l.training.callbacks import DONE
from l2l.training.run import train

STEPS = 1200
# As launch/README.md has it; the last is for machines with fewer cores than processes.
MPIRUN = ("mpirun", "-n", "2", "--bind-to", "none", "--oversubscribe")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun: install Open MPI")
def test_two_processes_of_mpirun_are_stopped_go_on_and_end_with_the_theta_of_one(tmp_path):
    """Stopped by SIGTERM to one of them, as mpirun's own would be followed by SIGKILL."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(experiment(STEPS), whole, jax.devices()[:2]) == DONE
    launcher = MPIRUN if os.geteuid() else (*MPIRUN, "--allow-run-as-root")
    settings = dict(devices=1, steps=STEPS, launcher=launcher)
    with Command(tmp_path, parts, **settings) as run:
        run.until(run.saved)
        os.kill(children(run.processes[0])[1], signal.SIGTERM)
        (code,) = run.codes()
        newest = run.saved()[-1]
        assert 0 < newest < STEPS
        assert run.said().count(f"SIGTERM: saved meta-step {newest}.") == 1, run.said()
        assert code == 143, run.said()
    with Command(tmp_path, parts, **settings) as run:
        assert run.codes() == [0], run.said()
        assert run.began() == newest
        assert "problems on 2 cpu devices" in run.said()
    assert_same_theta(whole, parts)


def children(process) -> list[int]:
    """The processes that one has started."""
    tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(number) for task in tasks for number in task.read_text().split())
