"""Settings of the loss of inner training, for theta to hold: regularisers and weights of the data.

What they do to the loss is judged by the meta-loss, the task's own loss on other data.
"""

import math

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core.base import LearnedLoss


def l2(*, coefficient: float = 1e-3) -> LearnedLoss:
    """ℓ(θ) + ½ Σₜ exp(cₜ) ‖θₜ‖², with a learned cₜ for each tensor θₜ: weight decay as part of the
    loss. theta: like Params, with a scalar cₜ in place of each tensor.

    Args:
      coefficient: exp(cₜ) where learning begins.

    Raises:
      UserError: it is not positive.
    """
    if not coefficient > 0:
        raise UserError(
            f"coefficient={coefficient} has no logarithm to learn: use a positive number."
        )

    def bind(theta, loss):
        def penalised(params, problem, batch):
            terms = jax.tree.map(lambda c, p: jnp.exp(c) * jnp.sum(p * p) / 2, theta, params)
            value = loss(params, problem, batch)
            return value + jnp.asarray(sum(jax.tree.leaves(terms)), value.dtype)

        return penalised

    def init(key, params):
        del key
        return jax.tree.map(lambda p: jnp.asarray(math.log(coefficient), jnp.float32), params)

    return LearnedLoss(init, bind)


def label_weights(*, classes: int) -> LearnedLoss:
    """Σᵢ w(yᵢ) ℓᵢ / Σᵢ w(yᵢ), the weighted mean over the rows of a batch, with w = exp(theta) for
    each class of labels. theta: [classes].

    For tasks whose batches have integer `labels` [n] and whose loss is a mean over rows.

    Args:
      classes: how many there are.
    """

    def bind(theta, loss):
        def weighted(params, problem, batch):
            def row(one):
                return loss(params, problem, jax.tree.map(lambda x: x[None], one))

            losses = jax.vmap(row)(batch)
            weights = jnp.exp(theta)[batch.labels].astype(losses.dtype)
            return jnp.sum(weights * losses) / jnp.sum(weights)

        return weighted

    return LearnedLoss(lambda key, params: jnp.zeros(classes), bind)


LOSSES = {"l2": l2, "label_weights": label_weights}
