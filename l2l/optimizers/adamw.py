"""AdamW with rate, decay and schedule in theta, for hypergradients through whole runs."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import leaves, ranges


class AdamWState(NamedTuple):
    """adam: of `optax.scale_by_adam`, whose count is the number of steps taken."""

    adam: Any


def learned_adamw(
    *,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    b1: float = 0.9,
    b2: float = 0.999,
    eps_root: float = 1e-8,
    knots: int = 0,
) -> base.LearnedOptimizer:
    """`optax.adamw(eps_root=…)` whose learning rate, weight decay and schedule are meta-learned:

        u = −r(t/T) (m̂ / (√(v̂ + eps_root) + 1e-8) + λ θ),   r(p) = exp(log rate + s(p))

    with s linear between `knots` evenly spaced values over the run of T steps. Where the horizon is
    not known, s is its first value.

    theta: "log_learning_rate", "log_weight_decay", and with knots "schedule" [knots], zeros at
    first.

    Args:
      learning_rate, weight_decay: where learning begins; b1, b2 and eps_root are fixed.
      knots: 0 for a constant rate, or at least 2.

    Raises:
      UserError: a setting is out of range, or one knot.
    """
    ranges.decay("b1", b1)
    ranges.decay("b2", b2)
    ranges.not_negative("eps_root", eps_root)
    if not (learning_rate > 0 and weight_decay > 0):
        raise UserError(
            f"learning_rate={learning_rate}, weight_decay={weight_decay} cannot be learned in log "
            "space: use positive numbers."
        )
    if knots == 1 or knots < 0:
        raise UserError(f"knots={knots} make no schedule: use 0 for none, or 2 or more.")
    scale: Any = optax.scale_by_adam(b1=b1, b2=b2, eps_root=eps_root)

    def init(key):
        del key
        theta = {
            "log_learning_rate": jnp.asarray(math.log(learning_rate), jnp.float32),
            "log_weight_decay": jnp.asarray(math.log(weight_decay), jnp.float32),
        }
        return theta | ({"schedule": jnp.zeros(knots, jnp.float32)} if knots else {})

    def rate(theta, step, num_steps):
        log_rate = theta["log_learning_rate"]
        if knots:
            progress = step / jnp.maximum(num_steps, 1)
            progress = jnp.where(num_steps > 0, progress, 0.0)
            log_rate += jnp.interp(progress, jnp.linspace(0.0, 1.0, knots), theta["schedule"])
        return jnp.exp(log_rate)

    def bind(theta):
        def update(updates, state, params=None, *, num_steps=None, **extra_args):
            del extra_args
            if params is None:
                raise UserError(
                    "Weight decay needs the parameters, and `params` is None: call "
                    "update(gradients, state, params)."
                )
            own = rate(theta, state.adam.count, leaves.horizon(num_steps))
            decay = jnp.exp(theta["log_weight_decay"])
            direction, adam = scale.update(base.single(updates), state.adam)
            updates = jax.tree.map(
                lambda d, p: (-own * (d + decay * p)).astype(jnp.result_type(p)), direction, params
            )
            return updates, AdamWState(adam)

        return optax.GradientTransformationExtraArgs(
            lambda params: AdamWState(scale.init(base.single(params))), update
        )

    return base.LearnedOptimizer(init, bind)
