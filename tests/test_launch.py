"""The command: it starts, is interrupted and goes on; what a user gets wrong is one sentence."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import pytest
from together import config_of

import l2l
from l2l import launch
from l2l.cluster import environment as host
from l2l.storage import exports, loading


@pytest.fixture
def command(tmp_path):
    config_of(tmp_path)
    environment = os.environ | {
        "PYTHONPATH": str(Path(l2l.__file__).parent.parent),
        "XLA_FLAGS": "",
        "MPLCONFIGDIR": str(tmp_path),
    }

    def start(*arguments):
        return subprocess.Popen(
            [sys.executable, "-m", "l2l.launch", *arguments],
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def test_a_run_is_stopped_goes_on_and_ends(command, tmp_path):
    """SIGTERM saves and exits 143; the same command goes on, ends with 0 and prints its paths."""
    arguments = ("--config=tiny.py", "--config.meta.steps=60000", "--config.checkpoint.every=3")
    process = command(*arguments)
    folder = tmp_path / "checkpoints" / "tiny"  # The default workdir.
    deadline = time.time() + 120
    while not (folder / "checkpoints" / "6").exists() and time.time() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    step = int(re.search(r"SIGTERM: saved meta-step (\d+)", said)[1])
    process = command(*arguments)
    line = process.stderr.readline()
    assert f"Going on from meta-step {step}" in line
    process.kill()
    process.communicate()  # Closes its pipes too.


def test_a_whole_run_prints_its_table_and_paths(command, tmp_path):
    process = command("--config=tiny.py", "--config.meta.steps=6", f"--workdir={tmp_path}/run")
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert "adam, tuned" in out
    for name in ("curves-2.png", "metrics.jsonl", exports.EXPORT):
        assert f"{tmp_path}/run/{name}" in out and (tmp_path / "run" / name).exists()
    loading.load(tmp_path / "run")


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--config=tiny.py", "--config.meta.stps=3"], "Did you mean --config.meta.steps?"),
        (["--config=tiny.py", "--config.meta.steps=a"], "invalid literal"),
        (["--config=nothing.py"], "no such file. Did you mean tiny.py?"),
        ([], "add --config"),
        (["--config=tiny.py", "--workdr=x"], "Did you mean --workdir?"),
        (["--config=tiny.py", "more"], "more"),
    ],
)
def test_mistakes_are_one_sentence_and_code_2(monkeypatch, tmp_path, capsys, arguments, sentence):
    """Before the process is set up, so that they can be made in this one."""
    config_of(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(host, "prepare", lambda *_: pytest.fail("this is the process of the tests"))
    assert launch.main(["launch", *arguments]) == 2
    out, said = capsys.readouterr()
    assert not out and sentence in said and len(said.splitlines()) == 1 and said.startswith("l2l: ")


def test_the_code_of_a_mistake_is_that_of_the_process(command):
    process = command("--config=nothing.py")
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and said.startswith("l2l: ")


def test_one_device_a_core_unless_told_otherwise(request, monkeypatch, tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    for name in names:
        request.addfinalizer(partial(jax.config.update, name, getattr(jax.config, name)))
        monkeypatch.setenv(name.upper(), "")  # Restored afterwards, whatever `prepare` does.
        monkeypatch.delenv(name.upper())
    monkeypatch.setattr(host, "prepared", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
    host.prepare(16)
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0] == "--xla_a=1"
    assert "--xla_force_host_platform_device_count=4" in flags  # The most of 6 that divide 16.
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == f"{tmp_path}/l2l/xla"
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    host.prepare(16)
    assert "device_count=3" in os.environ["XLA_FLAGS"]
    assert os.environ["XLA_FLAGS"].count("device_count") == 1
    monkeypatch.setenv("XLA_FLAGS", "")
    host.prepare(12, {"num_processes": 4})  # Of each process are 3, which 6 does not divide.
    assert "--xla_force_host_platform_device_count=3" in os.environ["XLA_FLAGS"].split()
