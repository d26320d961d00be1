"""Several processes, one run: real ones on this machine, over gloo."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from together import HANG, Command, assert_same_theta, experiment, free_port

import l2l
from l2l.cluster import collectives, initialize
from l2l.training.callbacks import DONE
from l2l.training.run import train

# Its own word, or JAX's abort where it waited in a barrier.
LOST = (collectives.LOST, -signal.SIGABRT)
SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
GIVEN = {"coordinator_address": "n1:1234", "num_processes": 2, "process_id": 1}


@pytest.mark.parametrize(
    "flags, environment, expected",
    [
        ({}, {}, None),  # A laptop.
        (GIVEN, {}, GIVEN),
        ({}, {initialize.VARIABLES[k]: str(v) for k, v in GIVEN.items()}, GIVEN),
        (GIVEN, {"JAX_PROCESS_ID": "0"}, GIVEN),
        ({"num_processes": 1}, {}, None),
        # Slurm: one task a node takes all devices; JAX finds the address.
        (
            {},
            SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"},
            {"num_processes": 2, "process_id": 1, "local_device_ids": []},
        ),
        (
            {},
            SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"},
            {"num_processes": 2, "process_id": 1},
        ),
        # An interactive shell and a batch script: the job has 4 tasks, this step one, or no step.
        ({}, SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, None),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),
        (
            {},
            MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://h:1"},
            {"num_processes": 4, "process_id": 3},
        ),
    ],
)
def test_what_there_is_to_join(flags, environment, expected):
    assert initialize.find(flags, environment) == expected


@pytest.mark.parametrize(
    "flags, environment, sentence",
    [
        ({"num_processes": 2}, {}, "coordinator_address and process_id are missing: add --coord"),
        ({"process_id": 1}, {}, "num_processes"),
        ({}, {"JAX_COORDINATOR_ADDRESS": "n1:1"}, "num_processes and process_id are missing"),
        (GIVEN | {"process_id": 2}, {}, "from 0 to 1"),
        (GIVEN | {"coordinator_address": "n1"}, {}, "host:port"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "no whole number|not a whole number"),
        ({}, MPI, "coordinator_address is missing"),  # Open MPI 5 does not tell it.
    ],
)
def test_what_contradicts_itself_is_one_sentence(flags, environment, sentence):
    with pytest.raises(ValueError, match=sentence):
        initialize.find(flags, environment)


@pytest.mark.parametrize("number", [0, 1])
def test_others_that_do_not_come_are_one_sentence(number):
    """A coordinator that cannot be reached, and a coordinator that nobody reaches."""
    program = f"""
from l2l.cluster import initialize as joining
joining.JOIN_SECONDS = 2
address = "127.0.0.1:{free_port()}"
joining.join({{"coordinator_address": address, "num_processes": 2, "process_id": {number}}})
"""
    environment = os.environ | {"PYTHONPATH": str(Path(l2l.__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, timeout=HANG
    )
    assert done.returncode == collectives.LOST
    said = done.stderr.decode()
    assert said.startswith(f"l2l: Process {number} of 2 could not join") and said.count("\n") == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone") / "whole"
    assert train(experiment(steps=120), folder, jax.devices()[:4]) == DONE
    return folder


def test_two_processes_of_two_devices_are_one_of_four_bit_for_bit(tmp_path, whole):
    """Preempted once: the signal of one process is that of all. The curriculum validates, and rolls
    theta back."""
    parts, settings = tmp_path / "parts", dict(steps=120)
    with Command(tmp_path, parts, count=2, **settings) as run:
        run.until(run.saved)
        run.processes[1].send_signal(signal.SIGTERM)
        assert run.codes() == [143, 143], run.said()
        newest = run.saved()[-1]
        assert 0 < newest < 120
        assert run.said().count(f"SIGTERM: saved meta-step {newest}.") == 1
    with Command(tmp_path, parts, count=2, **settings) as run:
        assert run.codes() == [0, 0], run.said()
        assert run.began() == newest
        assert run.said().count("adam, tuned") == 1  # One of them speaks.
    assert_same_theta(whole, parts)
    assert rows_of(whole) == rows_of(parts)


@pytest.mark.slow
def test_kills_and_stops_change_no_bit(tmp_path, whole):
    """Begun and stopped with two processes, ended by one; begun and killed with one, killed and
    ended with two."""
    parts, back, settings = tmp_path / "parts", tmp_path / "back", dict(steps=120)
    # A second signal has its effect at once, though the other process stands still and the first
    # cannot be acted upon. That other, left alone, does not wait for ever.
    with Command(tmp_path, parts, count=2, **settings) as run:
        run.until(run.saved)
        run.processes[1].send_signal(signal.SIGSTOP)
        run.processes[0].send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert run.processes[0].poll() is None
        run.processes[0].send_signal(signal.SIGTERM)
        assert run.processes[0].wait(HANG) == -signal.SIGTERM
        run.processes[1].send_signal(signal.SIGCONT)
        run.codes()
        assert run.processes[1].returncode in LOST, run.said()
    assert train(experiment(steps=120), parts, jax.devices()[:4]) == DONE
    assert_same_theta(whole, parts)

    with Command(tmp_path, back, devices=4, **settings) as run:
        run.until(run.saved)
        run.processes[0].kill()
        run.codes()
        newest = run.saved()[-1]
    with Command(tmp_path, back, count=2, **settings) as run:
        run.until(lambda: run.saved()[-1] > newest)
        run.processes[1].kill()
        assert run.codes()[0] in LOST, run.said()
        assert re.search("[Aa]nother (process|task)", run.said())
        assert run.began() == newest
        newest = run.saved()[-1]
    with Command(tmp_path, back, count=2, **settings) as run:
        assert run.codes() == [0, 0], run.said()
        assert run.began() == newest
    assert_same_theta(whole, back)
    assert rows_of(whole) == rows_of(parts) == rows_of(back)


@pytest.mark.slow
def test_a_notice_that_only_jax_hears_stops_all(tmp_path):
    """The loop runs in a thread, where Python installs no handler: JAX's preemption service hears
    the signal, and tells the other process."""
    program = f"""
import sys, threading
from l2l.cluster import initialize as joining
number = int(sys.argv[1])
address = "127.0.0.1:{free_port()}"
joining.join({{"coordinator_address": address, "num_processes": 2, "process_id": number}})
from l2l.training.callbacks import DONE
from l2l.training.run import train
from together import experiment
run = lambda: print("code", train(experiment(60000), {str(tmp_path / "run")!r}))
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
    places = [Path(l2l.__file__).parent.parent, Path(__file__).parent]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places))}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

    def start(i):
        command = [sys.executable, "-c", program, str(i)]
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)

    processes = [start(0), start(1)]
    try:
        deadline = time.monotonic() + HANG
        while not (tmp_path / "run" / "checkpoints" / "30").exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        assert ["code 143" in process.communicate(timeout=HANG)[0] for process in processes] == [
            True,
            True,
        ]
    finally:
        for process in processes:
            process.kill()


def rows_of(directory):
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows]
