"""The loop: it resumes bit for bit, on any number of devices, and leaves when it is told to."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace
from typing import Any

import jax
import jax.flatten_util
import numpy as np
import pytest

from l2l.cluster import collectives
from l2l.console.errors import UserError
from l2l.storage import exports, files
from l2l.training import ahead_of_time, callbacks, finish
from l2l.training.callbacks import DONE, NOT_FINITE, TERMINATED
from l2l.training.experiment import build_experiment
from l2l.training.loop import Loop, start
from l2l.training.run import train
from l2l.training.run_directory import lock


@pytest.fixture(scope="module", autouse=True)
def no_comparison():
    """The final comparison with tuned Adam costs more than all else here, and has its own tests."""

    def conclude(experiment, theta, directory, key, snapshot):
        about = finish.about(experiment, snapshot)
        path = exports.export(directory / exports.EXPORT, experiment.specification, theta, about)
        files.write(directory / finish.SUMMARY, b"concluded")
        return str(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "conclude", conclude)
        yield


def theta_of(directory):
    return exports.read(directory / exports.EXPORT)[1]


def rows_of(directory):
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def stop_after(step):
    """A callback: a signal comes in the group of meta-steps that ends at `step`."""

    def interrupt(loop, group):
        if loop.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return interrupt


def crash_after(step):
    """A callback: the process dies, as far as files can tell, in the group that ends at `step`."""

    def crash(loop, group):
        if loop.step == step:
            raise SystemExit("killed")  # No Exception, for which a checkpoint would be saved.

    return crash


@pytest.fixture(scope="module")
def whole(make_tiny, no_comparison, tmp_path_factory):
    """An uninterrupted run of `tiny` on eight devices, which no test adds to."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    assert train(build_experiment(make_tiny()), directory) == DONE
    return directory


