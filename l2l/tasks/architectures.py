"""Other networks on images and tables, to see how far an optimizer generalises.

The training of the released optimizers has none of them. `residual`, `mixer` and `row_lstm` are
small; `resnet` and `vit` are models of real size unless they are told otherwise.
"""

import functools
from collections.abc import Callable, Sequence

import haiku as hk
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.data import datasets
from l2l.tasks import attention, supervised


def residual(
    *,
    dataset: str = "digits",
    width: int = 32,
    blocks: int = 3,
    activations: Sequence[str] = ("relu",),
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 64,
) -> TaskFamily:
    """An MLP of residual blocks: x + linear(activation(linear(layer_norm(x)))).

    Args:
      dataset: a name of `l2l.data.datasets` other than text; images are flattened.
      width: of the residual stream and of the hidden layers.
      blocks: how many.
      activations, initial_scale, subset, batch_size: as in `mlp`; the scale is on matrices alone.

    Returns:
      A family. Loss, accuracy, Problem, Batch and Data as in `mlp`; parameters by haiku's names.
    """
    shape, classes = datasets.spec(dataset, "vector")
    _check(width=width, blocks=blocks)
    activate = supervised.activation(activations)

    def network(index, x):
        x = hk.Linear(width, name="linear_0")(x.reshape(len(x), -1))
        for i in range(blocks):
            y = hk.Linear(width, name=f"block_{i}_0")(supervised.layer_norm(x, f"norm_{i}"))
            x = x + hk.Linear(width, name=f"block_{i}_1")(activate(index, y))
        return hk.Linear(classes or 1, name="linear_1")(supervised.layer_norm(x, "norm"))

    name = f"residual-{dataset}-{blocks}x{width}"
    return _family(name, network, dataset, shape, activations, initial_scale, subset, batch_size)


def mixer(
    *,
    dataset: str = "digits",
    width: int = 16,
    layers: int = 2,
    activations: Sequence[str] = ("gelu",),
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 64,
) -> TaskFamily:
    """An MLP-mixer (Tolstikhin et al., 2021) whose patches are the rows of the image: layers that
    mix rows, then channels, each normalised before and residual.

    Args:
      dataset: a data set of images.
      width: channels of a row; hidden layers have as many units as what they mix.
      layers: how many.
      activations, initial_scale, subset, batch_size: as in `mlp`; the scale is on matrices alone.

    Returns:
      A family; see `residual`.
    """
    shape, classes = datasets.spec(dataset, "image")
    _check(width=width, layers=layers)
    activate = supervised.activation(activations)

    def mix(index, x, size, name):
        hidden = activate(index, hk.Linear(size, name=f"{name}_0")(x))
        return hk.Linear(size, name=f"{name}_1")(hidden)

    def network(index, x):
        x = hk.Linear(width, name="rows")(x.reshape(*x.shape[:2], -1))
        for i in range(layers):
            y = jnp.swapaxes(supervised.layer_norm(x, f"norm_{i}_0"), 1, 2)
            x = x + jnp.swapaxes(mix(index, y, shape[0], f"tokens_{i}"), 1, 2)
            x = x + mix(index, supervised.layer_norm(x, f"norm_{i}_1"), width, f"channels_{i}")
        return hk.Linear(classes, name="linear")(supervised.layer_norm(x, "norm").mean(1))

    name = f"mixer-{dataset}-{layers}x{width}"
    return _family(name, network, dataset, shape, activations, initial_scale, subset, batch_size)


def row_lstm(
    *,
    dataset: str = "digits",
    width: int = 32,
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 64,
) -> TaskFamily:
    """An LSTM that reads an image row by row and predicts its class from the last state.

    Args:
      dataset: a data set of images.
      width: units of the LSTM.
      initial_scale, subset, batch_size: as in `mlp`; the scale is on matrices alone.

    Returns:
      A family; see `residual`.
    """
    shape, classes = datasets.spec(dataset, "image")
    _check(width=width)

    def network(index, x):
        del index
        rows = x.reshape(*x.shape[:2], -1)
        start = hk.LSTMState(*2 * (jnp.zeros((len(x), width), x.dtype),))
        outputs, _ = hk.dynamic_unroll(
            hk.LSTM(width, name="lstm"), rows, start, time_major=False, return_all_states=False
        )
        return hk.Linear(classes, name="linear")(jnp.asarray(outputs)[:, -1])

    name = f"row-lstm-{dataset}-{width}"
    return _family(name, network, dataset, shape, ("tanh",), initial_scale, subset, batch_size)


