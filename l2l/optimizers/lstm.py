"""LSTM optimizers: ours (`lstm`), L2L's (`dm`) and RNNprop (`rnnprop`).

Each is a `Rule` (what it observes, and a haiku network that proposes) with an initialiser.
"""

from collections.abc import Sequence
from functools import partial

import haiku as hk
import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import coordinates, features, soap_coordinates
from l2l.optimizers.network import FeatureMajorLinear, FeatureMajorLSTM
from l2l.optimizers.per_tensor_signals import NUM_SIGNALS, tensor_signals

# The rate of a coordinate stays within a factor exp(±REACH) of the common one.
REACH = 3.0
# With an LSTM over whole tensors, which knows better how far it may go: 0.003 times e^±4 spans the
# rates at which Adam does best on anything.
TENSOR_REACH = 4.0
LONG_AGES, LONG_LENGTHS = (10.0, 100.0, 1000.0), (300.0, 3000.0)
# What is left of an annealed rate at the horizon and after it.
ANNEALED = 0.01


def lstm(
    *,
    hidden_size: int = 8,
    layers: int = 1,
    learning_rate: float = 1e-3,
    decays: Sequence[float] = (0.9, 0.99, 0.999),
    second_decay: float = 0.999,
    eps_root: float = 1e-8,
    weight_decay: float = 0.0,
    inputs: Sequence[str] = ("momentum", "gradient"),
    output: str = "mixture",
    tensor_size: int = 0,
    matrix_size: int = 0,
    anneal: float = 0.0,
) -> base.LearnedOptimizer:
    """A small LSTM that corrects a nominal Adam step (after STAR, Harrison et al. 2022).

    With a, b the network's outputs, zero at first, so that untrained it is
    `optax.adamw(learning_rate, decays[0], second_decay, eps_root=…, weight_decay=…)`:

        u = −exp(λ) · (exp(a) · (m̂/(√(v̂ + eps_root) + eps) + b · r) + weight_decay · θ)

    where |a| < REACH and |b| < 1 (each through a tanh of slope 1 at 0: without bounds a few runs in
    a hundred jump), and r are the normalised moments at every decay and the normalised gradient:
    the correction is a mixture of directions in which the loss has been seen to fall.

    Args:
      hidden_size, layers: of the LSTM; each coordinate carries 2 · hidden_size · layers numbers.
      learning_rate: exp(λ) at the start; λ is learned.
      decays: of the first moments; the first is the nominal Adam's b1.
      second_decay: of the second moment (b2).
      eps_root: in every root, of the features and of the nominal step.
      inputs: any of "momentum" (m̂/√v̂ at every decay), "gradient" (g/√v̂), "parameter" (θ, clipped
        to ±1), "scale" (log √v̂, scaled).
      output: "mixture" as above; "scale" has no b (Adam whose rate is learned coordinate by
        coordinate); "residual" has a free b in place of b · r.
      tensor_size: of a second LSTM, which sees whole tensors (`per_tensor_signals.py`) and moves a
        with them; 0 for none. |a| may then reach TENSOR_REACH, the context tells longer runs apart,
        and each tensor has a weight decay of its own beside `weight_decay`.
      matrix_size: the nominal step is SOAP's direction (`soap_coordinates.py`), for matrices whose
        sides are at most this long, in place of m̂/√v̂, which stays one of r; 0 for none. Untrained
        it then is SOAP with Nesterov's momentum and the length of NAdam's step.
      anneal: the rate is times ((1 + cos(π t/T))/2 + ANNEALED)^p where the horizon T is known; p is
        learned from this on. 0 for a rate that only the network lowers.
    """
    known = ("momentum", "gradient", "parameter", "scale")
    if unknown := set(inputs) - set(known):
        raise UserError(f"Unknown inputs {sorted(unknown)}: choose from {', '.join(known)}.")
    if output not in ("mixture", "scale", "residual"):
        raise UserError(f"Unknown output {output!r}: choose mixture, scale or residual.")
    decays = tuple(decays)
    names = [f"m̂({d:g})/√v̂" for d in decays] + ["g/√v̂", "clipped θ", "log √v̂"]
    groups = ["momentum"] * len(decays) + ["gradient", "parameter", "scale"]
    num_directions = len(decays) + 1
    seen = [i for i, group in enumerate(groups) if group in inputs]
    num_directions += bool(matrix_size)
    num_outputs = {"mixture": 1 + num_directions, "scale": 1, "residual": 2}[output]

    whole, whole_init, clock, matrices = None, None, features.time_context, None
    if matrix_size:
        matrices = soap_coordinates.soap_direction(
            largest=matrix_size, decay=decays[0], second_decay=second_decay, eps_root=eps_root
        )
    num_matrix = len(matrices.names) if matrices else 0
    if tensor_size:
        whole, whole_init = tensor_signals(
            hidden_size=tensor_size,
            decays=decays,
            second_decay=second_decay,
            eps_root=eps_root,
            further=soap_coordinates.PER_TENSOR if matrix_size else 0,
        )
        clock = partial(features.time_context, ages=LONG_AGES, lengths=LONG_LENGTHS)
    reach = TENSOR_REACH if tensor_size else REACH

    def observe(gradient, moments, params, step):
        moments, hat = features.update_moments(
            gradient, moments, step, decays=decays, second_decay=second_decay
        )
        root = features.root(hat.nu, eps_root)
        rows = [
            *(hat.mu / root[None]),
            gradient / root,
            jnp.clip(params, -1.0, 1.0),
            jnp.log(root) / 10.0,
            params,
        ]
        return jnp.stack(rows), moments

    @hk.without_apply_rng
    @hk.transform
    def network(rows, context, states):
        columns, states = _stack(rows, context, states, hidden_size, layers)
        return FeatureMajorLinear(num_outputs, jnp.zeros, name="out")(columns, context), states

    def propose(theta, rows, context, hidden):
        # The rows the network sees stand first unless the inputs were chosen otherwise.
        shown = rows[: len(seen)] if seen == list(range(len(seen))) else rows[jnp.array(seen)]
        soaps, signals = jnp.split(rows[len(names) + 1 :], [num_matrix])
        shown = jnp.concatenate([shown, soaps, signals[2:]])
        out, hidden = network.apply(theta["network"], shown, context, hidden)
        size = out[0] + signals[0] if tensor_size else out[0]
        step = soaps[0] if matrix_size else rows[0]
        if output == "mixture":
            directions = jnp.concatenate([rows[: len(decays) + 1], soaps])
            step = step + jnp.sum(jnp.tanh(out[1:]) * directions, 0)
        elif output == "residual":
            step = step + jnp.tanh(out[1])
        step = jnp.exp(reach * jnp.tanh(size / reach)) * step
        if tensor_size:
            step = step + (weight_decay + signals[1]) * rows[len(names)]
        elif weight_decay:
            step = step + weight_decay * rows[len(names)]
        return -rate_of(theta, context) * step, hidden

    def rate_of(theta, context):
        log_rate = theta["log_learning_rate"]
        if anneal:
            # The first of the context is t/T, 0 where T is not known.
            left = 0.5 * (1 + jnp.cos(jnp.pi * context[0])) + ANNEALED
            log_rate = log_rate + theta["anneal"] * jnp.log(left / (1 + ANNEALED))
        return jnp.exp(log_rate)

    def init(key):
        context = jnp.zeros_like(clock(jnp.int32(0), jnp.int32(0)))
        inputs = len(seen) + num_matrix + (NUM_SIGNALS - 2 if tensor_size else 0)
        rows = jnp.zeros((inputs, 1), jnp.float32)
        weights = network.init(key, rows, context, _zeros(hidden_size, layers, 1, jnp.float32))
        own = {"tensors": whole_init(jax.random.fold_in(key, 1), context)} if whole_init else {}
        if anneal:
            own["anneal"] = jnp.asarray(anneal, jnp.float32)
        return own | {
            "network": weights,
            "log_learning_rate": jnp.log(jnp.asarray(learning_rate, jnp.float32)),
        }

    rule = base.Rule(
        accumulators=lambda params, dtype: features.zero_moments(
            len(decays), base.count(params), dtype
        ),
        context=clock,
        observe=observe,
        hidden=lambda theta, n: _zeros(hidden_size, layers, n, coordinates.dtype_of(theta)),
        propose=propose,
        features=(*names, "θ"),
        matrices=matrices,
        tensors=whole,
        rate=lambda theta, *clock_of: rate_of(theta, clock(*clock_of)),
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
        accumulators=lambda params, dtype: (),
        context=lambda step, num_steps: jnp.zeros((0,), jnp.float32),
        observe=lambda g, accumulators, params, step: (features.log_and_sign(g, p), accumulators),
        hidden=lambda theta, n: _zeros(hidden_size, layers, n, coordinates.dtype_of(theta)),
        propose=propose,
        features=("log |g|", "sign g"),
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
        accumulators=lambda params, dtype: features.zero_moments(1, base.count(params), dtype),
        context=lambda step, num_steps: jnp.zeros((0,), jnp.float32),
        observe=observe,
        hidden=lambda theta, n: _zeros(hidden_size, layers, n, coordinates.dtype_of(theta)),
        propose=propose,
        features=("m̂/√v̂", "g/√v̂"),
    )

    return coordinates.optimizer(_initialiser(network, 2, hidden_size, layers), rule)


def _initialiser(network, inputs, hidden_size, layers):
    def init(key):
        state = _zeros(hidden_size, layers, 1, jnp.float32)
        return network.init(key, jnp.zeros((inputs, 1), jnp.float32), state)

    return init


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
