"""Truncated automatic differentiation: against differences, in segments, and where Adam is NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base
from l2l.core.unroll import Inner, first
from l2l.estimators import autodiff
from l2l.estimators.first_order import Teacher
from l2l.estimators.objective import Objective
from l2l.optimizers.lstm import lstm


def smooth(size=6) -> base.TaskFamily:
    """A smooth loss with coupled coordinates and noisy batches, [size] parameters."""

    def loss(params, problem, batch):
        x = params["x"]
        return 0.5 + jnp.mean((jnp.sin(x) - 0.3 * jnp.roll(x, 1) + batch) ** 2)

    return base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: {"x": jax.random.uniform(key, (size,))},
        batch=lambda key, problem, data, split: 0.3 * jax.random.uniform(key, (size,)),
        loss=loss,
    )


def pixels() -> base.TaskFamily:
    """Logistic regression of which the last two inputs are always zero: a dead border."""

    def batch(key, problem, data, split):
        return jax.random.uniform(key, (8, 5)) * jnp.array([[1.0, 1.0, 1.0, 0.0, 0.0]])

    def loss(params, problem, batch):
        return jnp.mean(jax.nn.softplus(batch @ params["w"])) + 0.1

    return base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: {"w": jnp.ones(5)},
        batch=batch,
        loss=loss,
    )


def learned_adam(eps_root=1e-8) -> base.LearnedOptimizer:
    """Adam with a meta-learned learning rate and first decay."""
    return base.lift(
        lambda key: {"log_lr": jnp.log(0.05), "logit_b1": jnp.asarray(2.0)},
        lambda theta: optax.adam(
            jnp.exp(theta["log_lr"]), b1=jax.nn.sigmoid(theta["logit_b1"]), eps_root=eps_root
        ),
    )


def stage_of(length):
    return base.Stage(jnp.asarray(length), jnp.asarray(length), jnp.zeros(()))


def theta_of(optimizer, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    theta = optimizer.init(jax.random.key(0))
    return jax.tree.map(lambda x: (x + 0.3 * rng.normal(size=x.shape)).astype(dtype), theta)


def prepared(inner, objective, dtype=jnp.float32, problems=2, **settings):
    """(theta, state, stage, estimator); the state is at the start of the first window."""
    estimator = autodiff.truncated(inner, objective, **settings)
    theta, stage = theta_of(inner.optimizer, dtype), stage_of(3 * inner.length)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(5), i))(jnp.arange(problems))
    return theta, jax.jit(estimator.init)(keys, theta, stage), stage, estimator


OPTIMIZERS = {"lstm": lambda: lstm(hidden_size=2, learning_rate=0.05), "adam": learned_adam}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_exact_gradient_equals_central_differences(name):
    """In float64, along random directions, in the second window of a run."""
    with jax.enable_x64(True):
        inner = Inner(smooth(), OPTIMIZERS[name](), 7, stagger=False)
        objective = Objective("both", "log", late_validation_weight=0.1)
        theta, state, stage, estimator = prepared(inner, objective, jnp.float64, order="exact")
        estimate = jax.jit(estimator.estimate)
        state = estimate(theta, state, (), stage)[1]
        gradients, after, _ = estimate(theta, state, (), stage)
        assert int(after.inner.step[0]) == 14

        @jax.jit
        def value(theta):  # The same meta-loss, with nothing to differentiate.
            return jax.lax.map(
                lambda run: autodiff.window(inner, objective, theta, run, ())[1], state.inner
            )

        rng, h = np.random.default_rng(1), 1e-6
        for _ in range(3):
            way = jax.tree.map(lambda x: rng.normal(size=x.shape), theta)
            moved = [jax.tree.map(lambda t, d: t + s * h * d, theta, way) for s in (1, -1)]
            differences = (value(moved[0]) - value(moved[1])) / (2 * h)
            slopes = sum(
                np.sum(np.asarray(g) * d, axis=tuple(range(1, g.ndim)))
                for g, d in zip(jax.tree.leaves(gradients), jax.tree.leaves(way), strict=True)
            )
            np.testing.assert_allclose(slopes, differences, rtol=1e-6)


@pytest.mark.parametrize("form", ["plain", "last"])
def test_each_loss_of_a_window_has_the_validation_weight_of_its_step(form):
    """A window of 4 steps, a whole run, against four windows of one step each."""
    with jax.enable_x64(True):
        whole, single = (Inner(smooth(), learned_adam(), k, stagger=False) for k in (4, 1))
        theta, stage = theta_of(whole.optimizer, jnp.float64), stage_of(4)
        state = first(whole, jax.random.key(2), theta, stage)
        objective = Objective("both", form, validation_weight=0.9, late_validation_weight=0.1)
        found = autodiff.window(whole, objective, theta, state, ())[1]
        losses = []
        for _ in range(4):
            after = [
                autodiff.window(single, Objective(on, "last"), theta, state, ())
                for on in ("train", "validation")
            ]
            losses.append([float(value) for _, value, _ in after])
            state = after[0][0]
    weight = 0.9 - 0.8 * np.arange(1, 5) / 4
    training, validation = np.transpose(losses)
    by_step = (1 - weight) * training + weight * validation
    np.testing.assert_allclose(found, by_step[-1] if form == "last" else by_step.mean(), rtol=1e-6)


def test_first_order_is_not_the_exact_gradient():
    """They agree at one step, where nothing observed depends on theta, and nowhere else."""
    with jax.enable_x64(True):
        for length, equal in ((1, True), (5, False)):
            inner = Inner(smooth(), learned_adam(), length, stagger=False)
            both = []
            for order in ("first", "exact"):
                theta, state, stage, estimator = prepared(
                    inner, Objective(), jnp.float64, order=order
                )
                both.append(jax.jit(estimator.estimate)(theta, state, (), stage)[0]["log_lr"])
            assert np.allclose(*both, rtol=1e-9) == equal


@pytest.mark.parametrize("optimizer", [lstm, lambda eps_root: learned_adam(eps_root)])
def test_dead_pixels_are_nan_without_eps_root_and_finite_with_it(optimizer):
    """√v̂ has an infinite derivative at v̂ = 0; the first-order gradient never takes it."""
    for eps_root, order, finite in (
        (0.0, "exact", False),
        (1e-8, "exact", True),
        (0.0, "first", True),
    ):
        inner = Inner(pixels(), optimizer(eps_root=eps_root), 4, stagger=False)
        theta, state, stage, estimator = prepared(inner, Objective(), order=order)
        gradients, after, _ = jax.jit(estimator.estimate)(theta, state, (), stage)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.inner.params))
        leaves = jax.tree.leaves(gradients)
        assert all(np.isfinite(x).all() for x in leaves) == finite


@pytest.mark.parametrize("length", [1, 9, pytest.param(13, marks=pytest.mark.slow)])
def test_segments_change_nothing(length):
    """Lengths with and without a remainder; the states after them too."""
    with jax.enable_x64(True):
        inner = Inner(smooth(), learned_adam(), length, stagger=False)
        outs = []
        for segments in (False, True):
            theta, state, stage, estimator = prepared(
                inner, Objective("both"), jnp.float64, order="exact", segments=segments
            )
            outs.append(jax.jit(estimator.estimate)(theta, state, (), stage))
        for one, other in zip(*map(jax.tree.leaves, outs), strict=True):
            if not jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)


def test_windows_that_the_root_does_not_divide_are_no_second_program():
    def loops(length):
        inner = Inner(smooth(), learned_adam(), length, stagger=False)
        theta, state, stage, estimator = prepared(inner, Objective("both"), order="exact")
        text = jax.jit(estimator.estimate).lower(theta, state, (), stage).as_text()
        return text.count("stablehlo.while")

    whole = loops(16)  # In segments of 4.
    assert [loops(50), loops(200)] == [whole, whole]
    assert loops(13) > whole  # 13 has no divisor near its root: one step is left over.


def test_memory_of_segments_grows_with_the_square_root():
    def temporary(length, segments):
        inner = Inner(smooth(4096), learned_adam(), length, stagger=False)
        theta, state, stage, estimator = prepared(
            inner, Objective(), problems=1, order="exact", segments=segments
        )
        step = jax.jit(estimator.estimate)
        compiled = step.lower(theta, state, (), stage).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    plain = [temporary(length, False) for length in (16, 256)]
    ours = [temporary(length, True) for length in (16, 64, 256)]
    assert plain[1] / plain[0] > 10  # Grows with K: 16 at most ...
    assert ours[2] / ours[0] < 5  # ... where ours grows with √K: 4.
    assert ours[1] / ours[0] < 2.5
    assert plain[1] / ours[2] > 4


def test_the_student_comes_to_its_teacher_and_not_the_teacher_to_it():
    """SGD at rate α on Σ ½ x² from 1: gₜ = (1 − α)ᵗ, and with Adam's directions dₜ held constant
    the imitation term mean((dₜ − α gₜ/r)²) has the slope mean(2 (dₜ − α gₜ/r) (−(α gₜ)′/r))."""
    family = base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jnp.ones(2),
        batch=lambda key, problem, data, split: (),
        loss=lambda x, problem, batch: 0.5 * jnp.sum(x**2),
    )
    learned, teacher = base.lift(lambda key: jnp.asarray(0.1), optax.sgd), Teacher(0.05)
    with jax.enable_x64(True):
        theta, found = jnp.asarray(0.1), []
        inner = Inner(family, learned, 4, stagger=False)
        estimator = autodiff.truncated(inner, Objective(), order="exact", teacher=teacher)
        for imitation in (0.0, 1.0):
            stage = base.Stage(jnp.asarray(4), jnp.asarray(4), jnp.asarray(imitation))
            state = estimator.init(jax.random.key(0)[None], theta, stage)
            found.append(float(estimator.estimate(theta, state, (), stage)[0][0]))
        gradients = 0.9 ** np.arange(4.0)
        directions, adam = [], teacher.adam.init(jnp.ones(()))
        for gradient in gradients:
            direction, adam = teacher.adam.update(jnp.asarray(gradient), adam)
            directions.append(direction)
    off = np.asarray(directions) - 0.1 * gradients / 0.05
    moves = gradients - 0.1 * np.arange(4) * 0.9 ** (np.arange(4.0) - 1)
    wanted = np.mean(2 * off * -moves / 0.05)
    np.testing.assert_allclose(found[1] - found[0], wanted, rtol=1e-6)


def test_state_carries_over_between_windows():
    """Two windows of 3 leave what one window of 6 leaves; then the run is over and renewed."""
    states = []
    for length, windows in ((3, 2), (6, 1)):
        inner = Inner(smooth(), learned_adam(), length, stagger=False)
        estimator = autodiff.truncated(inner, Objective())
        theta, stage = theta_of(inner.optimizer), stage_of(6)
        keys = jax.random.key(0)[None]
        state = estimator.init(keys, theta, stage)
        step = jax.jit(estimator.estimate)
        for _ in range(windows):
            _, state, _ = step(theta, state, (), stage)
        states.append(state.inner)
        _, renewed, _ = step(theta, state, (), stage)
        assert int(renewed.inner.step[0]) == length
    one, other = states
    np.testing.assert_allclose(one.params["x"], other.params["x"], rtol=1e-6)
    assert int(one.opt_state[0].count[0]) == 6


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match=r"'second'.*choose first or exact"):
        autodiff.truncated(Inner(smooth(), learned_adam(), 2), Objective(), order="second")