def resnet(
    *,
    dataset: str = "cifar10",
    channels: Sequence[int] = (16, 32, 64),
    depth: int = 1,
    groups: int = 8,
    activations: Sequence[str] = ("relu",),
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (1.0, 1.0),
    batch_size: int = 64,
) -> TaskFamily:
    """A residual network (He et al., 2016, section 4.2) with group normalisation (Wu and He, 2018)
    in the place of batch normalisation: 78,000 parameters and eight layers by default.

    A 3×3 convolution, stages of blocks of two such convolutions each, a mean over the image, and a
    linear layer. Each stage but the first halves the image, and a 1×1 convolution makes its input
    fit where the sizes differ. The last normalisation of a block starts at one, not at zero.

    Args:
      dataset: a data set of images.
      channels: of the stages.
      depth: blocks per stage; 3 is the ResNet-20 of the paper.
      groups: of a normalisation, which divide all `channels`.
      activations, initial_scale, subset, batch_size: as in `mlp`; the scale is on weights alone.

    Returns:
      A family; see `residual`. The convolutions' weights are [3, 3, in, out].
    """
    shape, classes = datasets.spec(dataset, "image")
    channels = tuple(channels)
    _check(depth=depth, groups=groups, channels=min(channels, default=0))
    if any(width % groups for width in channels):
        raise UserError(f"groups={groups} do not divide channels={channels}: use one that does.")
    activate = supervised.activation(activations)

    def convolve(x, width, stride, name, size=3):
        x = _Convolution(width, size, stride, name)(x)
        return hk.GroupNorm(groups, name=f"{name}_norm")(x)

    def network(index, x):
        x = activate(index, convolve(x, channels[0], 1, "conv"))
        for stage, width in enumerate(channels):
            for i in range(depth):
                name, stride = f"conv_{stage}_{i}", 2 if stage and not i else 1
                y = activate(index, convolve(x, width, stride, f"{name}_0"))
                y = convolve(y, width, 1, f"{name}_1")
                if x.shape != y.shape:
                    x = convolve(x, width, stride, f"{name}_short", size=1)
                x = activate(index, x + y)
        return hk.Linear(classes, name="linear")(x.mean((1, 2)))

    name = f"resnet-{dataset}-{depth}x" + "-".join(map(str, channels))
    return _family(name, network, dataset, shape, activations, initial_scale, subset, batch_size)


class _Convolution(hk.Module):
    """[n, height, width, in] -> [n, ⌈height/stride⌉, ⌈width/stride⌉, out] by filters of an odd size
    without biases. A product with shifted copies: a step of `resnet()` inside `scan` takes 0.3 s of
    a CPU so, and 3.6 s with XLA's own convolutions (jax 0.10.2), which are as fast outside only."""

    def __init__(self, width: int, size: int, stride: int, name: str):
        super().__init__(name)
        self.width, self.size, self.stride = width, size, stride

    def __call__(self, x):
        size, step, (_, height, width, channels) = self.size, self.stride, x.shape
        init = hk.initializers.VarianceScaling(2.0, "fan_in", "normal")
        w = hk.get_parameter("w", (size, size, channels, self.width), x.dtype, init)
        edge = (size // 2, size // 2)
        x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
        shifted = [
            x[:, i : i + height : step, j : j + width : step]
            for i in range(size)
            for j in range(size)
        ]
        return jnp.concatenate(shifted, -1) @ w.reshape(-1, self.width)


def vit(
    *,
    dataset: str = "mnist",
    patch: int = 4,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    activations: Sequence[str] = ("gelu",),
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (1.0, 1.0),
    batch_size: int = 128,
) -> TaskFamily:
    """A vision transformer (Dosovitskiy et al., 2021) that predicts the class from the mean of its
    patches (Beyer et al., 2022): 205,000 parameters by default.

    Args:
      dataset: a data set of images.
      patch: pixels on the side of a patch; must divide the image.
      width: of the residual stream; the hidden layers have four times as many units.
      layers, heads: of attention.
      activations, initial_scale, subset, batch_size: as in `mlp`; the scale is on matrices alone.

    Returns:
      A family; see `residual`.
    """
    shape, classes = datasets.spec(dataset, "image")
    if patch < 1 or shape[0] % patch or shape[1] % patch:
        raise UserError(
            f"patch={patch} does not divide the {shape[0]}×{shape[1]} images of {dataset}: "
            "use a number of pixels that does."
        )
    attention.check(width, layers, heads)
    activate = supervised.activation(activations)
    rows, columns = shape[0] // patch, shape[1] // patch

    def network(index, x):
        x = x.reshape(len(x), rows, patch, columns, patch, shape[2]).swapaxes(2, 3)
        x = hk.Linear(width, name="patches")(x.reshape(len(x), rows * columns, -1))
        init = hk.initializers.RandomNormal(0.02)
        x = x + hk.get_parameter("positions", x.shape[1:], x.dtype, init=init)[None]
        for i in range(layers):
            x = attention.block(x, functools.partial(activate, index), f"block_{i}", heads)
        return hk.Linear(classes, name="linear")(supervised.layer_norm(x, "norm").mean(1))

    name = f"vit-{dataset}-{layers}x{width}"
    return _family(name, network, dataset, shape, activations, initial_scale, subset, batch_size)


def _check(**sizes: int):
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}={size} leaves no network: use 1 or more.")


def _family(
    name: str,
    network: Callable,
    dataset: str,
    shape: tuple[int, ...],
    activations: Sequence[str],
    initial_scale: tuple[float, float],
    subset: tuple[float, float],
    batch_size: int,
) -> TaskFamily:
    net = hk.without_apply_rng(hk.transform(network))

    def outputs(params, problem, batch):
        inputs = supervised.cast(batch.inputs, params)
        return supervised.in_chunks(lambda x: net.apply(params, problem.activation, x), inputs)

    def init(key, problem):
        params = net.init(key, problem.activation, jnp.zeros((1, *shape)))
        return supervised.rescaled(params, problem.scale)

    return supervised.family(
        name, outputs, init, dataset, activations, initial_scale, subset, batch_size
    )
