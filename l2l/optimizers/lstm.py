"""LSTM optimizers: ours (`lstm`), L2L's (`dm`) and RNNprop (`rnnprop`).

Each is a `Rule` (what it observes, and a haiku network that proposes) with an initialiser.
"""

from collections.abc import Sequence

import haiku as hk
import jax
import jax.numpy as jnp

from l2l import base, features
from l2l.optimizers import coordinates
from l2l.optimizers.network import FeatureMajorLinear, FeatureMajorLSTM


def lstm(
    *,
    hidden_size: int = 8,
    layers: int = 1,
    learning_rate: float = 1e-3,
    decays: Sequence[float] = (0.9, 0.99, 0.999),
    second_decay: float = 0.999,
    eps_root: float = 1e-8,
    weight_decay: float = 0.0,
    inputs: Sequence[str] = ("momentum", "gradient", "parameter"),
    output: str = "residual",
) -> base.LearnedOptimizer:
    """A small LSTM that corrects a nominal Adam step (after STAR, Harrison et al. 2022).

    With a, b the network's outputs, zero at first, so that untrained it is
    `optax.adamw(learning_rate, decays[0], second_decay, eps_root=…, weight_decay=…)`:

        u = −exp(λ) · (exp(a) · (m̂/(√(v̂ + eps_root) + eps) + b) + weight_decay · θ)

    Args:
      hidden_size, layers: of the LSTM; each coordinate carries 2 · hidden_size · layers numbers.
      learning_rate: exp(λ) at the start; λ is learned.
      decays: of the first moments; the first is the nominal Adam's b1.
      second_decay: of the second moment (b2).
      eps_root: in every root, of the features and of the nominal step.
      inputs: any of "momentum" (m̂/√v̂ at every decay), "gradient" (g/√v̂), "parameter" (θ, clipped
        to ±1), "scale" (log √v̂, scaled).
      output: "residual" as above; "step" has no exp(a) (the correction adds and never rescales);
        "direct" has no nominal step: −exp(λ) · b.
    """
    known = ("momentum", "gradient", "parameter", "scale")
    if unknown := set(inputs) - set(known):
        raise ValueError(f"Unknown inputs {sorted(unknown)}: choose from {', '.join(known)}.")
    if output not in ("residual", "step", "direct"):
        raise ValueError(f"Unknown output {output!r}: choose residual, step or direct.")
    decays = tuple(decays)
    names = [f"m̂({d:g})/√v̂" for d in decays] + ["g/√v̂", "clipped θ", "log √v̂"]
    groups = ["momentum"] * len(decays) + ["gradient", "parameter", "scale"]
    shown = [i for i, group in enumerate(groups) if group in inputs]
    # Behind what the network sees come the two rows that the output formula needs.
    nominal, position = len(shown), len(shown) + 1

    def observe(gradient, moments, params, step):
        moments, hat = features.update_moments(
            gradient, moments, step, decays=decays, second_decay=second_decay
        )
        root = features.root(hat.nu, eps_root)
        momentum = hat.mu / root[None]
        rows = [
            *momentum,
            gradient / root,
            jnp.clip(params, -1.0, 1.0),
            jnp.log(root) / 10.0,
        ]
        return jnp.stack([*(rows[i] for i in shown), momentum[0], params]), moments

    @hk.without_apply_rng
    @hk.transform
    def network(rows, context, states):
        columns, states = _stack(rows, context, states, hidden_size, layers)
        return FeatureMajorLinear(2, jnp.zeros, name="out")(columns, context), states

    def propose(theta, rows, context, hidden):
        out, hidden = network.apply(theta["network"], rows[:nominal], context, hidden)
        scale, shift = out
        if output == "residual":
            step = jnp.exp(scale) * (rows[nominal] + shift)
        else:
            step = shift + (rows[nominal] if output == "step" else 0.0)
        if weight_decay:
            step = step + weight_decay * rows[position]
        return -jnp.exp(theta["log_learning_rate"]) * step, hidden

    def init(key):
        rows, context = jnp.zeros((nominal, 1)), jnp.zeros((features.NUM_CONTEXT,))
        weights = network.init(key, rows, context, _zeros(hidden_size, layers, 1, jnp.float32))
        return {
            "network": weights,
            "log_learning_rate": jnp.log(jnp.asarray(learning_rate, jnp.float32)),
        }

    rule = base.Rule(
        statistics=lambda params, dtype: features.zero_moments(
            len(decays), base.count(params), dtype
        ),
        context=features.time_context,
        observe=observe,
        hidden=lambda theta, n: _zeros(hidden_size, layers, n, coordinates.dtype_of(theta)),
        propose=propose,
        features=(*(names[i] for i in shown), "nominal step", "θ"),
    )
    return coordinates.optimizer(init, rule)


