"""What an optimizer sees of whole tensors, against numpy, and how it reaches their coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2l.optimizers import coordinates, per_tensor_signals
from l2l.optimizers.by_parameter import by_parameter
from l2l.optimizers.lstm import lstm

LEARNED = lstm(hidden_size=2, tensor_size=3, eps_root=1e-30)
RULE = LEARNED.rule
NAMES = per_tensor_signals.features_of(3)
SHAPES = {"a": (7, 5), "b": (5,), "c": (2, 3, 4), "empty": (0, 4), "z": (40,)}
SIZES = tuple(int(np.prod(shape)) for shape in SHAPES.values())
ALL = tuple(SHAPES.values())
STEPS = 12


def parameters():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in SHAPES.items()}
    return {**params, "b": jnp.zeros(5)}


def gradients(scale=1.0):
    """[STEPS, P]: noise with a drift that differs from tensor to tensor; none at all for z."""
    noise = np.random.default_rng(1).normal(size=(STEPS, sum(SIZES)))
    drift = np.repeat([0.0, 3.0, 1.0, 0.0, 0.0], SIZES)
    alive = np.repeat([1.0, 1.0, 1.0, 1.0, 0.0], SIZES)
    return jnp.asarray(scale * alive * (noise + drift), jnp.float32)


def watch(scale=1.0):
    """What is seen at every step, {name: [STEPS, G]}, parameters growing by 10 % a step."""
    params = parameters()
    state = coordinates.start(RULE, LEARNED.init(jax.random.key(0)), params)
    flat = coordinates.flatten(params, jnp.float32)

    @jax.jit
    def step(state, xs):
        i, g = xs
        p = flat * 1.1**i
        (_, seen), after, _ = coordinates.look(RULE, g, p, state, ALL)
        _, accumulators = RULE.observe(g, state.accumulators, p, state.step)
        state = state._replace(
            step=state.step + 1, accumulators=accumulators, tensors=(after, state.tensors[1])
        )
        return state, seen

    seen = jax.lax.scan(step, state, (jnp.arange(STEPS), gradients(scale)))[1]
    return {name: np.asarray(seen[:, i]) for i, name in enumerate(NAMES)}


def test_what_is_seen_is_what_numpy_pools():
    seen, g = watch(), np.asarray(gradients(), np.float64)
    mu, nu, cosine = np.zeros_like(g[0]), np.zeros_like(g[0]), np.zeros((2, len(SIZES)))
    cut = np.cumsum(SIZES)[:-1]
    for t in range(STEPS):
        if t:
            m, v = mu / (1 - 0.9**t), np.maximum(nu / (1 - 0.999**t), 1e-30)
            for i, (a, b, c) in enumerate(
                zip(*(np.split(x, cut) for x in (m, v, g[t])), strict=True)
            ):
                if not a.any():
                    continue
                steady = np.sqrt(np.mean(a**2 / b))
                np.testing.assert_allclose(seen["rms m̂/√v̂ 0"][t, i], min(steady, 3), rtol=1e-4)
                ahead = np.mean(c**2 / b)
                np.testing.assert_allclose(
                    seen["rms g/√v̂"][t, i], np.tanh(0.5 * np.log(ahead)), rtol=1e-3, atol=1e-4
                )
                now = np.mean(a * c / b) / (np.sqrt(ahead) * steady)
                cosine[:, i] = cosine[:, i] * [0.9, 0.99] + now * np.array([0.1, 0.01])
        np.testing.assert_allclose(
            [seen["alignment, fast"][t], seen["alignment, slow"][t]], cosine, rtol=1e-3, atol=1e-5
        )
        mu, nu = 0.9 * mu + 0.1 * g[t], 0.999 * nu + 0.001 * g[t] ** 2
    # A drift is told from noise: b has one three times as large as the noise, a has none.
    assert seen["alignment, fast"][-1, 1] > 0.4 > 0.2 > abs(seen["alignment, fast"][-1, 0])
    sizes = [np.sqrt(np.mean(np.square(x))) if x.size else 0 for x in parameters().values()]
    expected = (0.5 * np.log(np.square(sizes) + per_tensor_signals.SMALLEST**2) + 2) / 2
    np.testing.assert_allclose(seen["rms θ"][0], expected, rtol=1e-5)
    growth = np.tanh(0.1 * np.log(1.1) * 10 * (STEPS - 1))
    np.testing.assert_allclose(seen["growth of rms θ"][-1, 0], growth, rtol=1e-3)
    np.testing.assert_array_equal(seen["vector"][0], [0, 1, 0, 0, 1])


def test_all_tensors_together_are_the_mean_over_coordinates():
    seen = watch()
    for name in NAMES:
        if name.startswith("all tensors: "):
            own = seen[name.removeprefix("all tensors: ")]
            mean = own @ (np.array(SIZES) / sum(SIZES))
            np.testing.assert_allclose(
                seen[name], np.repeat(mean[:, None], len(SIZES), 1), atol=1e-5
            )


def test_a_loss_times_a_number_looks_the_same():
    one, other = watch(), watch(2.0**10)
    for name in NAMES:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_everything_seen_is_bounded():
    for scale in (0.0, 1e-12, 1e12):
        assert max(np.max(np.abs(x)) for x in watch(scale).values()) < 4


def test_signals_reach_the_coordinates_of_their_tensor_whatever_the_block():
    signals = jnp.arange(2.0 * len(SIZES)).reshape(2, -1)
    rows = jnp.ones((1, sum(SIZES)))
    expected = np.repeat(np.asarray(signals), SIZES, axis=1)
    np.testing.assert_array_equal(coordinates.below(rows, (), signals, ALL)[1:], expected)
    for start in (0, 20, 33, 60):
        block = coordinates.below(rows[:, :16], (), signals, ALL, jnp.int32(start))
        np.testing.assert_array_equal(block[1:], expected[:, start : start + 16])


def test_untrained_they_leave_the_rate_alone_and_ask_for_a_decay_of_one_in_fifty():
    """0.02 of the rate: the logistic function of −4. What the network asks for moves it from
    there."""
    theta, tensors = LEARNED.init(jax.random.key(0)), RULE.tensors
    rows, context = jnp.ones((len(NAMES), 2)), RULE.context(jnp.int32(0), jnp.int32(9))
    signals, _ = tensors.propose(theta, rows, context, tensors.hidden(theta, 2))
    wanted = np.zeros((per_tensor_signals.NUM_SIGNALS, 2))
    wanted[1] = 1 / (1 + np.exp(4))
    np.testing.assert_allclose(signals, wanted, rtol=1e-5)


def test_blocks_change_nothing():
    theta = LEARNED.init(jax.random.key(0))
    theta = jax.tree.map(lambda x: x + 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), theta)

    def run(block):
        transform = coordinates.bind(RULE, theta, block)
        params = parameters()

        def step(carry, g):
            params, state = carry
            updates, state = transform.update(
                coordinates.unflatten(g, params), state, params, num_steps=STEPS
            )
            return (jax.tree.map(jnp.add, params, updates), state), updates

        return jax.jit(lambda: jax.lax.scan(step, (params, transform.init(params)), gradients()))()

    whole, blocks = run(None), run(16)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), whole, blocks)


def test_it_does_not_share_parameters_with_others():
    parts = {"lstm": LEARNED, "other": lstm(hidden_size=2)}
    with pytest.raises(ValueError, match=r"\['lstm'\] have no coordinatewise rule"):
        by_parameter(parts, [("a", "lstm"), ("", "other")])
