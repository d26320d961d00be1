"""What a learned optimizer sees: optax's statistics of the gradient, turned into bounded features.

Everything here acts on arrays whose last axis runs over coordinates, is free of theta, and puts
`eps_root` inside every square root: at a coordinate whose gradient has always been zero the
derivative of √v̂ is infinite, and one such coordinate makes an exact meta-gradient NaN.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

Step = Int[Array | np.ndarray, ""]


class Moments(NamedTuple):
    """First moments at J decays, mu [J, n], and one second moment, nu [n], not bias-corrected."""

    mu: Float[Array, "J n"]
    nu: Float[Array, " n"]


def zero_moments(num_decays: int, size: int, dtype=jnp.float32) -> Moments:
    return Moments(jnp.zeros((num_decays, size), dtype), jnp.zeros((size,), dtype))


def update_moments(
    gradient: Float[Array, " n"],
    moments: Moments,
    step: Step,
    *,
    decays: tuple[float | int, ...],
    second_decay: float | int,
) -> tuple[Moments, Moments]:
    """Returns (moments, bias-corrected moments) after `gradient` [n] was seen at `step` (from 0).

    The arithmetic is optax's own, so that the features equal those of `optax.scale_by_adam`.
    """
    mu = [
        optax.tree.update_moment(gradient, mu, decay, 1)
        for mu, decay in zip(moments.mu, decays, strict=True)
    ]
    nu = optax.tree.update_moment_per_elem_norm(gradient, moments.nu, second_decay, 2)
    count = step + 1
    mu_hat = [optax.tree.bias_correction(m, d, count) for m, d in zip(mu, decays, strict=True)]
    nu_hat = optax.tree.bias_correction(nu, second_decay, count)
    return Moments(jnp.stack(mu), nu), Moments(jnp.stack(mu_hat), nu_hat)


def weight_of(decay: float | int, count: Step, dtype) -> Float[Array, ""]:
    """1 − decayᵗ, the sum of the weights in an average of t numbers: what a bias correction divides
    by. A Python number to a whole power would be float64 under `jax_enable_x64`."""
    return 1 - jnp.asarray(decay, dtype) ** count


def root(
    nu_hat: Float[Array, "*shape"], eps_root: float | int, eps: float | int = 1e-8
) -> Float[Array, "*shape"]:
    """√(v̂ + eps_root) + eps, the denominator of `optax.adam(eps=eps, eps_root=eps_root)`."""
    return jnp.sqrt(nu_hat + eps_root) + eps


def norm(square: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """√square, of sums or means of squares; its derivative is 0 where they are 0.

    There a norm is even, and central differences of it are 0, but that of the root is infinite: a
    0 before it or behind it, even one of a `where` that chose otherwise, then makes NaN.
    """
    zero = square == 0  # And not > 0: the norm of NaN is NaN.
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, square)))


def pool(
    products: Sequence[Float[Array, " P"]],
    sizes: Sequence[int],
    tensors: Sequence[int] | None = None,
) -> Float[Array, "{len(products)} G"]:
    """Means over whole tensors, 0 for an empty one, of R arrays [P]: [R, G].

    sizes: of all tensors, as they lie in P.
    tensors: the numbers of those whose means are wanted, all by default.
    """
    rows = jnp.stack(list(products))
    ends = np.cumsum(sizes)
    chosen = range(len(sizes)) if tensors is None else tensors
    means = [jnp.sum(rows[:, ends[i] - sizes[i] : ends[i]], 1) / max(sizes[i], 1) for i in chosen]
    return jnp.stack(means, 1) if means else jnp.zeros((len(rows), 0), rows.dtype)


def log_and_sign(gradient: Float[Array, " n"], p: float | int) -> Float[Array, "2 n"]:
    """[2, n]: (log|g|/p, sign g) where |g| ≥ e^−p, and (−1, eᵖ g) below (Andrychowicz et al. 2016,
    appendix A)."""
    size = jnp.abs(gradient)
    # The floor keeps log away from 0; it is never chosen below e^-p, where the other branch holds.
    log = jnp.log(jnp.maximum(size, jnp.exp(-p) / 2)) / p
    large = size >= jnp.exp(-p)
    return jnp.stack(
        [jnp.where(large, log, -1.0), jnp.where(large, jnp.sign(gradient), jnp.exp(p) * gradient)]
    )


def time_context(
    step: Step,
    num_steps: Step,
    ages: tuple[float | int, ...] = (10.0, 100.0),
    lengths: tuple[float | int, ...] = (300.0,),
    dtype=jnp.float32,
) -> Float[Array, " C"]:
    """[C]: t/T, t/(t + a) for each age, T/(T + l) for each length and whether T is known; zeros for
    T if not.

    Each saturates: past every length of run met in meta-training it is nearly constant, where a
    logarithm would keep growing and carry the network off. Past the horizon t/T stays at 1.
    """
    known = (num_steps > 0).astype(dtype)
    t, horizon = step.astype(dtype), num_steps.astype(dtype)
    fraction = jnp.minimum(t / jnp.maximum(horizon, 1.0), 1.0)
    return jnp.stack(
        [
            fraction * known,
            *(t / (t + age) for age in ages),
            *(horizon / (horizon + length) for length in lengths),
            known,
        ]
    )