@pytest.mark.parametrize(
    "horizon",
    [
        {"name": "log_uniform", "shortest": 2, "longest": 3},
        {"name": "stages", "horizons": (3, 16)},
    ],
    ids=["log_uniform", "stages"],
)
def test_runs_are_not_made_longer_than_asked_for_without_a_word(tiny, tmp_path, horizon):
    sentence = (
        r"inner.length=4 is longer than the runs of 3 steps .* to 3 or less, or .* of 4 steps"
    )
    with pytest.raises(UserError, match=sentence):
        train(build_experiment({**tiny, "horizon": horizon}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


STAGES = {"name": "stages", "horizons": (4, 8, 16), "every": 3, "patience": 1, "num_problems": 2}


@pytest.mark.parametrize("horizon", [None, STAGES], ids=["log_uniform", "stages"])
def test_a_resumed_run_is_an_uninterrupted_one(tiny, whole, tmp_path, horizon):
    experiment, parts = build_experiment(tiny), tmp_path / "parts"
    if horizon:
        experiment, whole = build_experiment(tiny | {"horizon": horizon}), tmp_path / "whole"
        assert train(experiment, whole) == DONE
    assert train(experiment, parts, extra=[stop_after(6)]) == TERMINATED
    with pytest.raises(SystemExit):  # Between saves: meta-step 9 is on the disk, 12 is not.
        train(experiment, parts, extra=[crash_after(12)])
    assert train(experiment, parts) == DONE
    jax.tree.map(np.testing.assert_array_equal, theta_of(whole), theta_of(parts))
    assert rows_of(whole) == rows_of(parts)


def test_the_loop_by_itself_is_the_same_training(tiny, whole):
    """Without directory, logs and checkpoints, to the bit."""
    loop = start(build_experiment(tiny))
    while loop.step < loop.experiment.running.steps:
        assert loop.advance().metrics["finite"].shape == (3, 8)
    jax.tree.map(np.testing.assert_array_equal, loop.result(), theta_of(whole))


@pytest.mark.parametrize("ends", ["by a signal", "killed", "by a callback"])
def test_a_comparison_is_made_where_a_run_was_stopped_when_it_was_due(
    tiny, tmp_path, monkeypatch, ends
):
    """Once, with the theta of its meta-step, and before the row of the next."""
    tiny["evaluation"]["every"] = 6
    compared = []

    def compare(theta):
        if ends == "killed" and not compared:
            compared.append(None)
            raise SystemExit("killed")  # The checkpoint of this meta-step is on the disk.
        compared.append(jax.flatten_util.ravel_pytree(theta)[0])
        return {"comparison/loss": float(np.linalg.norm(compared[-1]))}, "compared"

    monkeypatch.setattr(finish, "comparing", lambda *_: compare)
    experiment = build_experiment(tiny)
    if ends == "killed":
        with pytest.raises(SystemExit):
            train(experiment, tmp_path / "parts")
    else:
        end = stop_after(6) if "signal" in ends else lambda loop, _: 7 if loop.step == 6 else None
        assert train(experiment, tmp_path / "parts", extra=[end]) in (TERMINATED, 7)
    assert train(experiment, tmp_path / "parts", extra=[stop_after(9)]) == TERMINATED
    rows = rows_of(tmp_path / "parts")
    assert [row["step"] for row in rows] == [3, 6, 6, 9]
    assert train(experiment, tmp_path / "uninterrupted") == DONE
    assert rows == rows_of(tmp_path / "uninterrupted")[:4]


def saved(directory):
    return sorted(int(path.name) for path in (directory / "checkpoints").iterdir())


@pytest.mark.parametrize("code", [3, np.int64(200)])
def test_a_callback_ends_a_run_which_goes_on_from_there(tiny, whole, tmp_path, capsys, code):
    """Also with codes that are the run's own, and between checkpoints."""
    tiny["checkpoint"]["every"] = 12
    met = []

    def end(loop, group):
        met.append((loop.step, group.metrics["meta_loss"].shape))
        return code if loop.step == 6 else None

    assert train(build_experiment(tiny), tmp_path, extra=[end]) == code
    assert met == [(3, (3, 8)), (6, (3, 8))]
    said = capsys.readouterr().err
    assert f"A callback ended the run with code {code}: saved meta-step 6 of 12." in said
    assert saved(tmp_path) == [6] and [row["step"] for row in rows_of(tmp_path)] == [3, 6]
    assert train(build_experiment(tiny), tmp_path) == DONE
    jax.tree.map(np.testing.assert_array_equal, theta_of(whole), theta_of(tmp_path))
    assert rows_of(whole) == rows_of(tmp_path)


def test_a_callback_that_returns_0_concludes_the_run_early(tiny, whole, tmp_path, capsys):
    """The export says how far it got; the run trains on where its summary is removed."""
    end = [lambda loop, group: DONE if loop.step == 6 else None]
    assert train(build_experiment(tiny), tmp_path, extra=end) == DONE
    assert "ended meta-training at meta-step 6 of 12" in capsys.readouterr().err
    about, all_of_it = (exports.read(x / exports.EXPORT)[2] for x in (tmp_path, whole))
    assert about["meta_steps"] == 6 and all_of_it["meta_steps"] == 12
    steps = [x["training"]["inner_steps"] for x in (about, all_of_it)]
    assert steps[0] == 6 * 8 * 4 and steps[1] == 2 * steps[0]
    assert saved(tmp_path) == [3, 6] and [row["step"] for row in rows_of(tmp_path)] == [3, 6]
    (tmp_path / finish.SUMMARY).unlink()
    assert train(build_experiment(tiny), tmp_path) == DONE
    jax.tree.map(np.testing.assert_array_equal, theta_of(whole), theta_of(tmp_path))
    assert rows_of(whole) == rows_of(tmp_path)


@pytest.mark.parametrize("returned", [False, 0.5, "stop", 256, -1])
def test_what_is_no_exit_code_is_refused(returned):
    called: Any = callbacks.Called([lambda loop, group: returned], callbacks.Save(None, None, 0))
    with pytest.raises(UserError, match=r"callback \S+ returned .*no exit code: let it"):
        called(None, None)


def test_a_signal_comes_before_a_callback_that_concludes(tiny, tmp_path):
    end = [stop_after(6), lambda loop, group: DONE if loop.step == 6 else None]
    assert train(build_experiment(tiny), tmp_path, extra=end) == TERMINATED
    assert saved(tmp_path) == [3, 6] and not (tmp_path / finish.SUMMARY).exists()


def test_a_callback_that_raises_costs_no_training(tiny, whole, tmp_path):
    """Before the first checkpoint is due."""
    tiny["checkpoint"]["every"] = 12

    def fails(loop, group):
        if loop.step == 6:
            raise OSError("the tracker is down")

    with pytest.raises(OSError, match="the tracker is down"):
        train(build_experiment(tiny), tmp_path, extra=[fails])
    assert saved(tmp_path) == [6] and [row["step"] for row in rows_of(tmp_path)] == [3, 6]
    assert train(build_experiment(tiny), tmp_path) == DONE
    assert rows_of(whole) == rows_of(tmp_path)


@pytest.mark.parametrize("first", [True, False])
def test_a_task_that_fails_leaves_what_was_trained_before(tiny, tmp_path, monkeypatch, first):
    """In the first group of meta-steps nothing was; in a later one there is a checkpoint of the
    group before it, whatever had been assigned in the middle of it."""
    tiny["checkpoint"]["every"] = 12
    wait = collectives.wait

    def fails(metrics):
        wait(metrics)
        if first or len(rows_of(tmp_path / "run")) == 2:
            raise RuntimeError("of the task")

    monkeypatch.setattr(collectives, "wait", fails)
    with pytest.raises(RuntimeError, match="of the task"):
        train(build_experiment(tiny), tmp_path / "run")
    monkeypatch.undo()
    if first:
        assert not (tmp_path / "run").exists()
    else:
        assert saved(tmp_path / "run") == [6]


@pytest.mark.parametrize(
    "saved, resumed", [(8, 1), (1, 8), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_a_run_goes_on_with_other_devices(tiny, whole, tmp_path, saved, resumed):
    """And ends as one that had eight throughout. The pairs with two processes, which are equal to
    the bit, are in `test_cluster.py`."""
    experiment, devices = build_experiment(tiny), jax.devices()
    assert len(devices) == 8
    other, stop = tmp_path / "other", [stop_after(6)]
    assert train(experiment, other, devices[:saved], stop) == TERMINATED
    assert train(experiment, other, devices[:resumed]) == DONE
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6),
        theta_of(whole),
        theta_of(tmp_path / "other"),
    )
    for one, other in zip(rows_of(whole), rows_of(tmp_path / "other"), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_the_meta_step_is_compiled_once_and_told_of_before_it_runs(tiny, tmp_path, capsys):
    """Over stages, saves and a resumption in the same directory: once a run."""
    experiment, traced = build_experiment(tiny | {"horizon": STAGES}), []
    family = experiment.meta.estimator

    def estimate(*arguments):
        traced.append(len(traced))
        return family.estimate(*arguments)

    meta = experiment.meta._replace(estimator=family._replace(estimate=estimate))
    train(experiment._replace(meta=meta), tmp_path)
    assert len(traced) == 1
    compiled, first = capsys.readouterr().err.splitlines()[1:3]
    assert re.search(r"Compiled in .* s. Estimated memory: \S+ [kM]B per device", compiled)
    assert "meta-step 3/12" in first and first.endswith("left")


def test_a_run_that_goes_on_knows_the_time_left_before_its_first_step():
    # 30 s for 10 of 40 steps: 90 s for the other 30.
    assert ahead_of_time.remaining(30.0, 10, 40) == " 0:01:30 left at the pace so far."
    assert ahead_of_time.remaining(0.0, 0, 40) == ""


@pytest.mark.parametrize("group, every", [(5, 3), (3, 5), (4, 4), (6, 1)])
def test_what_is_due_at_a_step_is_done_after_the_group_that_takes_it(group, every):
    for step in range(group, 61, group):
        running = SimpleNamespace(group=group)
        loop = SimpleNamespace(step=step, experiment=SimpleNamespace(running=running))
        taken = range(step - group + 1, step + 1)
        assert Loop.passed(loop, every) == any(one % every == 0 for one in taken)
        assert not Loop.passed(loop, 0)


def test_a_finished_run_says_so(tiny, whole, capsys):
    assert train(build_experiment(tiny), whole) == DONE
    assert "concluded" in capsys.readouterr().out


def test_a_run_that_was_moved_is_told_of_where_it_is(tmp_path):
    for name in ("table.md", finish.SUMMARY):
        (tmp_path / name).write_text("")
    said = "| a / b |\n\nold/run/table.md\n/old/run/gone.png\ntable.md\n"
    (tmp_path / finish.SUMMARY).write_text(said)
    assert finish.finished(tmp_path) == said.replace("old/run/table.md", f"{tmp_path}/table.md")


EMPTY = """
import jax
import jax.numpy as jnp
from l2l import TaskFamily

def family():
    def init(key, problem):
        return {"w": jax.random.normal(key, (3,)), "none": jnp.zeros((0, 4))}

    def loss(params, problem, batch):
        return jnp.sum(params["w"] ** 2) + jnp.sum(problem)

    return TaskFamily(lambda key: jnp.zeros(0), init, lambda *_: (), loss)
"""


def test_arrays_without_numbers_are_spread_and_gathered(tmp_path):
    """A layer of width 0, or a problem that is the same for all."""
    (tmp_path / "empty.py").write_text(EMPTY)
    config = dict(
        task=dict(name=f"{tmp_path / 'empty.py'}:family"),
        optimizer=dict(name="learned_adam"),
        estimator=dict(name="truncated"),
        meta=dict(steps=2, num_problems=8, group=2),
        horizon=dict(name="log_uniform", shortest=10, longest=20),
    )
    loop = start(build_experiment(config))
    assert np.isfinite(loop.advance().metrics["meta_loss"]).all()
    again = start(build_experiment(config), snapshot=jax.device_get(loop.snapshot()))
    assert np.isfinite(again.advance().metrics["meta_loss"]).all()


def test_a_run_may_begin_with_the_theta_of_another(tiny, whole, tmp_path):
    tiny["start"] = str(whole)
    # A rate of 0 leaves theta where it began.
    tiny["meta"]["optimizer"]["learning_rate"] = 0.0
    assert train(build_experiment(tiny), tmp_path / "on") == DONE
    jax.tree.map(np.testing.assert_array_equal, theta_of(tmp_path / "on"), theta_of(whole))
    before, now = (exports.read(path / exports.EXPORT)[2] for path in (whole, tmp_path / "on"))
    assert now["training_before"] == [before["training"]]
    tiny["optimizer"]["hidden_size"] = 3
    with pytest.raises(ValueError, match=r"another optimizer \(optimizer.hidden_size is 2 there"):
        train(build_experiment(tiny), tmp_path / "other")


def test_of_a_start_of_another_kind_the_name_alone_is_told(tiny):
    """Two kinds have dozens of settings that differ, and what matters would drown among them."""
    tiny["start"] = "dm"
    with pytest.raises(ValueError, match=r"\(optimizer.name is dm there, lstm here\)"):
        finish.earlier(build_experiment(tiny))


TASK = """
from l2l.tasks import quadratic

def task():
    family = quadratic(dimension=2, batch_size=3)
    return family._replace(loss=lambda *of: {factor} * family.loss(*of))
"""


def test_a_task_that_is_edited_between_two_calls_is_told_of(tiny, tmp_path, capsys):
    file = tmp_path / "mine.py"
    tiny["task"] = {"name": f"{file}:task"}
    file.write_text(TASK.format(factor=1))
    assert train(build_experiment(tiny), tmp_path / "run", extra=[stop_after(6)]) == TERMINATED
    file.write_text("# The same.\n" + TASK.format(factor=1))
    assert train(build_experiment(tiny), tmp_path / "run", extra=[stop_after(9)]) == TERMINATED
    assert "Not as before" not in capsys.readouterr().err
    file.write_text(TASK.format(factor=2))
    assert train(build_experiment(tiny), tmp_path / "run") == DONE
    assert "Not as before meta-step 9: task " in capsys.readouterr().err


@pytest.mark.parametrize("becomes", ["gone", "another"])
def test_a_start_is_read_when_the_run_begins_and_never_again(tiny, whole, tmp_path, becomes):
    """What is in its place later changes neither the blend nor what the export says of it, in a run
    that is resumed too."""
    start = tmp_path / "start.safetensors"
    shutil.copy(whole / exports.EXPORT, start)
    tiny["start"], tiny["meta"]["blend"] = str(start), 0.5
    # A rate of 0: both ends of the blend are the start.
    tiny["meta"]["optimizer"]["learning_rate"] = 0.0
    experiment = build_experiment(tiny)

    def changes(loop, group):
        start.unlink(missing_ok=True)
        if becomes == "another":
            theta = jax.tree.map(lambda x: x + 1, theta_of(whole))
            exports.export(start, experiment.specification, theta, {"training": "other"})

    assert train(experiment, tmp_path / "on", extra=[changes, stop_after(6)]) == TERMINATED
    assert train(experiment, tmp_path / "on", extra=[changes]) == DONE
    jax.tree.map(np.testing.assert_array_equal, theta_of(tmp_path / "on"), theta_of(whole))
    before, now = (exports.read(path / exports.EXPORT)[2] for path in (whole, tmp_path / "on"))
    assert now["training_before"] == [before["training"]] and now["config"]["start"] == str(start)


def test_a_loop_by_itself_reads_its_start_once(tiny, whole, tmp_path):
    start_path = tmp_path / "start.safetensors"
    shutil.copy(whole / exports.EXPORT, start_path)
    tiny["start"], tiny["meta"]["blend"] = str(start_path), 0.5
    loop = start(build_experiment(tiny))
    start_path.unlink()
    jax.tree.map(np.testing.assert_array_equal, loop.result(), theta_of(whole))


def test_the_end_lies_between_the_first_theta_and_the_trained_one(tiny, whole, tmp_path):
    tiny["meta"]["blend"] = 0.25
    assert train(build_experiment(tiny), tmp_path / "blended") == DONE
    tiny["meta"]["optimizer"]["learning_rate"] = 0.0
    tiny["meta"]["blend"] = 1.0
    assert train(build_experiment(tiny), tmp_path / "first") == DONE
    parts = (whole, tmp_path / "blended", tmp_path / "first")
    trained, blended, first = (
        jax.flatten_util.ravel_pytree(theta_of(directory))[0] for directory in parts
    )
    assert np.linalg.norm(trained - first) > 0.01 * np.linalg.norm(first)
    np.testing.assert_allclose(blended, 0.75 * first + 0.25 * trained, rtol=1e-5, atol=1e-6)
    tiny["meta"]["blend"] = 0.0
    with pytest.raises(ValueError, match=r"meta\.blend=0\.0 is not a share of the way"):
        build_experiment(tiny)


def test_another_configuration_is_refused_with_the_keys(tiny, whole):
    tiny["optimizer"]["hidden_size"] = 3
    with pytest.raises(ValueError, match=r"optimizer.hidden_size is 2 there, 3 here"):
        train(build_experiment(tiny), whole)


def test_two_runs_in_one_directory_are_refused(tiny, tmp_path):
    with lock(tmp_path), pytest.raises(ValueError, match="Another run is at work"):
        train(build_experiment(tiny), tmp_path)


def test_problems_must_fit_the_devices(tiny, tmp_path):
    tiny["meta"]["num_problems"] = 12
    with pytest.raises(ValueError, match="Try num_problems=8 or 16"):
        train(build_experiment(tiny), tmp_path)


def test_a_storm_of_nan_stops_and_keeps_the_last_good_checkpoint(tiny, tmp_path, capsys):
    # The curriculum reaches a stage in which every meta-gradient is infinite.
    experiment = build_experiment(tiny | {"meta": tiny["meta"] | {"max_bad": 5}})
    calm = experiment.curriculum.stage

    def stage(memory, step):
        found, name = calm(memory, step)
        return (found._replace(longest=float("nan")) if step >= 6 else found), name

    family = experiment.meta.estimator

    def estimate(theta, state, data, stage):
        gradients, state, metrics = family.estimate(theta, state, data, stage)
        bad = jax.tree.map(lambda g: g * (stage.longest / stage.longest), gradients)
        return bad, state, metrics

    storm = experiment._replace(
        curriculum=experiment.curriculum._replace(stage=stage),
        meta=experiment.meta._replace(estimator=family._replace(estimate=estimate)),
    )
    assert train(storm, tmp_path) == NOT_FINITE
    said = capsys.readouterr().err
    assert "Meta-step 7 skipped" in said and "6 meta-gradients were not finite" in said
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == ["3", "6"]


def test_a_second_signal_leaves_at_once(tmp_path):
    """In a process of its own: SIGTERM, then SIGTERM while the first is not yet acted upon."""
    program = """
import os, signal, sys, time
from l2l.training.run_directory import Signals
with Signals() as signals:
    os.kill(os.getpid(), signal.SIGTERM)
    print("noted", signals.got, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert done.stdout == b"noted 15\n"
    assert done.returncode == -signal.SIGTERM


def test_signals_are_left_alone_outside_the_main_thread(tiny, tmp_path):
    codes = []

    def run():
        codes.append(train(build_experiment(tiny), tmp_path))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [DONE]


def test_an_unwritable_directory_is_an_error_of_the_system(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError):
        train(build_experiment(tiny), tmp_path / "file" / "run")
