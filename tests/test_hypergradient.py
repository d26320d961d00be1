"""AdamW with its settings in theta: against optax, and as a run ends beside random search."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l2l
from l2l.core import base
from l2l.evaluation import random_search
from l2l.optimizers.adamw import learned_adamw
from l2l.training import searching
from l2l.training.callbacks import DONE
from l2l.training.experiment import build_experiment
from l2l.training.run import train

PARAMS = {"w": jnp.array([0.5, -1.0, 2.0]), "b": jnp.array([0.1])}


def updates_of(transform, steps, **extra):
    """The updates of a run on fixed gradients, [steps] of them."""
    transform = optax.with_extra_args_support(transform)
    params, state, out = PARAMS, transform.init(PARAMS), []
    for i in range(steps):
        gradients = jax.tree.map(lambda p, i=i: jnp.cos(p * (i + 1)), params)
        updates, state = transform.update(gradients, state, params, **extra)
        params = optax.apply_updates(params, updates)
        out.append(updates)
    return out


def assert_close(one, two):
    def close(x, y):
        np.testing.assert_allclose(x, y, rtol=2e-5)

    jax.tree.map(close, one, two)


def test_is_optax_adamw_where_the_rate_is_constant():
    learned = learned_adamw(learning_rate=0.03, weight_decay=0.2)
    own = updates_of(learned.bind(learned.init(jax.random.key(0))), 4)
    assert_close(own, updates_of(optax.adamw(0.03, eps_root=1e-8, weight_decay=0.2), 4))


def test_its_schedule_is_linear_between_knots():
    """In the logarithm of the rate, over the horizon that `update` is told."""
    learned = learned_adamw(learning_rate=0.03, weight_decay=0.2, knots=3)
    theta = learned.init(jax.random.key(0)) | {"schedule": jnp.array([0.5, -1.0, -4.0])}

    def rate(step):
        return 0.03 * jnp.exp(jnp.interp(step / 8, jnp.array([0, 0.5, 1]), theta["schedule"]))

    own = updates_of(learned.bind(theta), 7, num_steps=8)
    assert_close(own, updates_of(optax.adamw(rate, eps_root=1e-8, weight_decay=0.2), 7))
    unknown = updates_of(learned.bind(theta), 3)
    first = 0.03 * np.exp(0.5)
    assert_close(unknown, updates_of(optax.adamw(first, eps_root=1e-8, weight_decay=0.2), 3))


def test_draws_are_within_their_ranges_and_of_three_schedules():
    thetas = random_search.draws(jax.random.key(0), 4, 300)
    for name, limits in (
        ("log_learning_rate", random_search.RATES),
        ("log_weight_decay", random_search.DECAYS),
    ):
        values = np.exp(thetas[name])
        assert limits[0] <= values.min() < 2 * limits[0]
        assert limits[1] / 2 < values.max() <= limits[1] * 1.0001
    drawn = [thetas["log_learning_rate"], thetas["log_weight_decay"], thetas["schedule"][:, 1]]
    assert np.abs(np.corrcoef(drawn) - np.eye(3)).max() < 4 / 300**0.5  # Each by itself.
    factors = np.unique(np.exp(thetas["schedule"]).round(3), axis=0)
    expected = [[1, 0.667, 0.333, 0.01], [1, 0.75, 0.25, 0.01], [1, 1, 1, 1]]
    np.testing.assert_allclose(factors, expected, atol=2e-3)


def test_a_run_ends_on_whole_splits_of_either_kind():
    # SGD at rate α on ½ x² from 1 is at (1 − α)ⁿ after n steps; splits add what they are called by.
    extra = {"train": 0.0, "validation": 3.0, "test": 5.0}
    family = base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jnp.ones(()),
        batch=lambda key, problem, data, split: extra[split],
        loss=lambda x, problem, batch: 0.5 * x**2 + batch,
    )
    learned = base.lift(lambda key: jnp.float32(0.1), optax.sgd)
    rates, keys = jnp.array([0.1, 0.5]), jax.random.split(jax.random.key(0), 2)
    ended = random_search.compile_runs(learned, family, 4)(rates, keys, ())
    losses = 0.5 * (1 - np.array([0.1, 0.5])) ** 8
    np.testing.assert_allclose(ended.validation, 3 + losses, rtol=1e-6)
    np.testing.assert_allclose(ended.test, 5 + losses, rtol=1e-6)
    assert np.isnan(ended.accuracy).all()


def test_the_best_draw_has_the_lowest_validation_loss():
    config = {"task": {"name": "quadratic", "dimension": 2, "batch_size": 1}}
    ((_, family),) = build_experiment(config).judged
    learned = learned_adamw()
    run = random_search.compile_runs(learned, family, 5)
    thetas = random_search.draws(jax.random.key(0), 0, 6)
    found, losses = random_search.best(run, thetas, jax.random.key(1), ())
    assert losses.shape == (6,)
    best = np.argmin(losses)
    assert found["log_learning_rate"] == thetas["log_learning_rate"][best]


AGAINST = {"horizons": (4,), "num_problems": 2, "every": 0, "against": "random_search"}


@pytest.fixture
def config() -> dict:
    return {
        "task": {"name": "mlp", "hidden": (3,), "activations": ("relu",), "batch_size": 8},
        "optimizer": {"name": "learned_adamw", "knots": 2},
        "objective": {"on": "validation", "form": "last"},
        "inner": {"length": 4, "stagger": False},
        "horizon": {"name": "log_uniform", "shortest": 4, "longest": 4},
        "estimator": {"name": "truncated", "order": "exact"},
        "meta": {"steps": 2, "num_problems": 2, "group": 1},
        "evaluation": AGAINST,
    }


def test_a_run_ends_beside_random_search_of_as_many_runs(config, tmp_path):
    """Where runs of meta-training are whole, and as long as those of the search."""
    assert train(build_experiment(config), tmp_path, jax.devices()[:1]) == DONE
    said = (tmp_path / "summary.txt").read_text()
    assert "| learned " in said and "| random search |" in said
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["search"]) == 4
    assert results["training"]["inner_steps"] == 4 * 4  # Runs of four steps, as many.
    rate = float(
        np.exp(l2l.read_export(tmp_path / "optimizer.safetensors")[1]["log_learning_rate"])
    )
    assert results["rows"][0]["rate"] == pytest.approx(rate)


def test_the_search_has_two_runs_for_a_problem_of_evolution_strategies(config, tmp_path):
    config |= {"estimator": {"name": "pes"}, "task": {"name": "quadratic", "dimension": 2}}
    experiment = build_experiment(config)
    theta, key = experiment.optimizer.init(jax.random.key(0)), jax.random.key(1)
    searching.conclude(experiment, theta, tmp_path, key, {"meta_steps": 2})
    # Two meta-steps of two problems, each by either sign of the noise.
    assert len(json.loads((tmp_path / "results.json").read_text())["search"]) == 8


def test_the_search_takes_the_inner_steps_of_meta_training_where_a_window_is_no_run(
    config, tmp_path
):
    """Two meta-steps of two windows of 2 steps: two runs of 4, not four of them."""
    config |= {"inner": {"length": 2}, "task": {"name": "quadratic", "dimension": 2}}
    experiment = build_experiment(config)
    theta, key = experiment.optimizer.init(jax.random.key(0)), jax.random.key(1)
    searching.conclude(experiment, theta, tmp_path, key, {"meta_steps": 2})
    assert len(json.loads((tmp_path / "results.json").read_text())["search"]) == 2
    said = " ".join((tmp_path / "table.md").read_text().split())
    assert "found in 8 inner steps" in said and "the best of 2 draws" in said


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"evaluation": {"against": "adm"}}, "Did you mean 'adam'"),
        ({"optimizer": {"name": "lstm"}}, "draws settings of the optimizer 'learned_adamw'"),
        ({"evaluation": AGAINST | {"horizons": (2, 4)}}, r"one horizon.*horizons=\(2, 4\)"),
        ({"evaluation": AGAINST | {"tasks": ({}, {"hidden": (5,)})}}, "compares on one task"),
        ({"task": [{"name": "quadratic", "batch_size": b} for b in (1, 2)]}, "tasks are quadr"),
        ({"theta": {"loss": {"name": "l2"}}}, "but theta.loss is learned too"),
        ({"optimizer": {"name": "learned_adamw", "knots": 1}}, "knots=1 make no schedule"),
        ({"optimizer": {"name": "learned_adamw", "weight_decay": 0}}, "cannot be learned in log"),
    ],
)
def test_a_mistake_is_one_sentence(config, change, sentence):
    with pytest.raises(l2l.UserError, match=sentence):
        build_experiment({**config, **change})
