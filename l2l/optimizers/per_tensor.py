"""A rule of whole tensors: SOAP's directions, and how far to go along them.

How far is decided by a dozen numbers and, if asked for, a small LSTM that may depart from them.
Nothing is learned for each coordinate. What the LSTM reads is evidence pooled over a tensor:
whether gradients agree, how much of them is noise, whether they and the weights grow. It reads no
clock and no size, which it would extrapolate from the small networks of its training; the clock
belongs to a schedule of a few numbers. What the LSTM asks for stays within a factor of the
schedule, and an update within a fraction of the weights it changes.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import binding, coordinates, ranges, soap_directions
from l2l.optimizers import per_tensor_evidence as evidence
from l2l.optimizers import per_tensor_numbers as numbers
from l2l.optimizers.network import FeatureMajorLinear, FeatureMajorLSTM

# Weight decay is at its full strength where the nominal direction goes this far towards zero (its
# entries have size 1 where gradients agree). It grows from 0 to here: a sudden switch would have no
# derivative.
RAMP = 0.1
LEARN = ("network", "numbers", "all")


class PerTensorState(NamedTuple):
    """The optax state of a bound rule."""

    accumulators: evidence.Accumulators
    hidden: Any

    @property
    def step(self) -> jax.Array:
        return self.accumulators.soap.count


def per_tensor(
    *,
    hidden_size: int = 0,
    learning_rate: float = 0.03,
    vector_rate: float = 1.0,
    size_power: float = 0.75,
    depth_power: float = 0.5,
    decays: Sequence[float] = (0.9,),
    second_decay: float = 0.999,
    second_power: float = 0.6,
    eps_root: float = 1e-28,
    faded: float = 1e-7,
    mixture: bool = False,
    weight_decay: float = 0.7,
    decay_anneal: float = 2.0,
    decay_power: float = 0.3,
    decay_fall: float = 0.7,
    decay_noise: float = 2.5,
    fitted_decay: float = 0.3,
    fall_power: float = 0.5,
    quiet: float = 3e-4,
    agreement: float = 3.0,
    overshoot: float = 4.0,
    warm_up: float = 0.0,
    anneal: float = 0.7,
    horizon_power: float = 0.4,
    assumed_power: float = 2.0,
    reach: float = 1.4,
    bound: float = 0.2,
    smallest: float = 0.03,
    block_size: int = 256,
    average_every: int = 5,
    basis_every: int = 20,
    learn: str = "all",
) -> base.LearnedOptimizer:
    """SOAP's directions (Vyas et al. 2024), scaled by a schedule and an LSTM over whole tensors.

    The coefficient of a tensor's nominal direction d₀, Nesterov's momentum over √ν in the basis, is

        c₀ = −exp(λ) · (64/n)^q · (2/L)^d · (500/T)^h · (1 − exp(−(t + 1)/w)) · s^p
              · exp(−o · max(−g, 0)) · φ^v · (1 + κ/f²)^(−1/2) · exp(r · tanh(a/r)),
        s = (1 + cos πt/T)/2,

    with T the horizon (if none is known, s is 1, and T counts as 500 · max(1, t/250)^u), n the
    square root of a matrix's rows times its columns, L the number of matrices that have had a
    gradient (a model's output moves with each of them), g the cosine between gradients and the
    momentum before them, averaged over some ten steps and all tensors, f how far gradients have
    fallen (see below) and φ the same between 0.1 and 1, r the `reach`, and a the network's output,
    zero at first: untrained, or with `hidden_size` 0, the rule is SOAP with a schedule. With
    `mixture`, the further directions (one for each further decay, and the gradient's) have the
    coefficients c₀ · tanh(bⱼ). Weight decay adds c₀ · exp(δ + m · max(0, 1 − 3A) + r · tanh(e/r)) ·
    (500/T)^j · s^k · φ^(−z) · θ to the update (c₀ as `bound` leaves it, and s = ½ if no horizon is
    known), only where the nominal step goes towards zero as well: it is cautious (Chen et al.
    2025, arXiv 2510.12402), and does not hold back weights that the loss wants to grow. A is |g| of
    single steps, averaged over some ten of them: where it is small, most of a gradient is noise,
    and noise is what gets memorised. Losses without noise, such as that of a differential equation,
    have an A of 0.3 and more, and want little decay.

    Where a run is known to be long and gradients have fallen far, matrices decay without caution as
    well, since what is left to fit is mostly memorised. Each of their weights loses in a step

        exp(λ) · (500/T)^h · (1 − exp(−(t + 1)/w)) · s^p
              · ρ · max(0, 1 − 1000/T) · max(0, 1 − 3A) · (log φ / log 0.1)² · θ.

    Models that are still far from fitting their data keep all that they learn.

    Where the rate is too high, steps overshoot, and gradients turn against the momentum that led to
    them: g is negative, and the rate is the lower the more it is so. Losses with little noise, such
    as that of a differential equation, need this; models that are far from learned when their run
    ends lose a little by it.

    Directions do not get shorter as gradients do, so learning goes on where gradients are small.
    What slows it down, and in the end stops it, is f: where gradients have fallen far the data is
    being memorised, and learning more of it costs more in validation than it gains. But a loss
    without noise is to be learned to its last digit. There the gradients of successive steps agree
    or alternate, and with G the cosine averaged over a hundred steps,

        log f = max(0, 1 − η|G|) · (1 − g²)^η · log(rms of recent gradients / rms of all so far).

    Steps in which a tensor's gradient is zero are no evidence, and tensors that have never had one
    do not count in what is averaged over all of them.

    Args:
      hidden_size: of the LSTM; 0 for none, so that theta is the numbers alone.
      learning_rate: exp(λ) at the start, for matrices; for vectors, that times `vector_rate`.
      size_power: q. Applies to n, not to the fan-in: libraries differ in which axis that is.
      depth_power: d.
      decays: of the first moments; the first is the nominal one.
      second_decay, second_power: of the second moment (`soap_directions.Settings`).
      eps_root: added to mean squares of gradients before taking their roots or dividing by them, so
        that zeros have derivatives too. Gradients below its root count as none; above it, the
        rule does the same whatever the loss is multiplied by. Where a tensor's first gradient is
        zero, an update's slope is 1 over that root: often too steep for exact meta-gradients.
      faded: a tensor's gradients count as none, too, where their mean square is below this
        fraction of its average so far.
      mixture: whether the network mixes in further directions.
      weight_decay: exp(δ) at the start, times the schedule's rate; not for vectors. 0 for none.
      decay_anneal: k: decay fades before the rate does, and the end of a run fits what is left.
      decay_power: j: longer runs do better with less decay.
      decay_fall: z: data that is all but memorised takes more decay; 0 for none.
      decay_noise: m: gradients that are mostly noise take more decay; 0 for none.
      fitted_decay: ρ, of all weights where gradients have fallen in a long run; 0 for none.
      fall_power: v; 0 for none.
      quiet: κ; 0 for none.
      agreement: η; 0 counts every fall of gradients in full.
      overshoot: o; 0 for none.
      warm_up: w, steps; 0 for none.
      anneal: p.
      horizon_power: h: longer runs do better with lower rates. T counts as at least 100.
      assumed_power: u: without a horizon, rates fall with t^(−u·h), and a run is good at any time;
        0 for rates that stay as they are.
      reach: r: |log| of the largest factor that the network may put on a rate or a decay.
      bound: the root mean square of a step, decay aside, is kept below this fraction of its
        tensor's, or of `smallest` where that is larger; 0 for no bound.
      block_size, average_every, basis_every: of the directions (`soap_directions.Settings`).
      learn: what the meta-gradient reaches: "network", "numbers" (λ and the others) or "all".

    Raises:
      UserError: a setting is out of range.
    """
    nominal = numbers.Numbers(
        *(learning_rate, vector_rate, size_power, depth_power, anneal, horizon_power),
        *(assumed_power, warm_up, bound, weight_decay, decay_anneal, decay_power, decay_fall),
        *(decay_noise, fitted_decay, fall_power, quiet, overshoot),
    ).checked()
    ranges.not_negative("agreement", agreement)
    ranges.not_negative("smallest", smallest)
    ranges.positive("reach", reach)
    hidden_size = ranges.whole("hidden_size", hidden_size, least=0)
    if learn == "network" and not hidden_size:
        raise UserError(
            "learn='network' with hidden_size=0 leaves nothing to learn: set hidden_size=16."
        )
    if learn not in LEARN:
        raise UserError(f"There is no learn={learn!r}: choose {', '.join(LEARN[:-1])} or all.")
    ranges.positive("eps_root", eps_root)
    ranges.not_negative("faded", faded)
    decays = tuple(decays)
    settings = soap_directions.Settings(
        decays=decays,
        second_decay=second_decay,
        second_power=second_power,
        eps_root=eps_root,
        eps=0.01 * math.sqrt(eps_root),
        gradient=mixture,
        block_size=block_size,
        average_every=average_every,
        basis_every=basis_every,
    ).checked()
    further = len(decays) if mixture else 0  # The other decays, and the gradient.
    network = _Network(hidden_size, 1 + further + (weight_decay > 0))

    def init(key):
        theta: dict[str, Any] = nominal.theta()
        return theta | ({"network": network.init(key)} if hidden_size else {})

    def propose(theta, rows, step, num_steps, state):
        if learn != "all":
            theta = {
                name: part if (name == "network") == (learn == "network") else _held(part)
                for name, part in theta.items()
            }
        seen, plain, lengths = evidence.parts(rows)
        fast = seen[evidence.FEATURES.index("all tensors: alignment, fast")]
        slow = seen[evidence.FEATURES.index("all tensors: alignment, slow")]
        fall = numbers.counted(plain.fall, fast, slow, agreement)
        out, state = network.apply(theta, seen, state)
        log_rate = numbers.log_rate(theta, plain, fast, fall)
        rate = jnp.exp(log_rate + reach * jnp.tanh(out[0] / reach))
        rate = rate * numbers.schedule(theta, step, num_steps)
        shares = jnp.concatenate([jnp.ones_like(out[:1]), jnp.tanh(out[1 : 1 + further])])
        if bound:
            largest = jnp.maximum(jnp.exp(plain.log_weights), smallest)
            part = rate * jnp.sum(jnp.abs(shares) * lengths, 0) / largest
            rate = rate / jnp.sqrt(1 + jnp.square(part * jnp.exp(-theta["log_bound"])))
        coefficients = -rate[None] * shares
        if weight_decay:
            log_decay = numbers.log_decay(theta, step, num_steps, fall, plain.steadiness)
            log_decay = log_decay + reach * jnp.tanh(out[-1] / reach)
            decay = -rate * jnp.exp(log_decay) * (1 - plain.vector)
            coefficients = jnp.concatenate([coefficients, decay[None]])
        if fitted_decay:
            fitted = -numbers.fitted_decay(theta, plain, step, num_steps, fall)
            coefficients = jnp.concatenate([coefficients, fitted[None]])
        return coefficients, state

    rule = base.PerTensorRule(
        accumulators=partial(evidence.start, settings),
        observe=partial(evidence.observe, settings, faded),
        hidden=network.hidden,
        propose=propose,
        combine=partial(_combine, settings, (weight_decay > 0, fitted_decay > 0)),
        rate=numbers.rate,
        features=evidence.FEATURES,
    )
    return base.LearnedOptimizer(init, lambda theta: bind(rule, theta), rule)


def _held(tree):
    return jax.tree.map(jax.lax.stop_gradient, tree)


class _Network:
    """The LSTM and its last layer, [S, G] to [outputs, G]: zero if untrained or without units."""

    def __init__(self, hidden_size: int, outputs: int):
        self._size, self._outputs = hidden_size, outputs

        @hk.without_apply_rng
        @hk.transform
        def network(rows, state):
            columns, state = FeatureMajorLSTM(hidden_size, name="lstm")(rows, state)
            return FeatureMajorLinear(outputs, jnp.zeros, name="out")(columns), state

        self._network = network

    def init(self, key):
        zeros = jnp.zeros((self._size, 1), jnp.float32)
        rows = jnp.zeros((len(evidence.FEATURES), 1), jnp.float32)
        return self._network.init(key, rows, hk.LSTMState(zeros, zeros))

    def hidden(self, theta, num_tensors: int):
        if not self._size:
            return ()
        zeros = jnp.zeros((self._size, num_tensors), theta["log_rate"].dtype)
        return hk.LSTMState(zeros, jnp.zeros_like(zeros))

    def apply(self, theta, rows, state):
        if not self._size:
            return jnp.zeros((self._outputs, rows.shape[1]), rows.dtype), state
        return self._network.apply(theta["network"], rows, state)


def _combine(settings, decays: tuple[bool, bool], seen, coefficients, params):
    """Updates like params. The last coefficients are those of the decays that there are: the
    cautious one, and that of every weight.

    They are linear in the coefficients: the nominal direction alone decides where decay acts.
    """
    if not any(decays):
        return soap_directions.back(settings, seen, coefficients, params)
    leaves, treedef = jax.tree.flatten(params)
    updates: dict[int, jax.Array] = {}
    for group, mixed in soap_directions.parts(settings, seen, params):
        own = coefficients[:, np.asarray(group.owners)]
        nominal = mixed(jnp.ones_like(own[:1]))
        p = group.gather(leaves)
        wide = own.reshape(*own.shape, *[1] * (p.ndim - 1))
        directions = len(own) - sum(decays)
        moved = wide[0] * nominal if directions == 1 else mixed(own[:directions])
        cautious, everywhere = decays
        shrink = wide[-1] if everywhere else 0.0
        if cautious:
            towards = jnp.clip(jnp.sign(p) * nominal / RAMP, 0, 1)
            shrink = shrink + wide[directions] * towards
        updates |= group.scatter(moved + shrink * p, seen.places)
    return treedef.unflatten([updates[i].astype(x.dtype) for i, x in enumerate(leaves)])


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
