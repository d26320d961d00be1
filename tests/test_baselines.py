"""Grids and meta-learned Adam against optax itself, and expressions that must not be run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l2l
from l2l import tasks
from l2l.core import unroll
from l2l.evaluation import baselines, suites, tuning
from l2l.evaluation.curves import Problems
from l2l.optimizers import adam

STEPS = 5


def walk(optimizer, dtype=jnp.float32):
    """The positions of a short descent on Σ x⁴ with one coordinate that has no gradient."""
    x = jnp.asarray([1.0, -0.5, 0.0], dtype)
    state, path = optimizer.init(x), []
    for _ in range(STEPS):
        updates, state = optimizer.update(4 * x**3, state, x)
        x = optax.apply_updates(x, updates)
        path.append(x)
    return jnp.stack(path)


def test_learned_adam_begins_as_optax_adam():
    learned = adam.learned_adam(learning_rate=0.02, b1=0.8, b2=0.99, eps_root=1e-8)
    theta = learned.init(jax.random.key(0))
    assert [x.dtype for x in jax.tree.leaves(theta)] == [jnp.float32] * 3
    np.testing.assert_allclose(
        walk(learned.bind(theta)), walk(optax.adam(0.02, 0.8, 0.99, eps_root=1e-8)), rtol=1e-5
    )


def test_learned_adam_has_a_meta_gradient_only_thanks_to_eps_root():
    def end(theta, learned):
        return jnp.sum(walk(learned.bind(theta))[-1] ** 4)

    for eps_root, finite in ((1e-8, True), (0.0, False)):
        learned = adam.learned_adam(eps_root=eps_root)

        def through_gradient(theta, shift, learned=learned):
            # Exact meta-gradients differentiate the gradients too: here by a shift of the start.
            x = jnp.asarray([1.0, 0.0]) + shift
            optimizer = learned.bind(theta)
            state = optimizer.init(x)
            for _ in range(2):
                updates, state = optimizer.update(4 * x**3, state, x)
                x = x + updates
            return jnp.sum(x**4)

        theta = learned.init(jax.random.key(0))
        slope = jax.grad(through_gradient, (0, 1))(theta, jnp.zeros(2))
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(slope)) == finite
    slope = jax.grad(end)(theta, adam.learned_adam())
    assert float(slope["log_learning_rate"]) < 0  # Too slow a rate: faster is better.


@pytest.mark.parametrize("name", baselines.KINDS)
@pytest.mark.parametrize("schedule", baselines.SCHEDULE_KINDS)
def test_a_point_is_what_its_expression_says(name, schedule):
    point = baselines.scheduled(0.03, schedule, STEPS, 1e-8, 0.1)
    own = walk(baselines.grid(name).bind(point))
    typed = baselines.parse(baselines.expression(name, point))
    np.testing.assert_allclose(own, walk(typed), rtol=1e-5)
    assert bool(jnp.isfinite(walk(baselines.grid(name).bind(baselines.setting(0.03)))).all())


def muon(rate, decay):
    return optax.contrib.muon(rate, weight_decay=decay, adam_weight_decay=decay)


RIVALS = {
    "adam": lambda rate, decay: optax.adam(rate),
    "adamw": lambda rate, decay: optax.adamw(rate, weight_decay=decay),
    "nadamw": lambda rate, decay: optax.nadamw(rate, weight_decay=decay),
    "muon": muon,
    "schedule_free_adamw": lambda rate, decay: optax.contrib.schedule_free_adamw(
        rate, weight_decay=decay
    ),
    "prodigy": lambda rate, decay: optax.contrib.prodigy(rate, weight_decay=decay),
    "soap": lambda rate, decay: l2l.soap(rate, weight_decay=decay),
}


@pytest.mark.parametrize("kind", suites.RIVALS, ids=lambda grid: grid.kind)
def test_every_trial_of_a_rival_is_its_optimizer_run_by_hand(kind):
    """Two layers, so that there are matrices; the schedules are optax's."""
    family = tasks.mlp(hidden=(4,), activations=("tanh",), batch_size=8)
    data, key, steps = family.data(), jax.random.key(2), 6
    grid = kind._replace(rates=(0.01, 0.1, 2))
    trials = grid.trials()
    tuned = tuning.tune(grid, family, data, Problems(key, 1), (steps,))
    assert len(tuned.points) == len(trials) == 2 * tuning.EACH
    for point in tuned.points[1::2]:
        rate, horizon = point.learning_rate, point.horizon
        schedule = {
            "constant": rate,
            "warmup": optax.warmup_constant_schedule(0.1 * rate, rate, 1),
            "cosine": optax.cosine_decay_schedule(rate, horizon),
            "warmup cosine": optax.warmup_cosine_decay_schedule(0.1 * rate, rate, 1, horizon),
        }[point.schedule]
        optimizer = RIVALS[grid.kind](schedule, point.weight_decay)
        losses = by_hand(optimizer, family, data, jax.random.fold_in(key, 0), horizon)
        found = [x[0] for x in (point.train_loss, point.validation_loss, point.test_loss)]
        np.testing.assert_allclose(found, losses, rtol=1e-3)


