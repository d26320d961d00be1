"""The numbers of `per_tensor`, and what they say of a rate and a decay before any network does.

They stand in theta, so that they can be found by gradients as well as by hand.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l.optimizers import ranges
from l2l.optimizers.per_tensor_evidence import Plain

# What is left of the rate at the horizon, before the power.
ANNEALED = 1e-3
# The horizon, in steps, at which a rate is the nominal one, and the shortest: rates do not grow
# any further below it.
USUAL, SHORTEST = 500, 100
# The longest horizon at which data are taken to come back too seldom to be memorised.
SELDOM = 1000
# As rates and decay see it, gradients fall no further than to this part.
LOWEST = 0.1
# 1 over the steadiness of gradients from which on no decay is added: those with next to no noise.
STEADY = 3.0


class Numbers(NamedTuple):
    """What theta holds besides the network; it starts as these settings of `per_tensor`."""

    learning_rate: float
    vector_rate: float
    size_power: float
    depth_power: float
    anneal: float
    horizon_power: float
    assumed_power: float
    warm_up: float
    bound: float
    weight_decay: float
    decay_anneal: float
    decay_power: float
    decay_fall: float
    decay_noise: float
    fitted_decay: float
    fall_power: float
    quiet: float
    overshoot: float

    def checked(self) -> "Numbers":
        for name, value in self._asdict().items():
            rate = name in ("learning_rate", "vector_rate")
            (ranges.positive if rate else ranges.not_negative)(name, value)
        return self

    def theta(self) -> dict[str, jax.Array]:
        """Those that multiply something are held as logarithms; what is switched off by 0 has no
        entry."""
        numbers = {
            "log_rate": math.log(self.learning_rate),
            "log_vector_rate": math.log(self.vector_rate),
            "size_power": self.size_power,
            "anneal": self.anneal,
        }
        powers = (
            *("depth_power", "horizon_power", "assumed_power", "decay_anneal", "decay_power"),
            *("decay_fall", "decay_noise", "fall_power", "overshoot"),
        )
        for name in powers:
            if getattr(self, name):
                numbers[name] = getattr(self, name)
        for name in ("warm_up", "bound", "weight_decay", "fitted_decay", "quiet"):
            if getattr(self, name):
                numbers[f"log_{name}"] = math.log(getattr(self, name))
        return {name: jnp.asarray(x, jnp.float32) for name, x in numbers.items()}


def counted(fall, fast, slow, agreement: float) -> jax.Array:
    """[G]: log f, the fall of gradients as far as they are noise.

    fast, slow: cosines of all tensors' gradients with the momentum before them, averaged over some
    ten and a hundred steps. agreement: η.
    """
    if not agreement:
        return fall
    noise = jnp.maximum(1 - agreement * jnp.abs(slow), 0)
    # Rounding makes cosines of 1 larger, and a negative base has no broken power.
    return fall * noise * jnp.maximum(1 - jnp.square(fast), 0) ** agreement


def log_rate(theta, plain: Plain, fast, fall) -> jax.Array:
    """[G]: log of each tensor's rate, schedule aside. fast, fall: as of `counted`."""
    log = theta["log_rate"] + plain.vector * theta["log_vector_rate"]
    log = log - theta["size_power"] * plain.log_size
    if "depth_power" in theta:
        log = log - theta["depth_power"] * plain.log_depth
    if "overshoot" in theta:
        log = log - theta["overshoot"] * jnp.maximum(-fast, 0)
    if "fall_power" in theta:
        log = log + theta["fall_power"] * _clipped(fall)
    if "log_quiet" in theta:
        log = log - 0.5 * jax.nn.softplus(theta["log_quiet"] - 2 * fall)
    return log


def log_decay(theta, step, num_steps, fall, steadiness) -> jax.Array:
    """[G], or a scalar where gradients have no say: log of the weight decay over the
    rate. steadiness: |cosine| of gradients with the momentum before them, averaged over some ten
    steps and all tensors."""
    dtype = theta["log_rate"].dtype
    log = theta["log_weight_decay"]
    if "decay_anneal" in theta:
        log = log + theta["decay_anneal"] * _log_left(step, num_steps, dtype, unknown=0.5)
    if "decay_power" in theta:
        log = log + theta["decay_power"] * _log_shorter(theta, step, num_steps, dtype)
    if "decay_fall" in theta:
        log = log - theta["decay_fall"] * _clipped(fall)
    if "decay_noise" in theta:
        log = log + theta["decay_noise"] * _noise(steadiness)
    return log


def fitted_decay(theta, plain: Plain, step, num_steps, fall) -> jax.Array:
    """[G]: the part of itself that every weight of a matrix loses in a step, where the horizon is
    known. fall: as of `counted`."""
    most = jnp.exp(theta["log_fitted_decay"]) * rate(theta, step, num_steps)
    fitted = jnp.square(_clipped(fall) / math.log(LOWEST)) * (1 - plain.vector)
    often = 1 - SELDOM / jnp.maximum(num_steps.astype(most.dtype), SELDOM)
    return most * _noise(plain.steadiness) * fitted * often


def _noise(steadiness) -> jax.Array:
    """From 0, where gradients have next to no noise, to 1."""
    return jnp.maximum(1 - STEADY * steadiness, 0)


def _clipped(fall) -> jax.Array:
    """log φ."""
    return jnp.clip(fall, math.log(LOWEST), 0)


def rate(theta, step, num_steps) -> jax.Array:
    """The nominal rate at a step: that of matrices of the usual size and number."""
    return jnp.exp(theta["log_rate"]) * schedule(theta, step, num_steps)


def schedule(theta, step, num_steps) -> jax.Array:
    """The factor on every rate at a step."""
    dtype = theta["log_rate"].dtype
    factor = jnp.exp(theta["anneal"] * _log_left(step, num_steps, dtype, unknown=1.0))
    if "horizon_power" in theta:
        shorter = _log_shorter(theta, step, num_steps, dtype)
        factor = factor * jnp.exp(theta["horizon_power"] * shorter)
    if "log_warm_up" in theta:
        factor = factor * -jnp.expm1(-(step.astype(dtype) + 1) * jnp.exp(-theta["log_warm_up"]))
    return factor


def _log_shorter(theta, step, num_steps, dtype) -> jax.Array:
    """log of `USUAL` over the horizon. Where there is none, over one that recedes: it is `USUAL`
    for the first `USUAL` / 2 steps, and grows with a power of t from there on."""
    horizon = jnp.maximum(num_steps.astype(dtype), SHORTEST)
    told = math.log(USUAL) - jnp.log(horizon)
    if "assumed_power" not in theta:
        return jnp.where(num_steps > 0, told, 0)
    ahead = jnp.log(jnp.maximum(2 / USUAL * step.astype(dtype), 1))
    return jnp.where(num_steps > 0, told, -theta["assumed_power"] * ahead)


def _log_left(step, num_steps, dtype, unknown: float) -> jax.Array:
    """log of half a cosine, from 1 at the first step to `ANNEALED` at the horizon; of `unknown`
    where there is no horizon."""
    t, horizon = step.astype(dtype), num_steps.astype(dtype)
    done = jnp.minimum(t / jnp.maximum(horizon, 1), 1)
    left = (0.5 * (1 + jnp.cos(jnp.pi * done)) + ANNEALED) / (1 + ANNEALED)
    return jnp.log(jnp.where(num_steps > 0, left, unknown))
