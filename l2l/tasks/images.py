"""Convolutional networks on images, and the image problems of Andrychowicz et al. (2016)."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.data import datasets
from l2l.tasks import supervised
from l2l.tasks.mlp import layers_init, mlp


def mnist(
    *,
    hidden: Sequence[int] = (20,),
    activation: str = "sigmoid",
    batch_size: int = 128,
    stddev: float = 0.01,
) -> TaskFamily:
    """The MNIST problem of Andrychowicz et al. (2016, section 3.2): a 784-20-10 MLP of sigmoids,
    weights and biases normal with `stddev`, 15,910 coordinates. Problems differ only in
    their initial values. It is `mlp` with other settings."""
    return mlp(
        dataset="mnist",
        hidden=hidden,
        activations=(activation,),
        initial_scale=(1.0, 1.0),
        subset=(1.0, 1.0),
        batch_size=batch_size,
        init=stddev,
    )


def cifar(
    *,
    channels: Sequence[int] = (16, 16, 16),
    dense: Sequence[int] = (32,),
    batch_norm: bool = True,
    batch_size: int = 128,
    stddev: float = 0.01,
) -> TaskFamily:
    """The CIFAR-10 problem of Andrychowicz et al. (2016, section 3.3): three 5×5 convolutions with
    batch normalisation, ReLU and pooling, then a layer of 32. It is `conv` with other settings.

    For the variant with one optimizer for the convolutions and one for the rest, assign them by
    the names of the parameters: all of them hold "conv" or "linear".
    """
    return conv(
        dataset="cifar10",
        channels=channels,
        kernel=5,
        dense=dense,
        batch_norm=batch_norm,
        activations=("relu",),
        initial_scale=(1.0, 1.0),
        subset=(1.0, 1.0),
        batch_size=batch_size,
        init=stddev,
    )


def conv(
    *,
    dataset: str = "digits",
    channels: Sequence[int] = (16, 16, 16),
    kernel: int = 3,
    dense: Sequence[int] = (32,),
    batch_norm: bool = False,
    activations: Sequence[str] = supervised.DIVERSE,
    initial_scale: tuple[float, float] = (0.5, 2.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 128,
    init: str | float = "lecun",
    name: str | None = None,
) -> TaskFamily:
    """Image classification by convolutions, each [normalised,] activated and max-pooled over 2×2.

    Args:
      dataset: a data set of images.
      channels: of the convolutional layers; each halves the image, so 8×8 carries at most three.
      kernel: the width of a filter, in pixels; padding keeps the size.
      dense: the widths of the hidden layers behind the convolutions.
      batch_norm: normalise every layer but the last by the mean and variance of its batch, before
        its bias is added. There are no running averages: whole splits are normalised in blocks of
        1,000 rows, each by its own statistics.
      init: "lecun", "he", "glorot", or a number, the standard deviation of weights and biases.
      activations, initial_scale, subset, batch_size, name: as in `mlp`.

    Returns:
      A family. Params: {"conv_0": {"w": [kernel, kernel, in, out], "b": [out]}, …,
      "linear_0": {"w": [in, out], "b": [out]}, …}. Problem and Batch as in `mlp`, the inputs
      [n, height, width, channels].

    Raises:
      UserError: an unknown data set, activation or init, an invalid range, or more layers than
        the image can be halved times.
    """
    shape, classes = datasets.spec(dataset, "image")
    channels, dense = tuple(channels), tuple(dense)
    most = (shape[0] - 1).bit_length()
    if not 1 <= len(channels) <= most:
        raise UserError(
            f"channels={channels} does not fit: each layer halves the {shape[0]}×{shape[1]} images "
            f"of {dataset}, so give 1 to {most} of them."
        )
    if kernel < 1:
        raise UserError(f"kernel={kernel} is not a filter width: use 1 or more pixels.")
    side = math.ceil(shape[0] / 2 ** len(channels))
    shapes = {
        f"conv_{i}": (kernel, kernel, *ends)
        for i, ends in enumerate(itertools.pairwise((shape[2], *channels)))
    } | {
        f"linear_{i}": ends
        for i, ends in enumerate(itertools.pairwise((side * side * channels[-1], *dense, classes)))
    }
    initialise = layers_init(shapes, init)
    activate = supervised.activation(activations)

    def network(params, index, x):
        def finish(x, layer):
            x = _normalise(x) if batch_norm else x
            return activate(index, x + jnp.broadcast_to(layer["b"], x.shape))

        for i in range(len(channels)):
            layer = params[f"conv_{i}"]
            x = _pool(finish(_convolve(x, layer["w"]), layer))
        x = x.reshape(len(x), -1)
        for i in range(len(dense)):
            layer = params[f"linear_{i}"]
            x = finish(x @ layer["w"], layer)
        last = params[f"linear_{len(dense)}"]
        return x @ last["w"] + last["b"][None, :]

    def logits(params, problem, batch):
        return supervised.in_chunks(
            lambda x: network(params, problem.activation, x),
            supervised.cast(batch.inputs, params),
        )

    return supervised.family(
        name or "-".join(map(str, ("conv", dataset, *channels, *dense))),
        logits,
        lambda key, problem: initialise(key, problem.scale),
        *(dataset, activations, initial_scale, subset, batch_size),
    )


def _convolve(x, w):
    # A product over patches gains a fifth on 8×8 images (a CPU, 4 problems): not worth a branch.
    return jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _normalise(x):
    axes = tuple(range(x.ndim - 1))
    x = x - x.mean(axes, keepdims=True)
    return x * jax.lax.rsqrt(jnp.mean(x**2, axes, keepdims=True) + 1e-3)


def _pool(x):
    """Max-pooling 2×2 by reshaping: quicker on a CPU than a window reduction, and its derivatives
    of every order exist. An odd last row or column is pooled alone."""
    n, h, w, c = x.shape
    x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-jnp.inf)
    return x.reshape(n, (h + 1) // 2, 2, (w + 1) // 2, 2, c).max((2, 4))
