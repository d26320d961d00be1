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

    For tasks whose batches have integer `labels` [n] and whose loss is a mean over rows. A label
    that is none of the classes makes it NaN.

    Args:
      classes: how many there are, numbered from 0.

    Raises:
      UserError: by `check`, which reads the data, or where the loss is computed: the batches have
        no such labels. By `check` alone: a label of the training split is none of the classes.
    """

    def bind(theta, loss):
        def weighted(params, problem, batch):
            def row(one):
                return loss(params, problem, jax.tree.map(lambda x: x[None], one))

            labels = _labels(batch, "this task")
            losses = jax.vmap(row)(batch)
            # An index out of range would be taken for the last.
            weights = jnp.exp(theta).at[labels].get(mode="fill", fill_value=jnp.nan)
            weights = weights.astype(losses.dtype)
            return jnp.sum(weights * losses) / jnp.sum(weights)

        return weighted

    def check(family):
        def limits(data):
            problem = family.sample(jax.random.key(0))
            labels = _labels(family.batch(None, problem, data, "train"), family.name)
            return labels.min(), labels.max()

        # Compiled: of what makes a batch only the labels are computed.
        low, high = map(int, jax.jit(limits)(family.data()))
        if low < 0 or high >= classes:
            raise UserError(
                f"The labels of {family.name} go from {low} to {high}, but theta.loss has "
                f"classes={classes}: set it to the number of classes, which count from 0."
            )

    return LearnedLoss(lambda key, params: jnp.zeros(classes), bind, check)


def _labels(batch, name: str) -> jax.Array:
    """The labels of a batch, [n] integers; a UserError about the task where it has none."""
    labels = getattr(batch, "labels", None)
    if labels is not None and jnp.ndim(labels) == 1 and jnp.issubdtype(labels.dtype, jnp.integer):
        return labels
    found = "no labels" if labels is None else f"labels of {labels.dtype}{list(labels.shape)}"
    raise UserError(
        f"The loss 'label_weights' weighs rows by their class, an integer each, but the batches of "
        f"{name} have {found}: train on a task of classification, or choose the loss 'l2'."
    )


LOSSES = {"l2": l2, "label_weights": label_weights}
