"""The recipes of launch/ that this machine can run: really, by their own command line.

python -m pytest -m slow tests/test_recipes.py
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from quick import xla_flags
from together import HANG, assert_same_theta, config_of, experiment

import l2l
from l2l.training.callbacks import DONE
from l2l.training.run import train

LAUNCH = Path(__file__).parent.parent / "launch"
STEPS = 1200
# A command that is started in the background ignores Ctrl-C, and a script cannot undo that. So a
# script is started as if it had been typed, wherever the tests themselves run.
AS_TYPED = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""


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
        "XLA_FLAGS": xla_flags(1),
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


@pytest.mark.parametrize(
    "cores, sentence",
    [
        ("100000", "ask for as many or fewer"),
        ("9" * 30, "ask for as many or fewer"),
        ("0", "CORES=0 is not a number of processes"),
        ("08", "CORES=08 is not a number of processes"),
        ("two", "CORES=two is not a number of processes"),
    ],
)
def test_cores_that_cannot_be_had_are_one_sentence(tmp_path, cores, sentence):
    """No process at all used to be a success."""
    process = subprocess.run(
        [LAUNCH / "cpus.sh", "configs/mlp.py", tmp_path],
        env=os.environ | {"CORES": cores},
        text=True,
        capture_output=True,
    )
    assert process.returncode == 2
    assert sentence in process.stderr and len(process.stderr.splitlines()) == 1


def test_cores_without_python_are_said(tmp_path):
    """Activating an environment is easily forgotten."""
    bash = shutil.which("bash") or pytest.skip("there is no bash")
    process = subprocess.run(
        [bash, LAUNCH / "cpus.sh", "configs/mlp.py", tmp_path],
        env={"PATH": str(tmp_path)},
        text=True,
        capture_output=True,
    )
    assert process.returncode == 2 and "activate the environment" in process.stderr


@pytest.fixture
def stand_in(tmp_path):
    """(script, body, **variables) -> the process of the script, a run in the folder "run" in which
    `python -m l2l.launch` is the given body of Python. No pause takes time."""

    def start(script, body, **variables):
        folder = tmp_path / "bin"
        folder.mkdir()
        # What the scripts themselves ask Python for is answered by Python.
        fake = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path
if "-c" in sys.argv:
    os.execv({sys.executable!r}, [{sys.executable!r}, *sys.argv[1:]])
run = Path({str(tmp_path / "run")!r})
with open(run / "starts", "a") as out:
    print(*sys.argv[1:], file=out)
starts = len((run / "starts").read_text().splitlines())
{body}
"""
        for name, text in (("python", fake), ("sleep", "#!/bin/sh\n")):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        (tmp_path / "run").mkdir()
        typed = [LAUNCH / script, "configs/mlp.py", tmp_path / "run", "--config.seed=3"]
        return subprocess.Popen(
            [sys.executable, "-c", AS_TYPED, *typed],
            env=os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"} | variables,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # As a terminal does: Ctrl-C is for all of a group.
        )

    return start


def starts(tmp_path):
    return (tmp_path / "run" / "starts").read_text().splitlines()


@pytest.mark.parametrize("code", [134, 137, 139, 143])
def test_a_crash_that_repeats_ends_the_restarts(stand_in, tmp_path, code):
    process = stand_in("gpus.sh", f"sys.exit({code})")
    said = process.communicate(timeout=HANG)[1]
    assert process.returncode == code and "not tried again" in said
    expected = f"-m l2l.launch --config=configs/mlp.py --workdir={tmp_path}/run --config.seed=3"
    assert starts(tmp_path) == [expected] * 3


def test_a_run_that_gets_on_between_crashes_is_restarted_until_done(stand_in, tmp_path):
    """Every third attempt saves, so that no three in a row are fruitless. Checkpoint 10 is newer
    than 9, whatever the order of their names."""
    body = """
if starts == 33:
    sys.exit(0)
if starts % 3 == 0:
    (run / "checkpoints" / str(starts // 3)).mkdir(parents=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = stand_in("gpus.sh", body)
    said = process.communicate(timeout=HANG)
    assert process.returncode == 0, said
    assert len(starts(tmp_path)) == 33


@pytest.mark.parametrize("code", [0, 1, 2, 3, 130])
def test_what_a_restart_would_not_mend_is_not_restarted(stand_in, tmp_path, code):
    process = stand_in("gpus.sh", f"sys.exit({code})")
    process.communicate(timeout=HANG)
    assert process.returncode == code and len(starts(tmp_path)) == 1


SAVES = """
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: got.append(number))
(run / "ready").touch()
while not got:
    time.sleep(0.01)
time.sleep(0.3)
(run / "got").write_text(" ".join(map(str, map(int, got))))
sys.exit(128 + got[0])
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the script", "to its group"])
@pytest.mark.parametrize(
    "number, handed",
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGINT),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
@pytest.mark.parametrize("script", ["gpus.sh", "cpus.sh"])
def test_a_signal_reaches_the_run_once_and_is_waited_for(
    stand_in, tmp_path, script, number, handed, send
):
    """Ctrl-C is for all of the group: a run that hears of it twice leaves without saving."""
    process = stand_in(script, SAVES, CORES="1")
    deadline = time.monotonic() + HANG
    while not (tmp_path / "run" / "ready").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    send(process.pid, number)
    said = process.communicate(timeout=HANG)
    assert process.returncode == 128 + handed, said
    assert (tmp_path / "run" / "got").read_text() == str(int(handed))
    assert len(starts(tmp_path)) == 1


def test_arrays_may_be_empty_in_any_bash():
    """Before version 4.4, `set -u` takes an empty array for a variable that is not set."""
    for path in (*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")):
        text = path.read_text()
        for name in re.findall(r"(\w+)=\(\)", text):
            guarded = f'${{{name}[@]+"${{{name}[@]}}"}}'
            assert f"{name}[@]" not in text.replace(guarded, ""), (path, name)


def test_the_log_of_a_slurm_job_is_where_its_header_says():
    """%a is the seed in an array only; elsewhere it is 4294967294."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    log = re.search(r"^#SBATCH --output=(\S+)$", text, re.MULTILINE)
    assert log and f"# Logs: {log[1].replace('%j', '<job>')} " in text
