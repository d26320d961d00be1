"""What a run reads to be compared with tuned Adam, and what it says of itself."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.cluster import collectives
from l2l.evaluation import cli, comparison
from l2l.evaluation.cells import Cell
from l2l.evaluation.curves import Problems
from l2l.storage import exports
from l2l.training import finish, loop
from l2l.training.experiment import build_experiment


@pytest.fixture
def read(tiny):
    """(the experiment of seconds with three tasks to judge on, the tasks whose data were read)."""
    experiment, loaded = build_experiment(tiny), []
    (_, family) = experiment.judged[0]

    def judged(name):
        return name, family._replace(data=lambda: loaded.append(name) or (np.zeros(3),))

    return experiment._replace(judged=tuple(map(judged, "abc"))), loaded


def test_data_of_the_comparison_are_read_when_there_is_one(read, tmp_path, monkeypatch):
    experiment, loaded = read
    key = jax.random.key(0)
    compare = finish.comparing(experiment, tmp_path, key, lambda sentence: None)
    assert not loaded
    made = SimpleNamespace(by_train_loss={6: SimpleNamespace(train_loss=[2.0])})
    curves = SimpleNamespace(train_loss=np.asarray([[3.0]]), test_accuracy=np.asarray([[0.5]]))
    monkeypatch.setattr(finish.tuning, "tune", lambda *a, **k: made)
    monkeypatch.setattr(finish.curves, "compile_evaluation", lambda *a: lambda *b: curves)
    numbers, phrase = compare(())
    assert loaded == ["a"] and numbers["comparison/loss_ratio"] == 1.5
    assert phrase == "1.5 × tuned Adam's loss at 6"
    made.by_train_loss[6].train_loss[:] = [-2.0]
    compare = finish.comparing(experiment, tmp_path, key, lambda sentence: None)
    numbers, phrase = compare(())
    assert np.isnan(numbers["comparison/loss_ratio"])
    assert phrase == "loss 3, tuned Adam's -2 at 6"


def test_adam_is_tuned_as_by_the_command(tiny, tmp_path, monkeypatch):
    """Whatever eps_root the optimizer has: the trials are the same, on the way and at the end."""
    tiny["optimizer"]["eps_root"] = 1e-12
    experiment, key = build_experiment(tiny), jax.random.key(0)
    flags = SimpleNamespace(baseline=["adam"], eps_root=0.0)
    (expected,) = cli._grids(flags)
    tried = []

    def tune(grid, *rest, **options):
        tried.append(grid.trials())
        return SimpleNamespace(by_train_loss={6: SimpleNamespace(train_loss=[2.0])})

    def measure(*arguments, grids, **options):
        tried.extend(grid.trials() for grid in grids)
        return []

    monkeypatch.setattr(finish.tuning, "tune", tune)
    monkeypatch.setattr(finish.comparison, "measure", measure)
    monkeypatch.setattr(finish.report, "write", lambda *a, **k: "")
    monkeypatch.setattr(finish, "about", lambda *a: {})
    theta = experiment.optimizer.init(key)
    finish.comparing(experiment, tmp_path, key, lambda sentence: None)(theta)
    snapshot = SimpleNamespace(state=SimpleNamespace(step=experiment.running.steps))
    finish.conclude(experiment, theta, tmp_path, key, snapshot)
    assert tried == [expected.trials()] * 2


def test_tasks_are_judged_with_the_data_of_one_at_a_time(read):
    experiment, loaded = read
    entry = comparison.Entry("sgd", optax.sgd(0.1))
    cells = [Cell(name, family) for name, family in experiment.judged]
    problems = Problems(jax.random.key(0), 1)
    for row in comparison.measure([entry], cells, (2,), problems, grids=()):
        assert row.cell == loaded[-1]
    assert loaded == ["a", "b", "c"]


@pytest.mark.parametrize("estimator, runs", [("first_order", 1), ("pes", 2)])
def test_inner_steps_are_counted_of_every_run(tiny, estimator, runs):
    """12 meta-steps of 8 problems in windows of 4; evolution strategies run each problem twice."""
    experiment = build_experiment(tiny | {"estimator": {"name": estimator}})
    state = SimpleNamespace(step=jnp.int32(12), skipped=0, dropped=3)
    about = finish.about(experiment, SimpleNamespace(state=state, seconds=1.0))
    assert about["training"]["inner_steps"] == runs * 12 * 8 * 4
    assert about["dropped"] == 3


def test_an_export_that_training_begins_with_need_not_say_how_it_was_trained(tiny, tmp_path):
    experiment = build_experiment(tiny)
    theta = experiment.optimizer.init(jax.random.key(0))
    path = exports.export(tmp_path / "mine.safetensors", experiment.specification, theta)
    experiment = build_experiment(tiny | {"start": str(path)})
    state = SimpleNamespace(step=jnp.int32(12), skipped=0, dropped=0)
    about = finish.about(experiment, SimpleNamespace(state=state, seconds=1.0))
    assert about["training_before"] == []


@pytest.mark.parametrize("taken", [6, 12])
def test_a_summary_says_that_a_run_ended_early(tiny, tmp_path, monkeypatch, taken):
    experiment = build_experiment(tiny)
    monkeypatch.setattr(finish, "_scored", lambda *_: "the table")
    state = SimpleNamespace(step=jnp.int32(taken), skipped=0, dropped=0)
    theta, snapshot = experiment.optimizer.init(jax.random.key(0)), SimpleNamespace(state=state)
    snapshot.seconds = 1.0
    finish.conclude(experiment, theta, tmp_path, jax.random.key(0), snapshot)
    said = finish.finished(tmp_path)
    assert said is not None and said.startswith("the table")
    assert ("after 6 of 12 meta-steps. To train on, remove" in said) == (taken == 6)


def test_data_that_stand_twice_are_placed_once():
    mesh = jax.sharding.Mesh(jax.devices(), ("devices",))
    same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    one, other = np.arange(3.0), np.arange(3.0)
    placed = loop.placed(((one, other), (one,), ()), same)
    assert placed[0][0] is placed[1][0] and placed[0][0] is not placed[0][1]
    np.testing.assert_array_equal(placed[0][1], other)
    assert placed[0][0].sharding == same and placed[2] == ()


def test_what_a_process_has_whole_is_not_copied(monkeypatch):
    mesh = jax.sharding.Mesh(jax.devices(), ("devices",))
    same = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    data, parts = jax.device_put(jnp.arange(8.0), same), jax.device_put(jnp.arange(8.0), split)
    placed = []
    monkeypatch.setattr(collectives, "count", lambda: 2)
    monkeypatch.setattr(collectives, "place", lambda x, s: placed.append(x) or jax.device_put(x, s))
    own, gathered = collectives.whole((data, parts), same)
    assert len(placed) == 1 and placed[0] is parts
    assert own.unsafe_buffer_pointer() == data.addressable_data(0).unsafe_buffer_pointer()
    np.testing.assert_array_equal(gathered, np.arange(8.0))
