"""Comparisons of optimizers whose theta holds a start or a loss, against plain loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.console.errors import UserError
from l2l.core import base
from l2l.evaluation import cache, comparison, curves, entries, tuning
from l2l.evaluation.cells import Cell
from l2l.evaluation.comparison import Entry
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid
from l2l.storage import exports
from l2l.tasks import losses
from l2l.training.experiment import build_experiment

RATE, PENALTY, STEPS = 0.1, 3.0, 4
START = np.array([2.0, -1.0, 0.5], np.float32)
CURVATURE = np.array([1.0, 0.5, 0.2], np.float32)
PROBLEMS = Problems(jax.random.key(0), 2)


def bowl(size=3) -> base.TaskFamily:
    """½ Σ a x² from a random x, which is kept in a tuple."""
    curvature = CURVATURE[:size]
    return base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: (jax.random.normal(key, (size,)),),
        batch=lambda key, problem, data, split: (),
        loss=lambda x, problem, batch: 0.5 * jnp.sum(curvature * x[0] ** 2),
        name=f"bowl-{size}",
    )


def descended(x, penalty):
    """The losses of a bowl in x₀, …, x_T, which goes down ½ Σ a x² + ½ penalty Σ x²."""
    x, found = np.asarray(x), []
    for _ in range(STEPS + 1):
        found.append(0.5 * np.sum(CURVATURE * x**2))
        x = x - RATE * (CURVATURE * x + penalty * x)
    return np.array(found)


def origins() -> list:
    """Where the runs of `PROBLEMS` begin by the task itself."""
    keys = PROBLEMS.keys()
    return [curves.beginning(bowl(), key).params[0] for key in keys]


def learner(start=True, loss=True) -> base.LearnedOptimizer:
    return base.learner(
        base.fixed(optax.sgd(RATE)),
        start=(lambda key: (jnp.asarray(START),)) if start else None,
        loss=losses.l2(coefficient=PENALTY) if loss else None,
        params=(jnp.asarray(START),),
    )


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("loss", [False, True])
def test_a_run_begins_where_theta_says_and_goes_down_the_loss_that_it_holds(start, loss):
    """What is measured is the task's loss, before every step and at the end."""
    optimizer = learner(start, loss)
    theta = optimizer.init(jax.random.key(0))
    own = curves.evaluate(PROBLEMS.key, optimizer, bowl(), (), 2, STEPS, theta=theta)
    begins = [START, START] if start else origins()
    truth = np.stack([descended(x, PENALTY * loss) for x in begins])
    np.testing.assert_allclose(own.losses, truth[:, :-1], rtol=1e-5)
    np.testing.assert_allclose(own.train_loss[:, 0], truth[:, -1], rtol=1e-5)
    np.testing.assert_allclose(own.validation_loss, truth[:, 1:], rtol=1e-5)


def test_a_comparison_keeps_both_in_whatever_it_makes_of_an_optimizer(tmp_path):
    optimizer = learner()
    mine = Entry("mine", optimizer, optimizer.init(jax.random.key(0)))
    field = [mine, *entries.variants(mine, (0.0,), (1.0,)), Entry("sgd", optax.sgd(RATE))]
    grid = Grid("sgd", (RATE, 10 * RATE, 2), ("constant",), extensions=0)
    cells = [Cell("bowl", bowl())]
    rows = list(
        comparison.measure(
            field, cells, (STEPS,), PROBLEMS, grids=(grid,), timed=True, cache_dir=tmp_path
        )
    )
    learned = descended(START, PENALTY)
    fresh, plain = (np.stack([descended(x, p) for x in origins()]) for p in (PENALTY, 0.0))
    for row, truth in zip(rows, (learned, learned, fresh, plain), strict=False):
        end = np.broadcast_to(truth, (2, STEPS + 1))[:, -1]
        np.testing.assert_allclose(row.curves.train_loss[:, 0], end, rtol=1e-5)
        assert row.seconds > 0
    # The rival starts where the task says.
    np.testing.assert_allclose(rows[-1].start, plain[:, 0].mean(), rtol=1e-5)
    # What the cache has of one theta is not taken for that of another.
    other = mine.theta._replace(start=(2 * mine.theta.start[0],))
    arguments = bowl(), (), PROBLEMS, STEPS, tmp_path
    moved = cache.trained(optimizer, other, *arguments).losses
    np.testing.assert_allclose(moved, 4 * rows[0].curves.losses, rtol=1e-5)


