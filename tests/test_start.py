"""Theta may hold the start of a run and settings of its loss: against closed forms, differences and
what the estimators say of one another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l import tasks
from l2l.console.errors import UserError
from l2l.core import base, unroll
from l2l.core.unroll import Inner
from l2l.estimators import autodiff, pes, reptile
from l2l.estimators.objective import Objective
from l2l.tasks import losses, supervised
from l2l.tasks.sinusoid import sinusoid

RATE = 0.07
ON_QUERY = Objective("validation", "last")
_NORMAL = np.random.default_rng(0).normal(size=(2, 3, 3))
SUPPORT, QUERY = (a @ a.T / 3 + np.eye(3) for a in _NORMAL)  # Hessians of both losses.
OPTIMUM = np.array([1.0, -2.0, 0.5])
START = np.array([0.3, 0.8, -0.4])


def quadratics(support=SUPPORT) -> base.TaskFamily:
    """½ xᵀ A x on the support, ½ (x − x*)ᵀ B (x − x*) on the query."""

    def batch(key, problem, data, split):
        train = split == "train"
        hessian, optimum = (support, np.zeros(3)) if train else (QUERY, OPTIMUM)
        return jnp.asarray(hessian), jnp.asarray(optimum)

    def loss(params, problem, batch):
        hessian, optimum = batch
        off = params["x"] - optimum
        return off @ hessian @ off / 2

    return base.TaskFamily(lambda key: (), lambda key, problem: None, batch, loss)


def lines() -> base.TaskFamily:
    """A support loss without a second derivative, and a query loss with one."""

    def loss(params, problem, batch):
        slope, bend = batch
        return slope @ params["x"] + bend * jnp.sum(jnp.sin(params["x"]))

    def batch(key, problem, data, split):
        return jnp.arange(1.0, 4.0), jnp.asarray(0.0 if split == "train" else 1.0)

    return base.TaskFamily(lambda key: (), lambda key, problem: None, batch, loss)


def stage_of(horizon):
    return base.Stage(jnp.asarray(horizon), jnp.asarray(horizon), jnp.zeros(()))


def from_start(optimizer=None, loss=None) -> base.LearnedOptimizer:
    optimizer = base.fixed(optax.sgd(RATE)) if optimizer is None else optimizer
    return base.learner(optimizer, start=lambda key: {"x": jnp.asarray(START)}, loss=loss)


def first_window(estimator, theta, horizon, problems=1):
    """The meta-gradients of the first window of new runs."""

    @jax.jit
    def run(theta):
        keys, stage = jax.random.split(jax.random.key(0), problems), stage_of(horizon)
        return estimator.estimate(theta, estimator.init(keys, theta, stage), (), stage)

    return run(theta)


def descended(steps):
    """xₖ of gradient descent on ½ xᵀ A x, and the factor (I − αA)ᵏ."""
    factor = np.linalg.matrix_power(np.eye(3) - RATE * SUPPORT, steps)
    return factor @ START, factor


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize("steps", [1, 5])
def test_the_meta_gradient_of_the_start_is_weighted_by_what_descent_does(steps, segments):
    """xₖ = (I − αA)ᵏ x₀, so d L(xₖ)/dx₀ = (I − αA)ᵏ ∇L(xₖ), A being symmetric."""
    with jax.enable_x64(True):
        learned = from_start()
        inner = Inner(quadratics(), learned, steps, stagger=False)
        settings = dict(order="exact", segments=segments)
        estimator = autodiff.truncated(inner, ON_QUERY, **settings)
        gradients, state, metrics = first_window(estimator, learned.init(jax.random.key(0)), steps)
        end, factor = descended(steps)
        pull = QUERY @ (end - OPTIMUM)
        np.testing.assert_allclose(state.inner.params["x"][0], end, rtol=1e-12)
        np.testing.assert_allclose(gradients.start["x"][0], factor @ pull, rtol=1e-12)
        loss = (end - OPTIMUM) @ pull / 2
        np.testing.assert_allclose(metrics["meta_loss"][0], loss, rtol=1e-12)


def test_first_order_is_the_gradient_where_descent_ends():
    """FOMAML puts I in place of (I − αA)ᵏ."""
    with jax.enable_x64(True):
        learned = from_start()
        inner = Inner(quadratics(), learned, 5, stagger=False)
        estimator = autodiff.truncated(inner, ON_QUERY, order="first")
        gradients, *_ = first_window(estimator, learned.init(jax.random.key(0)), 5)
        pull = QUERY @ (descended(5)[0] - OPTIMUM)
        np.testing.assert_allclose(gradients.start["x"][0], pull, rtol=1e-12)


@pytest.mark.parametrize("task, equal", [(lines, True), (quadratics, False)])
def test_first_order_is_exact_where_the_hessian_is_zero_and_only_there(task, equal):
    with jax.enable_x64(True):
        learned = from_start()
        inner = Inner(task(), learned, 4, stagger=False)
        both = [
            first_window(autodiff.truncated(inner, ON_QUERY, order=order), theta, 4)[0].start["x"]
            for theta in [learned.init(jax.random.key(0))]
            for order in ("first", "exact")
        ]
        assert np.allclose(*both, rtol=1e-12) == equal


def adam_in_log_space() -> base.LearnedOptimizer:
    return base.lift(
        lambda key: jnp.log(jnp.asarray(0.05)),
        lambda log_rate: optax.adam(jnp.exp(log_rate), eps_root=1e-8),
    )


def test_the_start_beside_adams_rate_equals_central_differences():
    """In float64, through six steps of Adam on a network of tanh, start and rate together."""
    with jax.enable_x64(True):
        family = sinusoid(hidden=(4,), activation="tanh")
        learned = base.learner(adam_in_log_space(), start=lambda key: family.init(key, None))
        inner = Inner(family, learned, 6, stagger=False)
        theta = jax.tree.map(lambda x: x.astype(float), learned.init(jax.random.key(1)))
        estimator = autodiff.truncated(inner, ON_QUERY, order="exact")
        gradients, *_ = first_window(estimator, theta, 6)

        @jax.jit
        def value(theta):
            return first_window(estimator, theta, 6)[2]["meta_loss"][0]

        rng, h = np.random.default_rng(1), 1e-6
        for _ in range(3):
            way = jax.tree.map(lambda x: rng.normal(size=x.shape), theta)
            moved = [jax.tree.map(lambda t, d: t + s * h * d, theta, way) for s in (1, -1)]
            difference = (value(moved[0]) - value(moved[1])) / (2 * h)
            pairs = zip(jax.tree.leaves(gradients), jax.tree.leaves(way), strict=True)
            slope = sum(np.vdot(g[0], d) for g, d in pairs)
            np.testing.assert_allclose(slope, difference, rtol=1e-6)


def test_evolution_strategies_move_the_start_of_either_twin():
    """The meta-loss is quadratic in the start, and so ĝ = ε ⟨ε, ∇L⟩ / σ² to rounding."""
    with jax.enable_x64(True):
        learned, sigma = from_start(), 0.1
        epsilon = np.array([1.0, -0.5, 2.0])
        inner = Inner(quadratics(), learned, 5, stagger=False)
        noise = lambda key, theta: theta._replace(start={"x": jnp.asarray(epsilon)})  # noqa: E731
        theta = learned.init(jax.random.key(0))
        gradients, *_ = first_window(pes.pes(inner, ON_QUERY, sigma=sigma, noise=noise), theta, 5)
        end, factor = descended(5)
        exact = factor @ QUERY @ (end - OPTIMUM)
        np.testing.assert_allclose(gradients.start["x"][0], epsilon * (epsilon @ exact), rtol=1e-9)


def test_a_later_window_does_not_see_the_start_unless_its_noise_persists():
    """Truncation holds the state before a window constant; PES carries ξ on."""
    with jax.enable_x64(True):
        learned = from_start()
        inner = Inner(quadratics(), learned, 3, stagger=False)
        theta, second = learned.init(jax.random.key(0)), {}
        for name, make in (("truncated", autodiff.truncated), ("pes", pes.pes)):
            settings = dict(order="exact") if name == "truncated" else dict(sigma=0.1)
            estimator = make(inner, ON_QUERY, **settings)
            _, state, _ = first_window(estimator, theta, 6)
            estimate = jax.jit(estimator.estimate)
            second[name] = estimate(theta, state, (), stage_of(6))[0].start["x"]
        assert not second["truncated"].any() and second["pes"].any()


def test_a_new_run_begins_with_the_theta_of_its_time():
    learned = from_start()
    inner = Inner(quadratics(SUPPORT.astype(np.float32)), learned, 2, stagger=False)
    estimator = autodiff.truncated(inner, ON_QUERY, order="exact")
    theta = learned.init(jax.random.key(0))
    _, state, _ = first_window(estimator, theta, 2)
    moved = theta._replace(start={"x": theta.start["x"] + 1})
    run = jax.tree.map(lambda x: x[0], state.inner)
    fresh = unroll.renew(inner, run, moved, stage_of(2))
    np.testing.assert_array_equal(fresh.params["x"], moved.start["x"])


def test_the_gradient_of_a_regularisers_weight():
    """One step: x₁ = x₀ − α (A x₀ + e^c x₀), so dL(x₁)/dc = −α e^c ⟨x₀, ∇L(x₁)⟩."""
    with jax.enable_x64(True):
        weight = 0.4
        learned = from_start(loss=losses.l2(coefficient=weight))
        inner = Inner(quadratics(), learned, 1, stagger=False)
        theta = learned.init(jax.random.key(0))
        theta = jax.tree.map(lambda x: x.astype(float), theta)
        gradients, *_ = first_window(autodiff.truncated(inner, ON_QUERY, order="exact"), theta, 1)
        weight = np.exp(theta.loss["x"])
        end = START - RATE * (SUPPORT @ START + weight * START)
        slope = -RATE * weight * START @ QUERY @ (end - OPTIMUM)
        np.testing.assert_allclose(gradients.loss["x"][0], slope, rtol=1e-10)


def test_weights_of_labels_make_a_weighted_mean():
    def loss(params, problem, batch):
        return jnp.mean((params - batch.inputs) ** 2 * (1.0 + batch.labels))

    learned = losses.label_weights(classes=3)
    theta = learned.init(jax.random.key(0), None)
    assert theta.shape == (3,)
    batch = supervised.Batch(jnp.array([0.0, 1.0, 2.0, 4.0]), jnp.array([0, 2, 2, 1]))
    same = learned.bind(theta, loss)(0.5, (), batch)
    np.testing.assert_allclose(same, loss(0.5, (), batch), rtol=1e-6)
    theta = jnp.log(jnp.array([1.0, 2.0, 5.0]))
    each = (0.5 - np.asarray(batch.inputs)) ** 2 * (1 + np.asarray(batch.labels))
    expected = np.average(each, weights=[1, 5, 5, 2])
    np.testing.assert_allclose(learned.bind(theta, loss)(0.5, (), batch), expected, rtol=1e-6)


@pytest.mark.parametrize(
    "task, classes, sentence",
    [
        (tasks.mlp(hidden=(3,)), 2, "of mlp-digits-3 go from 0 to 9.*classes=2"),
        (tasks.mlp(dataset="diabetes"), 2, r"mlp-diabetes-32 have labels of float32\[264\]"),
        (tasks.quadratic(), 2, "quadratic-10 have no labels"),
        (tasks.gru(width=2), 128, r"gru-pydoc-2 have labels of int32\[\d+, 32\]"),
        (tasks.few_shot(ways=3, shots=2), 2, "go from 0 to 2"),
    ],
)
def test_weights_of_labels_are_for_tasks_of_as_many_classes(task, classes, sentence):
    check = losses.label_weights(classes=classes).check
    with pytest.raises(UserError, match=sentence):
        check(task)
    if classes == 2 and "go from" in sentence:
        losses.label_weights(classes=10).check(task)


def test_labels_that_are_unknown_or_too_many_give_no_weights():
    learned, theta = losses.label_weights(classes=2), jnp.array([0.0, 1.0])
    loss = learned.bind(theta, lambda params, problem, batch: jnp.mean(batch.inputs))
    assert jnp.isnan(loss((), (), supervised.Batch(jnp.ones(3), jnp.array([0, 1, 2]))))
    # As many characters in a row as there are rows.
    with pytest.raises(UserError, match=r"this task have labels of int32\[2, 2\]"):
        loss((), (), supervised.Batch(jnp.ones((2, 2)), jnp.zeros((2, 2), jnp.int32)))


def test_reptile_moves_the_start_to_where_descent_ends():
    with jax.enable_x64(True):
        learned = from_start()
        inner = Inner(quadratics(), learned, 5, stagger=False)
        theta = learned.init(jax.random.key(0))
        gradients, state, _ = first_window(reptile.reptile(inner, ON_QUERY), theta, 10)
        end, _ = descended(5)
        np.testing.assert_allclose(gradients.start["x"][0], START - end, rtol=1e-12)
        estimate = jax.jit(reptile.reptile(inner, ON_QUERY).estimate)
        later = estimate(theta, state, (), stage_of(10))[0].start["x"][0]
        np.testing.assert_allclose(later, end - descended(10)[0], rtol=1e-10)


def test_reptile_learns_nothing_but_a_start():
    for learned in (base.fixed(optax.sgd(RATE)), from_start(adam_in_log_space())):
        with pytest.raises(UserError, match="learns the start of runs and nothing else"):
            reptile.reptile(Inner(quadratics(), learned, 5), ON_QUERY)


@pytest.mark.slow  # `tests/test_autodiff.py` holds the engine to it.
def test_segments_bound_the_memory_of_long_runs():
    """Through 1,000 steps of Adam, as the compiler counts it; with -s it prints both."""
    steps, family = 1000, sinusoid()
    learned = base.learner(
        base.fixed(optax.adam(1e-3, eps_root=1e-8)), start=lambda key: family.init(key, None)
    )
    inner = Inner(family, learned, steps, stagger=False)

    def memory(segments):
        estimator = autodiff.truncated(inner, ON_QUERY, order="exact", segments=segments)
        theta, keys = learned.init(jax.random.key(0)), jax.random.split(jax.random.key(0), 1)
        stage = stage_of(float(steps))
        state = jax.eval_shape(estimator.init, keys, theta, stage)
        program = jax.jit(estimator.estimate).lower(theta, state, (), stage).compile()
        return program.memory_analysis().temp_size_in_bytes

    plain, segmented = memory(segments=False), memory(segments=True)
    print(f"{plain / 1e6:.1f} MB, in segments {segmented / 1e6:.1f}: 1/{plain / segmented:.1f}")
    assert plain > 15 * segmented
