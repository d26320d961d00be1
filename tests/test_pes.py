"""Evolution strategies against closed forms on quadratics."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base, unroll
from l2l.core.unroll import Inner
from l2l.estimators import autodiff, pes
from l2l.estimators.objective import Objective

RATE, CURVATURES, HORIZON, LENGTH = 0.05, np.array([1.0, 4.0]), 12, 4


def bowl() -> base.TaskFamily:
    """ℓ = Σ ½ a x² from x₀ = 1, without any randomness: runs differ by their noise alone."""
    return base.TaskFamily(
        sample=lambda key: jnp.asarray(CURVATURES, jnp.float32),
        init=lambda key, problem: {"x": jnp.ones(2)},
        batch=lambda key, problem, data, split: (),
        loss=lambda params, problem, batch: jnp.sum(0.5 * problem * params["x"] ** 2),
    )


def sgd() -> base.LearnedOptimizer:
    return base.lift(
        lambda key: jnp.log(jnp.float32(RATE)), lambda log_rate: optax.sgd(jnp.exp(log_rate))
    )


def nudge() -> base.LearnedOptimizer:
    """Adds theta [2] at every step: meta-losses of `bowl` are then quadratic in theta."""

    def make(theta):
        return optax.GradientTransformation(
            lambda params: (), lambda updates, state, params=None: ({"x": theta}, state)
        )

    return base.lift(lambda key: jnp.array([-0.1, 0.05]), make)


def stage_of(horizon=HORIZON):
    return base.Stage(jnp.float32(horizon), jnp.float32(horizon), jnp.float32(0))


def truth():
    """d/d log α of the mean loss of a run.

    SGD on ½ a x²: xₜ = (1 − αa)ᵗ x₀, so ℓₜ = ½ a (1 − αa)²ᵗ x₀² and
    α dℓₜ/dα = −α a² t (1 − αa)²ᵗ⁻¹ x₀².
    """
    t, a = np.arange(1, HORIZON + 1)[:, None], CURVATURES[None]
    return np.mean(np.sum(-RATE * a**2 * t * (1 - RATE * a) ** (2 * t - 1), axis=1))


def run_averages(make, num_problems):
    """The mean gradient over the windows of one run, for each problem."""
    inner = Inner(bowl(), sgd(), LENGTH, stagger=False)
    estimator, theta = make(inner), sgd().init(None)

    def run(keys):
        def step(state, _):
            gradients, state, _ = estimator.estimate(theta, state, (), stage_of())
            return state, gradients

        state = estimator.init(keys, theta, stage_of())
        return jnp.mean(jax.lax.scan(step, state, None, HORIZON // LENGTH)[1], 0)

    return np.asarray(jax.jit(run)(jax.random.split(jax.random.key(0), num_problems)), np.float64)


def test_persistent_is_unbiased_and_truncated_is_not():
    """Against the closed form, within four standard errors of the sample's own spread."""
    exact = truth()
    draws = run_averages(lambda inner: pes.pes(inner, Objective(form="plain")), 4096)
    error = draws.std(ddof=1) / np.sqrt(len(draws))
    truncated = run_averages(
        lambda inner: autodiff.truncated(inner, Objective(form="plain"), order="exact"), 1
    )[0]
    forgetful = run_averages(
        lambda inner: pes.pes(inner, Objective(form="plain"), persistent=False), 4096
    )
    # Seen: truth -0.554, PES -0.550 ± 0.011, ES -0.357, truncated backpropagation -0.359.
    assert abs(draws.mean() - exact) < 4 * error
    assert abs(truncated - exact) > 10 * error
    # Without the sum of noise the same code estimates the truncated gradient.
    error = forgetful.std(ddof=1) / np.sqrt(len(forgetful))
    assert abs(forgetful.mean() - truncated) < 4 * error + 1e-3 * abs(truncated)
    assert abs(forgetful.mean() - exact) > 10 * error


def estimates(noise, num_windows, **settings):
    """The gradients [num_windows, 2] of one run of `nudge` on `bowl`, and its key."""
    inner = Inner(bowl(), nudge(), LENGTH, stagger=False)
    theta, key, stage = nudge().init(None), jax.random.key(7), stage_of()
    estimator = pes.pes(inner, Objective(form="plain"), sigma=0.1, noise=noise, **settings)
    state, out = estimator.init(key[None], theta, stage), []
    for _ in range(num_windows):
        gradients, state, _ = estimator.estimate(theta, state, (), stage)
        out.append(np.asarray(gradients[0]))
    return np.stack(out)


def whole(windows):
    """Gradients of the mean losses of windows 1 … n of a run in theta, x = 1 + t θ at step t."""
    theta, out = np.asarray(nudge().init(None), np.float64), []
    for w in range(windows):
        t = np.arange(w * LENGTH + 1, (w + 1) * LENGTH + 1)[:, None]
        out.append(np.mean(CURVATURES * (1 + t * theta) * t, axis=0))
    return np.stack(out)


def test_an_orthonormal_frame_makes_one_window_exact():
    """With ε = √n eᵢ for problem i of n the covariance is I: exact on quadratics."""
    frame = jnp.sqrt(2.0) * jnp.eye(2)
    draws = [estimates(lambda key, theta, row=row: row, 1) for row in frame]
    np.testing.assert_allclose(np.mean(draws, 0), whole(1), rtol=2e-4)


