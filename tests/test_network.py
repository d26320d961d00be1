"""The feature-major cell against haiku's own."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2l.optimizers.network import FeatureMajorLinear, FeatureMajorLSTM

INPUTS, HIDDEN, COLUMNS = 3, 4, 6


def network(core):
    return hk.without_apply_rng(hk.transform(core))


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("num_context", [0, 2])
def test_lstm_is_haikus_with_the_same_weights(num_context):
    ours = network(lambda x, s, c: FeatureMajorLSTM(HIDDEN, name="core")(x, s, c))
    theirs = network(lambda x, s: hk.LSTM(HIDDEN, name="core")(x, s))
    context = draw(num_context, seed=9) if num_context else None
    state = hk.LSTMState(draw(HIDDEN, COLUMNS, seed=1), draw(HIDDEN, COLUMNS, seed=2))
    weights = ours.init(jax.random.key(3), draw(INPUTS, COLUMNS), state, context)
    haiku_weights = {"core/linear": weights["core"]}
    haiku_state = jax.tree.map(jnp.transpose, state)
    initial = theirs.init(jax.random.key(3), draw(COLUMNS, INPUTS + num_context), haiku_state)
    assert jax.tree.map(jnp.shape, initial) == jax.tree.map(jnp.shape, haiku_weights)
    for step in range(3):
        x = draw(INPUTS, COLUMNS, seed=10 + step)
        rows = [x] if context is None else [x, jnp.tile(context[:, None], (1, COLUMNS))]
        out, state = ours.apply(weights, x, state, context)
        expected, haiku_state = theirs.apply(haiku_weights, jnp.concatenate(rows).T, haiku_state)
        np.testing.assert_allclose(out.T, expected, atol=1e-6)
        np.testing.assert_allclose(state.cell.T, haiku_state.cell, atol=1e-6)


def test_initial_weights_have_haikus_spread():
    ours = network(lambda x, s: FeatureMajorLSTM(64, name="core")(x, s))
    state = hk.LSTMState(jnp.zeros((64, 1)), jnp.zeros((64, 1)))
    weights = ours.init(jax.random.key(0), jnp.zeros((36, 1)), state)["core"]
    # A normal of deviation 1/√rows cut at two deviations has 0.88 of its deviation.
    assert np.std(weights["w"]) == pytest.approx(0.88 / np.sqrt(100), rel=0.02)
    assert np.max(np.abs(weights["w"])) <= 2 / np.sqrt(100) + 1e-6
    np.testing.assert_array_equal(weights["b"], np.zeros(4 * 64))


def test_linear_is_haikus_and_context_adds_a_constant():
    ours = network(lambda x, c: FeatureMajorLinear(2, name="out")(x, c))
    theirs = network(lambda x: hk.Linear(2, name="out")(x))
    x, context = draw(INPUTS, COLUMNS), draw(2, seed=1)
    weights = ours.init(jax.random.key(0), x, context)
    weights["out"]["v"] = draw(2, 2, seed=2)
    expected = theirs.apply({"out": {k: weights["out"][k] for k in "wb"}}, x.T).T
    out = ours.apply(weights, x, context)
    np.testing.assert_allclose(out, expected + (context @ weights["out"]["v"])[:, None], atol=1e-6)


def test_initial_state():
    def states():
        core = FeatureMajorLSTM(HIDDEN)
        return core.initial_state(None), core.initial_state(COLUMNS)

    one, many = network(states).apply({})
    assert one.cell.shape == (HIDDEN,)
    assert many.hidden.shape == (HIDDEN, COLUMNS)