def by_hand(optimizer, family, data, key, steps):
    """The losses over whole splits at the end of a run, of the averages where it has them."""
    fold = jax.random.fold_in
    problem = family.sample(fold(key, unroll.SAMPLE))
    params = family.init(fold(key, unroll.INIT), problem)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, t):
        batch = family.batch(fold(fold(key, unroll.TRAIN), t), problem, data, "train")
        gradient = jax.grad(family.loss)(params, problem, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for t in range(steps):
        params, state = step(params, state, t)
    if hasattr(state, "z"):
        params = optax.contrib.schedule_free_eval_params(state, params)
    splits = ("train", "validation", "test")
    return [family.loss(params, problem, family.batch(None, problem, data, s)) for s in splits]


def test_spaces_are_declared_and_have_the_same_number_of_trials():
    for grid in suites.RIVALS:
        kind, trials = baselines.kind(grid.kind), grid.trials()
        assert len(set(trials)) == len(trials) == tuning.TRIALS and grid.trials() == trials
        assert {t.schedule for t in trials} == set(kind.schedules)
        assert {t.weight_decay for t in trials} == set(kind.decays)
        rates = [grid.rate(t.number) for t in trials]
        np.testing.assert_allclose((min(rates), max(rates)), (kind.low, kind.high))
        others = [t[1:] for t in trials]
        often = [others.count(other) for other in set(others)]
        assert max(often) - min(often) <= 1  # As evenly as they divide.


@pytest.mark.parametrize(
    "grid, told",
    [
        (
            tuning.Grid("adamw", extensions=0),
            "adamw: 15 rates from 0.0003 to 3, each with 2 of 12 combinations (schedule constant, "
            "cosine, warmup cosine; weight decay 0, 0.001, 0.01, 0.1).",
        ),
        (
            tuning.Grid("adam", (0.1, 1.0, 3), eps_roots=(0.0, 1e-8), each=None),
            "adam: 3 rates from 0.1 to 1, each with 6 of 6 combinations (schedule constant, "
            "cosine, warmup cosine; eps_root 0, 1e-08), and further rates where the best one is "
            "at the edge.",
        ),
        (
            tuning.Grid("adam", eps_roots=(0.0, 1e-8), extensions=0),
            "adam: 15 rates from 0.0003 to 3, each with 4 of 6 combinations (schedule constant, "
            "cosine, warmup cosine; eps_root 0, 1e-08).",
        ),
        (
            tuning.Grid("sgd", (0.1, 1.0, 3), ("constant",), extensions=0),
            "sgd: 3 rates from 0.1 to 1, each with 1 of 1 combination (schedule constant).",
        ),
        (
            suites.SUITES["models"].grids[0],
            "adamw: 4 rates from 0.0006 to 0.016, each with 1 of 2 combinations (schedule warmup "
            "cosine; weight decay 0.01, 0.1).",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else x.kind,
)
def test_a_space_is_told_as_it_is_tried(grid, told):
    assert grid.told() == told
    *_, high = (grid.rate(trial.number) for trial in grid.trials())
    combinations = {trial[1:] for trial in grid.trials()}
    each = len(grid.trials()) // grid.limits[2]
    assert f"each with {each} of {len(combinations)} " in told and f"to {high:g}," in told


@pytest.mark.parametrize("kind", [name for name, kind in baselines.KINDS.items() if kind.rooted])
def test_a_further_eps_root_takes_no_trial_from_the_others(kind):
    """Or a baseline tuned over more would be easier to beat."""
    alone, both = (tuning.Grid(kind, eps_roots=roots) for roots in ((0.0,), (0.0, 1e-8)))
    expected = [trial._replace(eps_root=root) for trial in alone.trials() for root in (0.0, 1e-8)]
    assert both.trials() == expected


def test_adam_of_the_grid_is_optax_adam():
    own = baselines.grid("adam", b1=0.8).bind(baselines.setting(0.03, eps_root=1e-6))
    np.testing.assert_allclose(walk(own), walk(optax.adam(0.03, 0.8, eps_root=1e-6)), rtol=1e-6)
    schedule = optax.cosine_decay_schedule(0.03, 4)
    own = baselines.grid("adam").bind(baselines.setting(0.03, horizon=4))
    np.testing.assert_allclose(walk(own), walk(optax.adam(schedule)), rtol=1e-5)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("adam", lambda: optax.adam(1e-3)),
        ("adam(learning_rate=1e-2)", lambda: optax.adam(1e-2)),
        ("optax.adamw(0.01, weight_decay=-0.5)", lambda: optax.adamw(0.01, weight_decay=-0.5)),
        ("sgd(0.1, momentum=0.9, nesterov=True)", lambda: optax.sgd(0.1, 0.9, True)),
        ("sgd(linear_schedule(0.1, 0, 5))", lambda: optax.sgd(optax.linear_schedule(0.1, 0, 5))),
    ],
)
def test_expressions_mean_what_optax_means(text, same):
    optimizer = baselines.parse(text)
    np.testing.assert_array_equal(walk(optimizer), walk(same()))
    optimizer.update(jnp.zeros(3), optimizer.init(jnp.zeros(3)), jnp.zeros(3), num_steps=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("adma(1e-2)", r"did you mean adam\?"),
        ("__import__('os').system('true')", "not among"),
        ("adam(__import__('os').getpid())", "not among"),
        ("adam([x for x in (1,)])", "not a plain value"),
        ("adam(**{'learning_rate': 1})", "unpacks"),
        ("adam(1e-2, speed=3)", "optax refuses"),
        ("adam(1e-2", "not an expression"),
        ("3", "does not name"),
        ("", "not an expression"),
        ("adam; sgd", "not an expression"),
    ],
)
def test_anything_else_is_refused_in_one_sentence(text, says):
    with pytest.raises(ValueError, match=says) as error:
        baselines.parse(text)
    assert "\n" not in str(error.value)


def test_unknown_kinds_and_impossible_decays_are_refused():
    with pytest.raises(ValueError, match="did you mean rmsprop"):
        baselines.grid("rmsporp")
    with pytest.raises(ValueError, match="strictly between"):
        adam.learned_adam(b1=1.0)