def test_the_noise_of_all_windows_adds_up_to_the_whole_derivative():
    """All signs of ε over three windows and both directions: E[ε_v ε_wᵀ] = δ_vw I, exactly."""
    run = jax.random.fold_in(jax.random.key(7), unroll.NOISE)
    marks = [jax.random.key_data(jax.random.fold_in(run, w * LENGTH)) for w in range(3)]
    draws = []
    for direction in np.sqrt(2.0) * np.eye(2):
        for signs in np.ndindex(2, 2, 2):

            def noise(key, theta, direction=direction, signs=signs):
                met = jnp.stack([jnp.all(jax.random.key_data(key) == mark) for mark in marks])
                sign = jnp.sum(jnp.where(met, 1 - 2 * jnp.asarray(signs), 0))
                return jnp.asarray(direction, jnp.float32) * sign.astype(jnp.float32)

            draws.append(estimates(noise, 3))
    np.testing.assert_allclose(np.mean(draws, 0), whole(3), rtol=2e-3)


def pair_after(theta, windows, length=LENGTH, horizon=HORIZON, **settings):
    inner = Inner(bowl(), sgd(), length, stagger=False)
    estimator = pes.pes(inner, Objective(form="plain"), **settings)
    step, keys = jax.jit(estimator.estimate), jax.random.split(jax.random.key(0), 2)
    states = [estimator.init(keys, theta, stage_of(horizon))]
    for _ in range(windows):
        states.append(step(theta, states[-1], (), stage_of(horizon))[1])
    return states, step


def test_noise_is_summed_over_a_run_and_forgotten_with_it():
    theta = sgd().init(None)
    states, _ = pair_after(theta, 4, sigma=0.1)
    xi = np.stack([np.asarray(state.xi) for state in states])
    key = states[1].pair.key[0, 0]

    def draw(run, step):
        key = jax.random.fold_in(jax.random.fold_in(run, unroll.NOISE), step)
        return 0.1 * pes.gaussian(key, theta)

    expected = np.cumsum([draw(key, 0), draw(key, 4), draw(key, 8)])
    np.testing.assert_allclose(xi[1:4, 0], expected, rtol=1e-5)
    following = jax.random.fold_in(key, unroll.NEXT)  # The run is over: a new one, a new sum.
    np.testing.assert_allclose(xi[4, 0], draw(following, 0), rtol=1e-5)
    assert xi[1, 0] != xi[1, 1]


def test_twins_are_renewed_together():
    """One of them has left the finite numbers: both begin again, with the same key."""
    theta = sgd().init(None)
    states, step = pair_after(theta, 1)
    pair = states[1].pair
    x = pair.params["x"].at[0, 1, 0].set(jnp.nan)
    broken = states[1]._replace(pair=pair._replace(params={"x": x}))
    gradients, after, _ = step(theta, broken, (), stage_of())
    np.testing.assert_array_equal(after.pair.step, [[LENGTH] * 2, [2 * LENGTH] * 2])
    keys = jax.random.key_data(after.pair.key)
    np.testing.assert_array_equal(keys[:, 0], keys[:, 1])
    assert np.isfinite(gradients).all()


def test_twins_see_the_same_batches():
    """Where the loss is noise alone, common random numbers leave no gradient at all."""
    family = bowl()._replace(
        batch=lambda key, problem, data, split: jax.random.normal(key),
        loss=lambda params, problem, batch: batch + 0.0 * jnp.sum(params["x"]),
    )
    estimator = pes.pes(Inner(family, sgd(), LENGTH), Objective("both", "plain"))
    theta, keys = sgd().init(None), jax.random.split(jax.random.key(0), 3)
    state = estimator.init(keys, theta, stage_of())
    gradients, _, metrics = estimator.estimate(theta, state, (), stage_of())
    assert np.std(metrics["meta_loss"]) > 0.05
    np.testing.assert_array_equal(gradients, np.zeros(3))


def test_the_lowest_loss_is_of_either_twin():
    """x = 1 + t (θ ± σ ε) after t steps."""
    inner = Inner(bowl(), nudge(), LENGTH, stagger=False)
    theta, stage, epsilon = nudge().init(None), stage_of(), np.array([3.0, -1.0])
    estimator = pes.pes(
        *(inner, Objective(form="plain")),
        sigma=0.1,
        noise=lambda key, theta: jnp.asarray(epsilon, jnp.float32),
    )
    state = estimator.init(jax.random.key(0)[None], theta, stage)
    t = np.arange(1, LENGTH + 1)[:, None]
    twins = [1 + t * (np.asarray(theta) + sign * epsilon) for sign in (0.1, -0.1)]
    lows = [np.min(np.sum(0.5 * CURVATURES * x**2, axis=1)) for x in twins]
    assert min(lows) < 0.9 * max(lows)
    lowest = jax.jit(estimator.estimate)(theta, state, (), stage)[2]["lowest"]
    np.testing.assert_allclose(lowest, [min(lows)], rtol=1e-5)


def test_sigma_zero_is_refused():
    with pytest.raises(ValueError, match=r"sigma=0 perturbs nothing"):
        pes.pes(Inner(bowl(), sgd(), LENGTH), Objective(), sigma=0)
