"""A sweep: every run once, one summary, and whatever ends it, the same command goes on."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from together import config_of, experiment

import l2l
from l2l import sweep
from l2l.training import adapting, finish, run_directory, sweep_summary
from l2l.training.experiment import build_experiment

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
summary = [row, dict(row, steps="all", ratio=9.0), adam, dict(adam, steps="all")]
(folder / "results.json").write_text(json.dumps({"rows": [row, adam], "summary": summary}))
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
    # Ratios 2³, 2⁴, 2⁵: geometric mean 2⁴. Points 3, 4, 5: deviation 1. Adam's rows are left out,
    # and those over all horizons.
    assert row["ratio"] == pytest.approx(16) and (row["lowest"], row["highest"]) == (8, 32)
    assert (row["points"], row["±"], row["diverged"], row["seeds"]) == (4, 1, 3, 3)
    assert start("--seeds=4") == 0
    assert order(place) == ["seed_3", "seed_4", "seed_5", "seed_6"]  # The finished ones stay.


@pytest.mark.parametrize("way", ["apart", "file"])
def test_a_value_may_stand_apart_from_its_flag_or_in_a_file(place, way):
    (place / "flags.txt").write_text("--workdir=all\n--seeds=2\n")
    given = ["--flagfile=flags.txt"] if way == "file" else ["--workdir", "all", "-seeds", "2"]
    assert sweep.main(["sweep", "--config=tiny.py", *given, "--nogather"]) == 0
    assert order(place) == ["seed_3", "seed_4"]


def test_a_sweep_is_multiplied_and_named(place):
    sweeps = ("--sweep=optimizer.learning_rate=1e-3,3e-3", "--sweep=evaluation.horizons=(6,),(6,8)")
    assert start(*sweeps, "--seeds=2") == 0
    found = json.loads((place / "all/sweep.json").read_text())
    assert len(found["runs"]) == 8 and [row["seeds"] for row in found["results"]] == [2] * 4
    assert (place / "all/optimizer.learning_rate=1e-3/evaluation.horizons=_6,8_/seed_4").is_dir()


def test_a_task_of_a_mixture_is_swept(place):
    text = (place / "tiny.py").read_text()
    (place / "tiny.py").write_text(
        text.replace("task = dict(", "task = (dict(", 1).replace(
            "batch_size=3)", "batch_size=3), dict(name='quadratic', dimension=2))"
        )
    )
    assert start("--sweep=task[0].batch_size=4,5") == 0
    assert order(place) == ["seed_3"] * 2
    folders = [Path(run["directory"]).parent.name for run in stated(place)]
    assert folders == ["task_0_.batch_size=4", "task_0_.batch_size=5"]


def stated(place):
    return json.loads((place / "all/sweep.json").read_text())["runs"]


def test_a_member_that_fails_stops_no_other_and_is_tried_again(place, monkeypatch, capsys):
    monkeypatch.setenv("SEED_4", "3")
    assert start("--seeds=3") == 3
    said = capsys.readouterr().out
    assert "seed_4 failed with code 3; the others go on" in said and "1 of 3 runs failed" in said
    assert "ended with code 3" in (place / "all/sweep.md").read_text()
    monkeypatch.setenv("SEED_4", "0")
    assert start("--seeds=3") == 0
    assert order(place) == ["seed_3", "seed_4", "seed_5", "seed_4"]


# (the signal, what the run gets): a terminal that closes ends it as SIGTERM does.
SIGNALS = [
    (signal.SIGINT, signal.SIGINT),
    (signal.SIGTERM, signal.SIGTERM),
    (signal.SIGHUP, signal.SIGTERM),
]


@pytest.mark.parametrize("number, told", SIGNALS)
def test_a_signal_reaches_the_run_and_ends_the_sweep(place, number, told):
    program = (
        "import signal, sys; from l2l import sweep; sweep.COMMAND = (sys.executable, 'run.py');"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL); sys.exit(sweep.main(sys.argv))"
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
    assert process.returncode == 128 + told and "goes on from there" in said
    assert order(place) == ["seed_3", "seed_4"]
    runs = json.loads((place / "all/sweep.json").read_text())["runs"]
    states = [run["state"] for run in runs]
    assert states == ["finished", f"ended with code {128 + told}", "not finished"]


@pytest.fixture
def hung_up():
    """Sets what SIGHUP does, until the end of the test."""
    before = signal.getsignal(signal.SIGHUP)
    yield lambda handler: signal.signal(signal.SIGHUP, handler)
    signal.signal(signal.SIGHUP, before)


def interrupt(monkeypatch, number):
    """This process gets a signal as soon as it has started another."""
    popen = subprocess.Popen

    def interrupted(*arguments, **settings):
        process = popen(*arguments, **settings)
        os.kill(os.getpid(), number)
        return process

    monkeypatch.setattr(subprocess, "Popen", interrupted)


@pytest.mark.parametrize("number, told", SIGNALS)
def test_a_signal_while_a_member_starts_is_not_lost(place, monkeypatch, hung_up, number, told):
    monkeypatch.setenv("SEED_3", "wait")
    hung_up(signal.SIG_DFL)
    interrupt(monkeypatch, number)
    assert start("--seeds=2") == 128 + told
    runs = json.loads((place / "all/sweep.json").read_text())["runs"]
    assert runs[0]["state"] == f"ended with code {128 + told}"


def test_a_sweep_under_nohup_outlives_its_terminal(place, monkeypatch, hung_up):
    hung_up(signal.SIG_IGN)
    interrupt(monkeypatch, signal.SIGHUP)
    assert start("--seeds=1") == 0
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("more", [(), ("--gather",), ("--index=1",)])
def test_a_run_of_another_configuration_is_refused_before_anything_is_run(
    place, capsys, done, more
):
    folder = place / "all" / "seed_4"
    folder.mkdir(parents=True)
    mine = experiment(120).config | {"seed": 4}
    run_directory.claim(folder, mine | {"task": mine["task"] | {"dimension": 7}})
    if done:
        (folder / "summary.txt").write_text("done")
    assert start("--seeds=2", *more) == 2
    said = capsys.readouterr().err
    assert "all/seed_4 holds a run of another configuration" in said and len(said.split("\n")) == 2
    assert "(task.dimension is 7 there, 2 here). Choose another --workdir" in said
    assert not (place / "order.txt").exists() and not (place / "all" / "sweep.md").exists()
    if not more and not done:
        (folder / "config.json").unlink()
        run_directory.claim(folder, mine)
        assert start("--seeds=2") == 0 and order(place) == ["seed_3", "seed_4"]


def test_results_that_are_damaged_stop_no_other(place, capsys):
    assert start("--seeds=1") == 0
    (place / "all" / "seed_3" / "results.json").write_text('{"rows": []')
    for more, runs in ((), ["seed_3", "seed_4", "seed_5"]), (("--gather",), []):
        (place / "order.txt").write_text("seed_3\n" if runs else "")
        assert start("--seeds=3", *more) == 2
        assert order(place) == runs
        said = capsys.readouterr().out
        assert re.search(r"finished, results damaged +\| all/seed_3", said)
        assert "all/seed_3/results.json is damaged" in said
        (row,) = json.loads((place / "all/sweep.json").read_text())["results"]
        assert row["seeds"] == 2 and [each["seed"] for each in row["each"]] == [4, 5]


def end(config: dict, directory) -> dict:
    """Ends a run in a directory as `l2l.launch` does, but untrained: its results.json."""
    built = build_experiment(config)
    directory.mkdir(parents=True)
    state = SimpleNamespace(step=jnp.int32(built.running.steps), skipped=0, dropped=0)
    snapshot, key = SimpleNamespace(state=state, seconds=0.0), jax.random.key(built.seed)
    finish.conclude(built, built.optimizer.init(key), directory, key, snapshot)
    return json.loads((directory / "results.json").read_text())


EXACT = {
    "objective": {"on": "validation", "form": "last"},
    "inner": {"length": 2, "stagger": False},
    "horizon": {"name": "log_uniform", "shortest": 2, "longest": 2},
    "estimator": {"name": "truncated", "order": "exact"},
    "meta": {"steps": 1, "num_problems": 2, "group": 1},
    "evaluation": {"horizons": (2,), "num_problems": 2, "every": 0, "against": "random_search"},
}
START = {
    "task": {"name": "sinusoid", "shots": 2, "queries": 2, "hidden": (2,)},
    "theta": {"start": True},
    "optimizer": {"name": "sgd", "learning_rate": 0.01},
    **EXACT,
    "evaluation": {"horizons": (1,), "num_problems": 2, "every": 0},
}
SETTINGS = {
    "task": {"name": "quadratic", "dimension": 2, "batch_size": 1},
    "optimizer": {"name": "learned_adamw"},
    **EXACT,
}


@pytest.mark.parametrize(
    "config, measure, rivals",
    [
        (START, "query loss", ("random", "pretrained")),
        (SETTINGS, "validation loss", ("random search",)),
    ],
)
def test_a_summary_is_of_what_the_runs_have_measured(
    tmp_path, monkeypatch, config, measure, rivals
):
    monkeypatch.setattr(adapting, "_drawn", lambda *a: [])  # Figures take seconds.
    runs = [sweep.Run("", seed, tmp_path / f"seed_{seed}", ()) for seed in range(2)]
    results = [end(config | {"seed": run.seed}, run.directory) for run in runs]

    def losses(name, place):
        """[seeds]: means over problems after a number of steps."""
        if measure == "validation loss":
            return [np.mean(one["each"][name]["validation"]) for one in results]
        (each,) = zip(*(one["adaptation"].values() for one in results), strict=True)
        return [np.mean(task[name]["loss"], axis=0)[place] for task in each]

    written = sweep_summary.write(tmp_path, runs, {})
    rows = json.loads((tmp_path / "sweep.json").read_text())["results"]
    assert [row["steps"] for row in rows] == ([0, 1] if measure == "query loss" else [2])
    for place, row in enumerate(rows):
        learned = losses("learned", place)
        found = [row[measure], row["±"], row["lowest"], row["highest"]]
        np.testing.assert_allclose(
            found, [np.mean(learned), np.std(learned, ddof=1), min(learned), max(learned)]
        )
        for rival in rivals:
            np.testing.assert_allclose(row[rival], np.mean(losses(rival, place)))
    assert measure in written.text and not written.damaged
    assert re.search(rf"\| steps \| seeds \| {measure} .* {rivals[-1]} +\|\n", written.text)


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
        (["--config=text.py"], "seed='7' in config is a str: int is needed"),
        (["--sweep=seed=1,2"], "--seeds"),
        (["--sweep=optimizer.hidden_size=2,2"], "once"),
        (["--seeds=0"], "seeds"),
        (["--seeds", "3", "more"], "more"),
        (["--index=2", "--seeds=2"], "0 to 1"),
        (["--workdir=gs://bucket/all"], "mount the bucket"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_is_run(place, capsys, arguments, sentence):
    config = (place / "tiny.py").read_text()
    (place / "text.py").write_text(config.replace("seed = 3", "seed = '7'"))
    assert start(*arguments) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1 and said.startswith("l2l: ")
    assert {p.name for p in place.iterdir()} <= {"tiny.py", "text.py", "run.py", "__pycache__"}


@pytest.mark.slow
def test_two_real_members(place, monkeypatch):
    monkeypatch.setattr(sweep, "COMMAND", (sys.executable, "-m", "l2l.launch"))
    monkeypatch.setenv("PYTHONPATH", str(Path(l2l.__file__).parent.parent))
    monkeypatch.setenv("XLA_FLAGS", "")  # The eight devices are the tests' own.
    assert start("--seeds=2") == 0
    (row,) = json.loads((place / "all/sweep.json").read_text())["results"]
    assert row["seeds"] == 2 and row["lowest"] < row["highest"]
    assert start("--seeds=2") == 0  # And again, which runs nothing.
