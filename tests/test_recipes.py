"""The recipes of launch/ that this machine can run: really, by their own command line.

python -m pytest -m slow tests/test_recipes.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from together import HANG, assert_same_theta, config_of, experiment

import l2l
from l2l.training.callbacks import DONE
from l2l.training.run import train

LAUNCH = Path(__file__).parent.parent / "launch"
STEPS = 1200


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes are pinned on Linux")
def test_a_process_a_core_is_stopped_goes_on_and_ends_with_the_theta_of_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    count = min(2, len(os.sched_getaffinity(0)))
    assert train(experiment(STEPS), whole, jax.devices()[:count]) == DONE
    log = tmp_path / "log"
    environment = os.environ | {
        "PYTHONPATH": str(Path(l2l.__file__).parent.parent),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CORES": str(count),
        "XLA_FLAGS": "",
    }
    command = [LAUNCH / "cpus.sh", config_of(tmp_path), parts, f"--config.meta.steps={STEPS}"]

    def saved():
        folder = parts / "checkpoints"
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
        return any(name.isdigit() for name in names)

    with open(log, "wb") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        deadline = time.monotonic() + HANG
        while not saved():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(HANG) == 143, log.read_text()
        assert "SIGTERM: saved meta-step" in log.read_text()
        code = subprocess.call(command, env=environment, stdout=out, stderr=out, timeout=HANG)
    assert code == 0, log.read_text()
    assert f"problems on {count} cpu devices" in log.read_text()
    assert_same_theta(whole, parts)


def test_more_cores_than_there_are_is_said(tmp_path):
    environment = os.environ | {"CORES": "100000"}
    process = subprocess.run(
        [LAUNCH / "cpus.sh", "configs/mlp.py", tmp_path], env=environment, capture_output=True
    )
    assert process.returncode == 2
    assert "ask for as many or fewer" in process.stderr.decode()
