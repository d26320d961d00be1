"""Autoencoders on images."""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import optax

from l2l.core.base import TaskFamily
from l2l.data import datasets
from l2l.tasks import supervised
from l2l.tasks.mlp import dense, dense_init


def autoencoder(
    *,
    dataset: str = "digits",
    hidden: Sequence[int] = (32, 8, 32),
    objective: str = "mse",
    activations: Sequence[str] = supervised.DIVERSE,
    initial_scale: tuple[float, float] = (0.5, 2.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 128,
    init: str | float = "lecun",
) -> TaskFamily:
    """An MLP that gives its image back through a narrow middle.

    Args:
      dataset: a data set of images, in [0, 1] when they reach the network.
      hidden: the widths between image and image.
      objective: "mse", squared errors of a linear output; or "bce", the cross-entropy (nats) of a
        sigmoid output with the pixels as probabilities. Both are means over pixels and rows.
      activations, initial_scale, subset, batch_size, init: as in `mlp`.

    Returns:
      A family. Params, Problem, Batch and Data as in `mlp` (the labels are not used); no accuracy.
      The loss of "bce" ends at the entropy of the pixels, not at zero.
    """
    shape, _ = datasets.spec(dataset, "image")
    datasets.check_name("objective", objective, ("mse", "bce"))
    size, hidden = math.prod(shape), tuple(hidden)
    initialise = dense_init((size, *hidden, size), init)
    forward = dense(activations)

    def loss(params, problem, batch):
        inputs = supervised.cast(batch.inputs, params).reshape(len(batch.inputs), -1)
        outputs = forward(params, problem.activation, inputs)
        if objective == "mse":
            return jnp.mean((outputs - inputs) ** 2)
        return optax.sigmoid_binary_cross_entropy(outputs, inputs).mean()

    return TaskFamily(
        sample=supervised.sampler(activations, initial_scale, subset),
        init=lambda key, problem: initialise(key, problem.scale),
        batch=supervised.batcher(batch_size),
        loss=loss,
        data=supervised.loader(dataset),
        name="-".join(map(str, ("autoencoder", dataset, *hidden))),
    )
