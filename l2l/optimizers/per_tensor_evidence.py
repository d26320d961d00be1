"""What `per_tensor` sees of G whole tensors: evidence pooled over each, and over all of them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l.optimizers import meshes, soap_directions
from l2l.optimizers.soap_directions import POOLED, TINY

# Decays, per step, of the averages over time of what is pooled over a tensor.
FAST, SLOW = 0.9, 0.99
FEATURES = (
    *("signal", "alignment, fast", "alignment, slow", "trend of |g|", "fall of |g|"),
    *("growth of |θ|", "all tensors: signal", "all tensors: alignment, fast"),
    *("all tensors: alignment, slow", "all tensors: trend of |g|", "all tensors: fall of |g|"),
)


class Plain(NamedTuple):
    """The rows [G] that are hidden from the network. vector: 1 for vectors, 0 for matrices.
    log_weights: log rms θ. log_size: of `_sizes`. log_depth: log of half the number of matrices
    that have had a gradient. fall: log f. steadiness: that of all tensors."""

    vector: jax.Array
    log_weights: jax.Array
    log_size: jax.Array
    log_depth: jax.Array
    fall: jax.Array
    steadiness: jax.Array


class Trail(NamedTuple):
    """What is remembered of each of G tensors. alignment, log_gradient: [2, G], averaged fast and
    slow. steadiness: [G], |alignment| of single steps, averaged fast from 1 on. log_start: [G], log
    rms θ before the first step. mean_square: [G], of all gradients so far that were not zero.
    seen: [G], how many there have been of these.

    A gradient of nothing but zeros is no evidence: that of a head that is not trained in this step,
    of an expert that is not asked, or of what lies before a layer that begins at zero.
    """

    seen: jax.Array
    alignment: jax.Array
    steadiness: jax.Array
    log_gradient: jax.Array
    log_start: jax.Array
    mean_square: jax.Array


class Accumulators(NamedTuple):
    """soap: the moments, in the shapes and shardings of the parameters, and the bases."""

    soap: soap_directions.SoapState
    trail: Trail


def start(settings, params) -> Accumulators:
    """Those before the first step."""
    leaves = jax.tree.leaves(params)
    dtype = jnp.result_type(jnp.float32, *map(soap_directions.accumulator_dtype, leaves))
    zeros = jnp.zeros((2, len(leaves)), dtype)
    log_start = _log_rms(settings, meshes.together(params), dtype) if leaves else zeros[0]
    return Accumulators(
        soap_directions.start(settings, params),
        Trail(
            seen=jnp.zeros_like(log_start),
            alignment=zeros,
            steadiness=jnp.ones_like(log_start),
            log_gradient=jnp.zeros_like(zeros),
            log_start=log_start,
            mean_square=jnp.zeros_like(log_start),
        ),
    )


def _log_rms(settings, params, dtype) -> jax.Array:
    """[G]: log of the root mean square of each tensor, and at least log of a thousandth."""
    leaves, plan = jax.tree.leaves(params), settings.plan(params)
    grouped = [group.gather(leaves).astype(dtype) for group in plan.groups]
    squares = plan.per_leaf([jnp.sum(x * x, tuple(range(1, x.ndim))) for x in grouped])
    sizes = jnp.asarray([max(jnp.size(x), 1) for x in leaves], dtype)
    return 0.5 * jnp.log(squares / sizes + 1e-6)


def observe(settings, faded: float, gradient, params, past: Accumulators):
    """(directions, rows [S, G], accumulators). The rows are `FEATURES`, `Plain` and the root mean
    squares of the directions; `parts` takes them apart."""
    floors = settings.eps_root + faded * past.trail.mean_square
    seen, now = soap_directions.observe(settings, gradient, past.soap, floors)
    leaves = jax.tree.leaves(params)
    dtype = past.trail.log_start.dtype
    along, ahead, square, numerator, second = seen.pooled[: len(POOLED)].astype(dtype)
    lengths = jnp.sqrt(seen.pooled[len(POOLED) :].astype(dtype) + TINY)
    nothing = 1e-8 * settings.eps_root
    trail = _remembered(past.trail, along, ahead, square, floors, nothing)
    known = trail.seen > 0
    log_weights = _log_rms(settings, params, dtype)
    fall = trail.log_gradient[0] - 0.5 * jnp.log(trail.mean_square + nothing)
    fall = jnp.where(known, fall, 0)
    dynamic = jnp.stack(
        [
            jnp.sqrt(numerator / (second + floors) + TINY),
            *trail.alignment,
            jnp.tanh(trail.log_gradient[0] - trail.log_gradient[1]),
            jnp.tanh(0.3 * fall),
        ]
    )
    sizes = [x.size for x in leaves]
    share = jnp.where(known, jnp.asarray(sizes, dtype), 0)
    share = share / jnp.maximum(jnp.sum(share), 1)
    together = jnp.broadcast_to((dynamic @ share)[:, None], dynamic.shape)
    growth = jnp.tanh(log_weights - trail.log_start)
    vectors = settings.plan(params).vectors
    vector = jnp.asarray([float(i in vectors) for i in range(len(leaves))], dtype)
    log_size = jnp.asarray([math.log(x) for x in _sizes(leaves, vectors, settings.longest)], dtype)
    depth = jnp.maximum(jnp.sum(jnp.where(known, 1 - vector, 0)), 1)
    plain = Plain(
        vector=vector,
        log_weights=log_weights,
        log_size=log_size,
        log_depth=jnp.broadcast_to(jnp.log(depth / 2), log_size.shape),
        fall=fall,
        steadiness=jnp.broadcast_to(trail.steadiness @ share, fall.shape),
    )
    rows = jnp.stack([*dynamic, growth, *together, *plain, *lengths])
    return seen, rows, Accumulators(now, trail)


def _remembered(past: Trail, along, ahead, square, floors, nothing: float) -> Trail:
    """The trail after another gradient. along, ahead, square: [G], means of g·m, m² and g². floors:
    [G], mean squares below which there is nothing to compare. nothing: added to mean squares before
    their logarithm is taken."""
    log_gradient = 0.5 * jnp.log(square + nothing)
    # Where there is nothing to compare, neither the roots nor their derivatives are taken. Each of
    # the two means has its own root: their product underflows where gradients are small.
    began, here = past.seen > 0, square > 0
    there = began & (jnp.minimum(ahead, square) > floors)
    lengths = (jax.lax.rsqrt(jnp.where(there, x, 1)) for x in (ahead, square))
    cosine = jnp.where(there, along * math.prod(lengths), 0)

    def average(decays, past, new):
        return jnp.where(here[None], decays * past + (1 - decays) * new[None], past)

    decays = jnp.asarray([[FAST], [SLOW]], square.dtype)
    logs = jnp.where(began[None], past.log_gradient, log_gradient[None])
    steady = jnp.where(began, jnp.abs(cosine), 1)
    off = jnp.where(here, square - past.mean_square, 0)
    return Trail(
        seen=past.seen + here,
        alignment=average(decays, past.alignment, cosine),
        steadiness=average(FAST, past.steadiness[None], steady)[0],
        log_gradient=average(decays, logs, log_gradient),
        log_start=past.log_start,
        mean_square=past.mean_square + off / (past.seen + 1),
    )


def parts(rows) -> tuple[jax.Array, Plain, jax.Array]:
    """Of the rows of `observe`: (what the network reads, what it does not, [J, G]: the root mean
    squares of the directions)."""
    ends = len(FEATURES), len(FEATURES) + len(Plain._fields)
    return rows[: ends[0]], Plain(*rows[ends[0] : ends[1]]), rows[ends[1] :]


def _sizes(leaves, vectors: frozenset[int], longest: int) -> list[float]:
    """For each matrix (all axes but the last by the last), the square root of its rows times its
    columns, over 64; sides without a basis, like the rows of an embedding, do not count. For
    vectors, 1."""
    sides = [(math.prod(x.shape[:-1]), x.shape[-1] if x.ndim else 1) for x in leaves]
    whole = [[n for n in side if n <= longest] or [longest] for side in sides]
    means = [math.prod(side) ** (1 / len(side)) for side in whole]
    return [1.0 if i in vectors else n / 64 for i, n in enumerate(means)]
