"""Features against optax's own moments, and their derivatives where gradients have been zero."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.optimizers import features
from l2l.optimizers.lstm import lstm
from l2l.optimizers.published import dm, rnnprop

DECAYS, SECOND = (0.9, 0.99, 0.999), 0.999


def gradients(steps, size=24):
    """Of many sizes, some of them always zero."""
    scales = 10.0 ** jnp.linspace(-6, 3, size)[None]
    return (jax.random.normal(jax.random.key(0), (steps, size)) * scales).at[:, ::7].set(0.0)


def test_moments_are_optax_own():
    moments = features.zero_moments(len(DECAYS), 24)
    adams = [optax.scale_by_adam(b1, SECOND, eps_root=1e-8) for b1 in DECAYS]
    states = [adam.init(jnp.zeros(24)) for adam in adams]
    for step, gradient in enumerate(gradients(30)):
        moments, hat = features.update_moments(
            gradient, moments, jnp.int32(step), decays=DECAYS, second_decay=SECOND
        )
        ours = hat.mu / features.root(hat.nu, 1e-8)[None]
        for i, adam in enumerate(adams):
            theirs, states[i] = adam.update(gradient, states[i])
            np.testing.assert_allclose(ours[i], theirs, rtol=3e-7)
            np.testing.assert_array_equal(moments.mu[i], states[i].mu)
            np.testing.assert_array_equal(moments.nu, states[i].nu)
            mu_hat = optax.tree.bias_correction(states[i].mu, DECAYS[i], states[i].count)
            np.testing.assert_array_equal(hat.mu[i], mu_hat)


@pytest.mark.parametrize("step, count", [(0, 1), (9, 10), (99_999, 100_000)])
def test_bias_correction_of_a_constant_gradient_is_that_gradient(step, count):
    # With g constant, m_t = (1 − d^t) g, which the correction turns back into g.
    gradient = jnp.asarray([1e-3, -2.0])
    before = features.Moments(
        jnp.stack([(1 - d ** (count - 1)) * gradient for d in DECAYS]),
        (1 - SECOND ** (count - 1)) * gradient**2,
    )
    _, hat = features.update_moments(
        gradient, before, jnp.int32(step), decays=DECAYS, second_decay=SECOND
    )
    np.testing.assert_allclose(hat.mu, jnp.stack([gradient] * 3), rtol=1e-4)
    np.testing.assert_allclose(hat.nu, gradient**2, rtol=1e-4)


@pytest.mark.parametrize("learned", [lstm(inputs=("momentum", "gradient", "scale")), rnnprop()])
def test_features_have_a_derivative_where_every_gradient_was_zero(learned):
    rule, params = learned.rule, jnp.zeros(3)

    def total(gradient):
        accumulators = rule.accumulators(params, jnp.float32)
        for step in range(3):
            rows, accumulators = rule.observe(gradient, accumulators, params, jnp.int32(step))
        return jnp.sum(rows)

    slope = jax.grad(total)(jnp.asarray([0.0, 1e-12, 1.0]))
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize("eps_root, finite", [(0.0, False), (1e-8, True)])
def test_eps_root_is_what_keeps_it_finite(eps_root, finite):
    slope = jax.grad(lambda nu: features.root(nu, eps_root))(0.0)
    assert np.isfinite(slope) == finite


def test_log_and_sign_closed_form():
    p = 5.0
    edge = np.exp(-p)
    gradient = jnp.asarray([0.0, 1e-30, 0.5 * edge, 1.01 * edge, -1.0, 20.0, -0.1 * edge])
    expected = np.array(
        [
            [-1, -1, -1, np.log(1.01 * edge) / p, 0, np.log(20) / p, -1],
            [0, 1e-30 / edge, 0.5, 1, -1, 1, -0.1],
        ]
    )
    np.testing.assert_allclose(features.log_and_sign(gradient, p), expected, rtol=1e-5, atol=1e-7)
    slope = jax.jacobian(lambda g: features.log_and_sign(g, p))(gradient)
    assert np.all(np.isfinite(slope))


def test_time_context():
    def context(*told):
        return np.asarray(features.time_context(*map(jnp.int32, told)))

    np.testing.assert_array_equal(context(50, 100)[[0, -1]], [0.5, 1])
    np.testing.assert_array_equal(context(100, 100)[0], context(7_000, 100)[0])
    unknown = context(50, 0)
    assert unknown[0] == unknown[-1] == 0
    assert np.all(np.abs(context(10**8, 10**9)) <= 1)


@pytest.mark.parametrize("learned", [lstm(), dm(), rnnprop()])
def test_every_row_has_a_name(learned):
    rule, params = learned.rule, jnp.ones(5)
    rows, _ = rule.observe(params, rule.accumulators(params, jnp.float32), params, jnp.int32(0))
    assert rows.shape == (len(rule.features), 5)
