"""A sweep: every run once, one summary, and whatever ends it, the same command goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from together import config_of

import l2l
from l2l import sweep

# In place of `l2l.launch`: ends with the code that SEED_<n> names, else with results.
RUN = """
import json, os, pathlib, signal, sys, time
given = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:])
seed, folder = given["config.seed"], pathlib.Path(given["workdir"])
folder.mkdir(parents=True, exist_ok=True)
with open("order.txt", "a") as file:
    file.write(f"{folder.name}\\n")
code = os.environ.get(f"SEED_{seed}", "0")
if code == "wait":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    print("waiting", flush=True)
    time.sleep(60)
if code != "0":
    sys.exit(int(code))
row = {"steps": 6, "optimizer": "lstm", "ratio": 2.0 ** int(seed), "points": float(seed),
       "diverged": 1}
adam = dict(row, optimizer="adam, tuned", **{"ratio": 1.0})
(folder / "results.json").write_text(json.dumps({"rows": [row, adam], "summary": [row, adam]}))
(folder / "summary.txt").write_text("done")
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    config_of(tmp_path)
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "COMMAND", (sys.executable, str(tmp_path / "run.py")))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return tmp_path


def start(*arguments):
    return sweep.main(["sweep", "--config=tiny.py", "--workdir=all", *arguments])


def order(place):
    return (place / "order.txt").read_text().split()


def test_seeds_are_run_once_and_summed_up(place, capsys):
    assert start("--seeds=3") == 0
    assert order(place) == ["seed_3", "seed_4", "seed_5"]  # From that of the configuration on.
    assert "sweep.md" in capsys.readouterr().out
    (row,) = json.loads((place / "all/sweep.json").read_text())["results"]
    # Ratios 2³, 2⁴, 2⁵: geometric mean 2⁴. Points 3, 4, 5: deviation 1. Adam's rows are left out.
    assert row["ratio"] == pytest.approx(16) and (row["lowest"], row["highest"]) == (8, 32)
    assert (row["points"], row["±"], row["diverged"], row["seeds"]) == (4, 1, 3, 3)
    assert start("--seeds=4") == 0
    assert order(place) == ["seed_3", "seed_4", "seed_5", "seed_6"]  # The finished ones stay.


def test_a_sweep_is_multiplied_and_named(place):
    sweeps = ("--sweep=optimizer.learning_rate=1e-3,3e-3", "--sweep=evaluation.horizons=(6,),(6,8)")
    assert start(*sweeps, "--seeds=2") == 0
    found = json.loads((place / "all/sweep.json").read_text())
    assert len(found["runs"]) == 8 and [row["seeds"] for row in found["results"]] == [2] * 4
    assert (place / "all/optimizer.learning_rate=1e-3/evaluation.horizons=_6,8_/seed_4").is_dir()


def test_a_member_that_fails_stops_no_other_and_is_tried_again(place, monkeypatch, capsys):
    monkeypatch.setenv("SEED_4", "3")
    assert start("--seeds=3") == 3
    said = capsys.readouterr().out
    assert "seed_4 failed with code 3; the others go on" in said and "1 of 3 runs failed" in said
    assert "ended with code 3" in (place / "all/sweep.md").read_text()
    monkeypatch.setenv("SEED_4", "0")
    assert start("--seeds=3") == 0
    assert order(place) == ["seed_3", "seed_4", "seed_5", "seed_4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_run_and_ends_the_sweep(place, number):
    program = (
        "import sys; from l2l import sweep; sweep.COMMAND = (sys.executable, 'run.py');"
        "sys.exit(sweep.main(sys.argv))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "--config=tiny.py", "--workdir=all", "--seeds=3"],
        env=os.environ | {"SEED_4": "wait", "PYTHONPATH": str(Path(l2l.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() != "waiting\n":
        assert process.poll() is None
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number and "goes on from there" in said
    assert order(place) == ["seed_3", "seed_4"]
    runs = json.loads((place / "all/sweep.json").read_text())["runs"]
    states = [run["state"] for run in runs]
    assert states == ["finished", f"ended with code {128 + number}", "not finished"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_member_starts_is_not_lost(place, monkeypatch, number):
    monkeypatch.setenv("SEED_3", "wait")
    popen = subprocess.Popen

    def interrupted(*arguments, **settings):
        process = popen(*arguments, **settings)
        os.kill(os.getpid(), number)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    assert start("--seeds=2") == 128 + number
    runs = json.loads((place / "all/sweep.json").read_text())["runs"]
    assert runs[0]["state"] == f"ended with code {128 + number}"


def test_one_member_of_an_array_and_the_summary_afterwards(place, monkeypatch, capsys):
    started = []

    def execve(program, arguments, environment):
        started.append(arguments)
        subprocess.run(arguments, env=environment, check=True)
        raise SystemExit  # The real one does not return.

    monkeypatch.setattr(os, "execve", execve)
    arguments = ("--seeds=2", "--config.meta.group=1")
    for index in range(2):
        with pytest.raises(SystemExit):
            start(*arguments, f"--index={index}")
    assert order(place) == ["seed_3", "seed_4"]
    assert "--config.meta.group=1" in started[0]
    assert start(*arguments, "--gather") == 0
    assert capsys.readouterr().out.count("finished") == 2
    assert len(order(place)) == 2


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--sweep=optimizer.learning_rat=1"], "Did you mean --config.optimizer.learning_rate?"),
        (["--sweep=optimizer.hidden_size=a"], "invalid literal"),
        (["--sweep=task.name=quadratic,quadratc"], "Did you mean 'quadratic'"),
        (["--sweep=optimizer.ouput=mixture"], "Did you mean --config.optimizer.output?"),
        (["--sweep=nothing"], "field=value,value"),
        (["--sweep=seed=1,2"], "--seeds"),
        (["--sweep=optimizer.hidden_size=2,2"], "once"),
        (["--seeds=0"], "seeds"),
        (["--seeds", "3", "more"], "more"),
        (["--index=2", "--seeds=2"], "0 to 1"),
        (["--workdir=gs://bucket/all"], "mount the bucket"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_run(place, capsys, arguments, sentence):
    assert start(*arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1 and said.startswith("l2l: ")
    assert {p.name for p in place.iterdir()} <= {"tiny.py", "run.py", "__pycache__"}


@pytest.mark.slow
def test_two_real_members(place, monkeypatch):
    monkeypatch.setattr(sweep, "COMMAND", (sys.executable, "-m", "l2l.launch"))
    monkeypatch.setenv("PYTHONPATH", str(Path(l2l.__file__).parent.parent))
    monkeypatch.setenv("XLA_FLAGS", "")  # The eight devices are the tests' own.
    assert start("--seeds=2") == 0
    (row,) = json.loads((place / "all/sweep.json").read_text())["results"]
    assert row["seeds"] == 2 and row["lowest"] < row["highest"]
    assert start("--seeds=2") == 0  # And again, which runs nothing.
