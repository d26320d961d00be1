"""Autoencoders on images, plain and variational."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
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
    """An MLP that reproduces its image through a narrow middle layer.

    Args:
      dataset: a data set of images, in [0, 1] when they reach the network.
      hidden: the widths of the layers between input and output.
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


class Sampled(NamedTuple):
    """inputs: [n, height, width, channels], images in [0, 1]. key: of the latent noise."""

    inputs: Any
    key: jax.Array


def vae(
    *,
    dataset: str = "mnist",
    hidden: Sequence[int] = (300, 100),
    latent: int = 16,
    activations: Sequence[str] = ("relu",),
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (1.0, 1.0),
    batch_size: int = 128,
    init: str | float = "lecun",
) -> TaskFamily:
    """A variational autoencoder (Kingma and Welling, 2014): 784-300-100-16-100-300-784 by default.

    q(z|x) = N(μ(x), diag σ²(x)), p(z) = N(0, I), p(x|z) Bernoulli with the pixels as probabilities;
    the loss is −ELBO = E_q[−log p(x|z)] + KL(q ‖ p), a sum over pixels and latent variables, in
    nats per image, with one z = μ + σ·ε per image.

    Args:
      dataset: a data set of images.
      hidden: the widths of the encoder; those of the decoder are the same, backwards.
      latent: how many latent variables.
      activations, initial_scale, subset, batch_size, init: as in `mlp`.

    Returns:
      A family without accuracy. Params: {"encoder": layers, "decoder": layers} as in `mlp`; the
      encoder's output is μ, then log σ². Problem and Data as in `mlp`. Batch: `Sampled`; whole
      splits (`key=None`) come with the same noise every time.
    """
    shape, _ = datasets.spec(dataset, "image")
    if latent < 1:
        raise UserError(f"latent={latent} leaves nothing to sample: use 1 or more.")
    size, hidden = math.prod(shape), tuple(hidden)
    encoder = dense_init((size, *hidden, 2 * latent), init)
    decoder = dense_init((latent, *reversed(hidden), size), init)
    forward, images = dense(activations), supervised.batcher(batch_size)

    def initialise(key, problem):
        keys = jax.random.split(key)
        scale = problem.scale
        return {"encoder": encoder(keys[0], scale), "decoder": decoder(keys[1], scale)}

    def batch(key, problem, data, split):
        if key is None:
            return Sampled(images(None, problem, data, split).inputs, jax.random.key(0))
        rows, noise = jax.random.split(key)
        return Sampled(images(rows, problem, data, split).inputs, noise)

    def loss(params, problem, batch):
        def negative_elbo(pairs):
            x, noise = pairs[:, :size], pairs[:, size:]
            mean, log_var = jnp.split(forward(params["encoder"], problem.activation, x), 2, axis=1)
            z = mean + jnp.exp(log_var / 2) * noise
            logits = forward(params["decoder"], problem.activation, z)
            divergence = (mean**2 + jnp.exp(log_var) - 1 - log_var).sum(1) / 2
            return optax.sigmoid_binary_cross_entropy(logits, x).sum(1) + divergence

        x = supervised.cast(batch.inputs, params).reshape(len(batch.inputs), -1)
        noise = jax.random.normal(batch.key, (len(x), latent), x.dtype)
        return supervised.in_chunks(negative_elbo, jnp.concatenate([x, noise], axis=1)).mean()

    return TaskFamily(
        sample=supervised.sampler(activations, initial_scale, subset),
        init=initialise,
        batch=batch,
        loss=loss,
        data=supervised.loader(dataset),
        name="-".join(map(str, ("vae", dataset, *hidden, latent))),
    )