SPECIFICATION = {"name": "sgd", "learning_rate": RATE}


def exported(path, section, **parts):
    """The path of an export of which theta holds these parts."""
    theta = base.Parts((), **parts)
    metadata = {"config": {"theta": {"loss": section}}}
    return str(exports.export(path, SPECIFICATION, theta, metadata))


def test_an_export_is_evaluated_with_its_start_and_its_loss(tmp_path):
    """It has lists where the task has tuples."""
    weight = np.log([2 * PENALTY]).astype(np.float32)[0]
    path = exported(
        *(tmp_path / "mine.safetensors", {"name": "l2", "coefficient": PENALTY}),
        start=[START],
        loss=[weight],
    )
    entry = entries.read(path)
    twin = entries.variants(entry, (), (1.0,))[0]
    begins = {"mine": ([START, START], 2 * PENALTY), "mine, untrained": (origins(), PENALTY)}
    for one in (entry, twin):
        where, penalty = begins[one.name]
        own = cache.trained(*one.at(STEPS), bowl(), (), PROBLEMS, STEPS, None)
        truth = [descended(x, penalty)[:-1] for x in where]
        np.testing.assert_allclose(own.losses, truth, rtol=1e-5)


def test_a_loss_of_which_nothing_is_known_is_refused(tmp_path):
    path = exported(tmp_path / "mine.safetensors", {}, loss=[np.float32(0)])
    with pytest.raises(UserError, match="holds settings of a loss, and the configuration"):
        entries.read(path)


def test_a_start_of_another_model_is_refused_before_any_cell_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "tune", None)
    entry = entries.read(exported(tmp_path / "mine.safetensors", {}, start=[START]))
    cells = [Cell("its own", bowl()), Cell("small", bowl(2))]
    rows = comparison.measure([entry], cells, (STEPS,), PROBLEMS)
    with pytest.raises(UserError, match=r"^mine on small: The learned start has 0: .*\(2,\)"):
        next(rows)


def test_a_loss_of_another_task_is_refused_before_any_cell_is_measured(monkeypatch):
    monkeypatch.setattr(tuning, "tune", None)
    loss = losses.label_weights(classes=2)
    optimizer = base.learner(base.fixed(optax.sgd(RATE)), loss=loss, params=())
    entry = Entry("mine", optimizer, optimizer.init(jax.random.key(0)))
    rows = comparison.measure([entry], [Cell("bowl", bowl())], (STEPS,), PROBLEMS)
    with pytest.raises(UserError, match=r"^mine on bowl: The loss 'label_weights' .* no labels"):
        next(rows)


def test_the_data_of_a_cell_are_read_once_beside_a_learned_start():
    optimizer, loaded = learner(loss=False), []
    entry = Entry("mine", optimizer, optimizer.init(jax.random.key(0)))
    cells = [
        Cell(name, bowl()._replace(data=lambda name=name: loaded.append(name) or ()))
        for name in "ab"
    ]
    for row in comparison.measure([entry], cells, (STEPS,), PROBLEMS, grids=()):
        assert row.cell == loaded[-1]
    assert loaded == ["a", "b"]


def test_tasks_to_be_judged_on_have_the_parameters_that_theta_holds():
    config = {
        "task": {"name": "sinusoid", "hidden": (4,)},
        "theta": {"start": True},
        "optimizer": SPECIFICATION,
        "objective": {"on": "validation"},
        "estimator": {"name": "truncated"},
        "evaluation": {"tasks": {"hidden": (5,)}},
    }
    with pytest.raises(UserError, match=r"evaluation.tasks: sinusoid.* has other parameters"):
        build_experiment(config)