def dm(
    *, hidden_size: int = 20, layers: int = 2, p: float = 5.0, scale: float = 0.01
) -> base.LearnedOptimizer:
    """L2L's optimizer: LogAndSign(g) → LSTMs → linear, times `scale` (Andrychowicz et al. 2016).

    p: 10 in the paper, 5 in the authors' code, which made the published curves.
    """

    @hk.without_apply_rng
    @hk.transform
    def network(rows, states):
        columns, states = _stack(rows, None, states, hidden_size, layers)
        return FeatureMajorLinear(1, name="out")(columns)[0], states

    def propose(theta, rows, context, hidden):
        del context
        out, hidden = network.apply(theta, rows, hidden)
        return scale * out, hidden

    rule = base.Rule(
        statistics=lambda params, dtype: (),
        context=lambda step, num_steps: jnp.zeros((0,)),
        observe=lambda g, statistics, params, step: (features.log_and_sign(g, p), statistics),
        hidden=lambda theta, n: _zeros(hidden_size, layers, n, coordinates.dtype_of(theta)),
        propose=propose,
        features=("log |g|", "sign g"),
    )

    def init(key):
        return network.init(key, jnp.zeros((2, 1)), _zeros(hidden_size, layers, 1, jnp.float32))

    return coordinates.optimizer(init, rule)


def rnnprop(
    *,
    hidden_size: int = 20,
    layers: int = 2,
    decay: float = 0.95,
    second_decay: float = 0.95,
    scale: float = 0.1,
    eps_root: float = 1e-8,
) -> base.LearnedOptimizer:
    """RNNprop: (m̂/√v̂, g/√v̂) → ELU → LSTMs → scale · tanh (Lv et al. 2017)."""

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
        columns, states = _stack(columns, None, states, hidden_size, layers)
        return jnp.tanh(FeatureMajorLinear(1, name="out")(columns)[0]), states

    def propose(theta, rows, context, hidden):
        del context
        out, hidden = network.apply(theta, rows, hidden)
        return -scale * out, hidden

    rule = base.Rule(
        statistics=lambda params, dtype: features.zero_moments(1, base.count(params), dtype),
        context=lambda step, num_steps: jnp.zeros((0,)),
        observe=observe,
        hidden=lambda theta, n: _zeros(hidden_size, layers, n, coordinates.dtype_of(theta)),
        propose=propose,
        features=("m̂/√v̂", "g/√v̂"),
    )

    def init(key):
        return network.init(key, jnp.zeros((2, 1)), _zeros(hidden_size, layers, 1, jnp.float32))

    return coordinates.optimizer(init, rule)


def _stack(columns, context, states, hidden_size, layers):
    out = []
    for i in range(layers):
        core = FeatureMajorLSTM(hidden_size, name=f"lstm_{i}")
        columns, state = core(columns, states[i], context if i == 0 else None)
        out.append(state)
    return columns, tuple(out)


def _zeros(hidden_size, layers, n, dtype):
    zeros = jnp.zeros((hidden_size, n), dtype)
    return tuple(hk.LSTMState(zeros, zeros) for _ in range(layers))
