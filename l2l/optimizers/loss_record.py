"""The losses that a guard hears: their mean, their noise, and the limit that they set."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l.console.errors import UserError
from l2l.optimizers import features, ranges

# Losses above this count as this.
LARGEST = 1e18


class LossRecord(NamedTuple):
    """The losses since the last fall of a guarded run; scalars, float32 but for `seen`.

    seen:     how many finite ones, int32.
    first:    the first of the whole run.
    mean, variance: running ones, over some `window` losses; what was above the limit enters as it.
    best:     the lowest that `mean` has been.
    limit:    what a loss may reach; of no meaning before `window` losses. It never rises.
    """

    seen: jax.Array
    first: jax.Array
    mean: jax.Array
    variance: jax.Array
    best: jax.Array
    limit: jax.Array


def empty() -> LossRecord:
    """The record before the first loss."""
    # An array each: leaves that share a buffer could not be donated.
    return LossRecord(jnp.zeros((), jnp.int32), *(jnp.zeros((), jnp.float32) for _ in range(5)))


def heard(
    old: LossRecord, value, unfallen: jax.Array, window: int, deviations: float, share: float
) -> tuple[LossRecord, jax.Array, jax.Array]:
    """(the record with one more loss, whether it is above the limit, whether the mean is at a new
    low); a loss that is not finite is above, and changes nothing.

    Args:
      unfallen: whether the run has not fallen yet, so that the first loss of the record is that of
        the run.
      window, deviations, share: as of `guard.guard`.
    """
    value = jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))
    finite = jnp.isfinite(value)
    # Squares of more would overflow, and a variance that is infinite once stays so.
    value = jnp.clip(value, -LARGEST, LARGEST).astype(jnp.float32)
    limited = old.seen >= window
    above = ~finite | (limited & (value > old.limit))
    value = jnp.where(limited, jnp.minimum(value, old.limit), value)
    seen = old.seen + 1
    weight = 1 / jnp.minimum(seen, window).astype(jnp.float32)
    off = value - old.mean
    mean = old.mean + weight * off
    variance = (1 - weight) * (old.variance + weight * off**2)
    first = jnp.where((old.seen == 0) & unfallen, value, old.first)
    low = (seen == 1) | (mean < old.best)
    best = jnp.where(low, mean, old.best)
    limit = best + jnp.maximum(deviations * features.norm(variance), share * (first - best))
    limit = jnp.where(limited, jnp.where(low, jnp.minimum(limit, old.limit), old.limit), limit)
    new = LossRecord(seen, first, mean, variance, best, limit)
    return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old), above, low & finite


def check(value) -> None:
    """Raises UserError unless it is one real number."""
    numbers = isinstance(value, jax.Array | np.ndarray) or ranges.number(value)
    kind = jnp.result_type(value) if numbers else f"a {type(value).__name__}"
    if not numbers or not any(jnp.issubdtype(kind, x) for x in (jnp.floating, jnp.integer)):
        raise UserError(f"value is {kind}, and a loss is one real number: give that.")
    if jnp.shape(value) != ():
        raise UserError(
            f"value has the shape {jnp.shape(value)}, and a loss is one number: take its mean."
        )
