"""A rule of whole tensors: SOAP's directions, and a small LSTM that says how far to go along them.

Nothing is learned a coordinate. What the LSTM reads is evidence, pooled over a tensor: whether
gradients agree, how much of them is noise, whether they and the weights grow. It reads no clock and
no size, which it would extrapolate from the small networks of its training; the clock belongs to a
schedule of a few numbers. Its word stays within a factor of the schedule's, and an update within
a part of the weights it changes.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import binding, coordinates, soap
from l2l.optimizers.network import FeatureMajorLinear, FeatureMajorLSTM

# Averages over time of what is pooled over a tensor, a step.
FAST, SLOW = 0.9, 0.99
# What is left of the rate at the horizon, before the power.
ANNEALED = 1e-3
FEATURES = (
    *("signal", "alignment, fast", "alignment, slow", "trend of |g|", "growth of |θ|"),
    *("all tensors: signal", "all tensors: alignment, fast"),
    *("all tensors: alignment, slow", "all tensors: trend of |g|"),
)


class Trail(NamedTuple):
    """What is remembered of each of G tensors. alignment, log_gradient: [2, G], averaged fast and
    slow. log_start: [G], log rms θ before the first step."""

    alignment: jax.Array
    log_gradient: jax.Array
    log_start: jax.Array


class Accumulators(NamedTuple):
    """soap: the moments, in the shapes and shardings of the parameters, and the bases."""

    soap: soap.SoapState
    trail: Trail


class PerTensorState(NamedTuple):
    """The optax state of a bound rule."""

    accumulators: Accumulators
    hidden: Any

    @property
    def step(self) -> jax.Array:
        return self.accumulators.soap.count


def per_tensor(
    *,
    hidden_size: int = 16,
    learning_rate: float = 0.01,
    vector_rate: float = 1.0,
    decays: Sequence[float] = (0.9,),
    second_decay: float = 0.999,
    mixture: bool = False,
    weight_decay: float = 0.0,
    warm_up: float = 0.0,
    anneal: float = 1.0,
    reach: float = 1.4,
    bound: float = 0.0,
    smallest: float = 0.03,
    block_size: int = 256,
    average_every: int = 5,
    basis_every: int = 20,
) -> base.LearnedOptimizer:
    """An LSTM over whole tensors that scales SOAP's directions (Vyas et al. 2024).

    The coefficient of a tensor's nominal direction d₀, Nesterov's momentum over √ν in the basis, is

        c₀ = −exp(λ) · (1 − exp(−(t + 1)/w)) · ((1 + cos πt/T)/2)^p · exp(reach · tanh(a/reach)),

    with a from the network, zero at first: untrained it is SOAP at one rate. With `mixture` the
    further directions (one a further decay, and the gradient's) have c₀ · tanh(bⱼ). λ, w and p are
    learned with the network; w only where `warm_up` is above 0, p only where T is told.

    Args:
      hidden_size: of the LSTM; 0 for none: then λ, w, p and the decay are all of theta.
      learning_rate: exp(λ) at the start, of matrices; times `vector_rate`, of vectors.
      decays: of the first moments; the first is the nominal one.
      second_decay: of the second moment.
      weight_decay: decoupled, times the schedule's rate; learned from this on if it is above 0.
      warm_up: w, steps; 0 for none.
      anneal: p.
      reach: |log| of the largest factor that the network may put on a rate.
      bound: the root mean square of an update is kept below this part of that of its tensor, or of
        `smallest` where that is larger; 0 for no bound.
      block_size, average_every, basis_every: of the directions (`soap.Settings`).

    Raises:
      UserError: a setting is out of range.
    """
    for name, value in (("learning_rate", learning_rate), ("vector_rate", vector_rate)):
        if not value > 0:
            raise UserError(f"{name}={value} takes no steps: use a positive number.")
    decays = tuple(decays)
    settings = soap.Settings(
        decays=decays,
        second_decay=second_decay,
        gradient=mixture,
        block_size=block_size,
        average_every=average_every,
        basis_every=basis_every,
    )
    further = len(decays) if mixture else 0  # The other decays, and the gradient.
    nominal = dict(
        learning_rate=learning_rate, vector_rate=vector_rate, anneal=anneal,
        warm_up=warm_up, weight_decay=weight_decay,
    )  # fmt: skip

    @hk.without_apply_rng
    @hk.transform
    def network(rows, state):
        columns, state = FeatureMajorLSTM(hidden_size, name="lstm")(rows, state)
        return FeatureMajorLinear(1 + further, jnp.zeros, name="out")(columns), state

    def hidden(theta, num_tensors):
        if not hidden_size:
            return ()
        zeros = jnp.zeros((hidden_size, num_tensors), theta["log_rate"].dtype)
        return hk.LSTMState(zeros, jnp.zeros_like(zeros))

    def init(key):
        theta: dict[str, Any] = {
            name: jnp.asarray(x, jnp.float32) for name, x in _numbers(nominal).items()
        }
        if hidden_size:
            zeros = jnp.zeros((hidden_size, 1))
            rows = jnp.zeros((len(FEATURES), 1))
            theta["network"] = network.init(key, rows, hk.LSTMState(zeros, zeros))
        return theta

    def propose(theta, rows, step, num_steps, state):
        seen, plain = rows[: len(FEATURES)], rows[len(FEATURES) :]
        vector, log_weights, lengths = plain[0], plain[1], plain[2:]
        out = jnp.zeros((1 + further, rows.shape[1]), rows.dtype)
        if hidden_size:
            out, state = network.apply(theta["network"], seen, state)
        log_rate = theta["log_rate"] + vector * theta["log_vector_rate"]
        rate = jnp.exp(log_rate + reach * jnp.tanh(out[0] / reach))
        rate = rate * _schedule(theta, step, num_steps)
        shares = jnp.concatenate([jnp.ones_like(out[:1]), jnp.tanh(out[1:])])
        if bound:
            largest = jnp.maximum(jnp.exp(log_weights), smallest)
            part = rate * jnp.sum(jnp.abs(shares) * lengths, 0) / largest
            rate = rate / jnp.sqrt(1 + jnp.square(part / bound))
        coefficients = -rate[None] * shares
        if weight_decay:
            decay = -rate * jnp.exp(theta["log_weight_decay"]) * (1 - vector)
            coefficients = jnp.concatenate([coefficients, decay[None]])
        return coefficients, state

    def combine(directions, coefficients, params):
        seen = directions
        if not weight_decay:
            return soap.back(settings, seen, coefficients, params)
        updates = soap.back(settings, seen, coefficients[:-1], params)
        leaves, treedef = jax.tree.flatten(params)
        decayed = treedef.unflatten([c * p for c, p in zip(coefficients[-1], leaves, strict=True)])
        return jax.tree.map(lambda u, d: u + d.astype(u.dtype), updates, decayed)

    rule = base.PerTensorRule(
        accumulators=lambda params: _start(settings, params),
        observe=partial(_observe, settings),
        hidden=hidden,
        propose=propose,
        combine=combine,
        rate=lambda theta, *clock: jnp.exp(theta["log_rate"]) * _schedule(theta, *clock),
        features=FEATURES,
    )
    return base.LearnedOptimizer(init, lambda theta: bind(rule, theta), rule)


def _numbers(nominal) -> dict[str, float]:
    numbers = {
        "log_rate": math.log(nominal["learning_rate"]),
        "log_vector_rate": math.log(nominal["vector_rate"]),
        "anneal": nominal["anneal"],
    }
    if nominal["warm_up"]:
        numbers["log_warm_up"] = math.log(nominal["warm_up"])
    if nominal["weight_decay"]:
        numbers["log_weight_decay"] = math.log(nominal["weight_decay"])
    return numbers


def _schedule(theta, step, num_steps) -> jax.Array:
    """The factor on every rate at a step; 1, after the warm-up, for an unknown horizon."""
    dtype = theta["log_rate"].dtype
    t, horizon = step.astype(dtype), num_steps.astype(dtype)
    done = jnp.where(num_steps > 0, jnp.minimum(t / jnp.maximum(horizon, 1), 1), 0)
    left = 0.5 * (1 + jnp.cos(jnp.pi * done)) + ANNEALED
    factor = jnp.exp(theta["anneal"] * jnp.log(left / (1 + ANNEALED)))
    if "log_warm_up" in theta:
        factor = factor * -jnp.expm1(-(t + 1) * jnp.exp(-theta["log_warm_up"]))
    return factor


def _start(settings, params) -> Accumulators:
    leaves = jax.tree.leaves(params)
    dtype = jnp.result_type(jnp.float32, *map(soap.accumulator_dtype, leaves))
    zeros = jnp.zeros((2, len(leaves)), dtype)
    log_start = jnp.stack([_log_rms(x, dtype) for x in leaves]) if leaves else zeros[0]
    return Accumulators(
        soap.start(settings, params), Trail(zeros, jnp.zeros_like(zeros), log_start)
    )


def _log_rms(x, dtype) -> jax.Array:
    return 0.5 * jnp.log(jnp.sum(jnp.square(x.astype(dtype))) / max(jnp.size(x), 1) + 1e-6)


def _observe(settings, gradient, params, past: Accumulators):
    """(directions, features [S, G], accumulators): `FEATURES`; then, for no network's eyes, whether
    a tensor is a vector, log rms θ, and the root mean squares of the directions."""
    began = past.soap.count > 0
    seen, now = soap.observe(settings, gradient, past.soap)
    leaves = jax.tree.leaves(params)
    dtype = past.trail.log_start.dtype
    along, ahead, square, numerator, second = seen.pooled[: len(soap.POOLED)].astype(dtype)
    lengths = jnp.sqrt(seen.pooled[len(soap.POOLED) :].astype(dtype) + soap.TINY)
    log_gradient = 0.5 * jnp.log(square + 1e-20)
    # Where there is nothing to compare, neither the root nor its derivative is taken.
    there = began & (ahead * square > 1e-24)
    cosine = jnp.where(there, along * jax.lax.rsqrt(jnp.where(there, ahead * square, 1)), 0)

    def average(past, new):
        decays = jnp.asarray([[FAST], [SLOW]], dtype)
        return decays * past + (1 - decays) * new[None]

    trail = Trail(
        alignment=average(past.trail.alignment, cosine),
        log_gradient=average(
            jnp.where(began, past.trail.log_gradient, log_gradient[None]), log_gradient
        ),
        log_start=past.trail.log_start,
    )
    log_weights = jnp.stack([_log_rms(x, dtype) for x in leaves])
    dynamic = jnp.stack(
        [
            jnp.sqrt(numerator / (second + soap.TINY) + soap.TINY),
            *trail.alignment,
            jnp.tanh(trail.log_gradient[0] - trail.log_gradient[1]),
        ]
    )
    sizes = [x.size for x in leaves]
    share = jnp.asarray(sizes, dtype) / max(sum(sizes), 1)
    together = jnp.broadcast_to((dynamic @ share)[:, None], dynamic.shape)
    growth = jnp.tanh(log_weights - trail.log_start)
    vectors = set(settings.plan(params).vectors)
    vector = jnp.asarray([float(i in vectors) for i in range(len(leaves))], dtype)
    rows = [*dynamic, growth, *together, vector, log_weights, *lengths]
    return seen, jnp.stack(rows), Accumulators(now, trail)


def advance(rule: base.PerTensorRule, theta, gradient, params, state: PerTensorState, num_steps):
    """One step, for pytrees: (updates, state, directions, features [S, G])."""
    directions, features, accumulators = rule.observe(gradient, params, state.accumulators)
    coefficients, hidden = rule.propose(theta, features, state.step, num_steps, state.hidden)
    updates = rule.combine(directions, coefficients, params)
    return updates, PerTensorState(accumulators, hidden), directions, features


def begin(rule: base.PerTensorRule, theta, params) -> PerTensorState:
    """The state before the first step."""
    accumulators = rule.accumulators(params)
    return PerTensorState(accumulators, rule.hidden(theta, len(jax.tree.leaves(params))))


def bind(rule: base.PerTensorRule, theta) -> optax.GradientTransformationExtraArgs:
    """The rule with its theta, as an optax transformation; `binding.transformation` has the
    contract. It computes in float32, and in float64 for float64 parameters."""

    return binding.transformation(_Begin(rule), _Step(rule), theta)


class _Begin(NamedTuple):
    """(theta, params) -> the state before the first step."""

    rule: base.PerTensorRule

    def __call__(self, theta, params):
        return begin(self.rule, coordinates.widened(theta, params), params)


class _Step(NamedTuple):
    """(theta, gradient, state, params, num_steps) -> (updates, state)."""

    rule: base.PerTensorRule

    def __call__(self, theta, gradient, state, params, num_steps):
        theta = coordinates.widened(theta, params)
        return advance(self.rule, theta, gradient, params, state, num_steps)[:2]
