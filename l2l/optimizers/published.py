"""Published LSTM optimizers, for reference: L2L's (`dm`) and RNNprop (`rnnprop`)."""

import haiku as hk
import jax
import jax.numpy as jnp

from l2l.core import base
from l2l.optimizers import coordinates, features, ranges
from l2l.optimizers.network import FeatureMajorLinear, stack, zero_states


def dm(
    *, hidden_size: int = 20, layers: int = 2, p: float = 5.0, scale: float = 0.01
) -> base.LearnedOptimizer:
    """L2L's optimizer: LogAndSign(g) → LSTMs → linear, times `scale` (Andrychowicz et al. 2016).

    p: 10 in the paper, 5 in the authors' code, which made the published curves.

    Raises:
      UserError: a setting is out of range.
    """
    hidden_size, layers = _checked(hidden_size, layers, scale)
    ranges.positive("p", p)

    @hk.without_apply_rng
    @hk.transform
    def network(rows, states):
        columns, states = stack(rows, None, states, hidden_size, layers)
        return FeatureMajorLinear(1, name="out")(columns)[0], states

    def propose(theta, rows, context, hidden):
        del context
        out, hidden = network.apply(theta, rows, hidden)
        return scale * out, hidden

    rule = base.Rule(
        accumulators=lambda params, dtype: (),
        context=lambda step, num_steps: jnp.zeros((0,), jnp.float32),
        observe=lambda g, accumulators, params, step: (features.log_and_sign(g, p), accumulators),
        hidden=lambda theta, n: zero_states(hidden_size, layers, n, coordinates.dtype_of(theta)),
        propose=propose,
        features=("log |g|", "sign g"),
        rate=lambda theta, step, num_steps: scale,
    )

    return coordinates.optimizer(_initialiser(network, 2, hidden_size, layers), rule)


def rnnprop(
    *,
    hidden_size: int = 20,
    layers: int = 2,
    decay: float = 0.95,
    second_decay: float = 0.95,
    scale: float = 0.1,
    eps_root: float = 1e-8,
) -> base.LearnedOptimizer:
    """RNNprop: (m̂/√v̂, g/√v̂) → ELU → LSTMs → scale · tanh (Lv et al. 2017).

    Raises:
      UserError: a setting is out of range.
    """
    hidden_size, layers = _checked(hidden_size, layers, scale)
    ranges.decay("decay", decay)
    ranges.decay("second_decay", second_decay)
    ranges.not_negative("eps_root", eps_root)

    def observe(gradient, moments, params, step):
        del params
        moments, hat = features.update_moments(
            gradient, moments, step, decays=(decay,), second_decay=second_decay
        )
        root = features.root(hat.nu, eps_root)
        return jnp.stack([hat.mu[0] / root, gradient / root]), moments

    @hk.without_apply_rng
    @hk.transform
    def network(rows, states):
        columns = jax.nn.elu(FeatureMajorLinear(hidden_size, name="preprocess")(rows))
        columns, states = stack(columns, None, states, hidden_size, layers)
        return jnp.tanh(FeatureMajorLinear(1, name="out")(columns)[0]), states

    def propose(theta, rows, context, hidden):
        del context
        out, hidden = network.apply(theta, rows, hidden)
        return -scale * out, hidden

    rule = base.Rule(
        accumulators=lambda params, dtype: features.zero_moments(1, base.count(params), dtype),
        context=lambda step, num_steps: jnp.zeros((0,), jnp.float32),
        observe=observe,
        hidden=lambda theta, n: zero_states(hidden_size, layers, n, coordinates.dtype_of(theta)),
        propose=propose,
        features=("m̂/√v̂", "g/√v̂"),
        rate=lambda theta, step, num_steps: scale,
    )

    return coordinates.optimizer(_initialiser(network, 2, hidden_size, layers), rule)


def _checked(hidden_size, layers, scale) -> tuple[int, int]:
    """(hidden_size, layers) of a network, and a scale of its output, in range."""
    ranges.positive("scale", scale)
    return ranges.whole("hidden_size", hidden_size), ranges.whole("layers", layers)


def _initialiser(network, inputs, hidden_size, layers):
    def init(key):
        state = zero_states(hidden_size, layers, 1, jnp.float32)
        return network.init(key, jnp.zeros((inputs, 1), jnp.float32), state)

    return init
