"""Multi-layer perceptrons on real data, with a random activation, initial scale and subset."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.data import datasets
from l2l.tasks import supervised

# The standard deviation of a weight by the number of inputs and outputs of its unit.
_INITS = {
    "lecun": lambda fan_in, fan_out: math.sqrt(1 / fan_in),
    "he": lambda fan_in, fan_out: math.sqrt(2 / fan_in),
    "glorot": lambda fan_in, fan_out: math.sqrt(2 / (fan_in + fan_out)),
}


def mlp(
    *,
    dataset: str = "digits",
    hidden: Sequence[int] = (32,),
    activations: Sequence[str] = supervised.DIVERSE,
    initial_scale: tuple[float, float] = (0.5, 2.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 128,
    distinct: tuple[float, float] = (1.0, 1.0),
    init: str | float = "lecun",
    layer_norm: bool = False,
    name: str | None = None,
) -> TaskFamily:
    """Classification by softmax cross-entropy (nats), or regression by mean squared error.

    Args:
      dataset: a name of `l2l.data.datasets` other than text; images are flattened.
      hidden: the widths of the hidden layers; () is a linear model.
      activations: each problem has one of these: relu, tanh, sigmoid, gelu (by tanh), gelu_exact,
        silu, sin.
      initial_scale: a factor on the initial weights, drawn log-uniformly from this range for each
        problem.
      subset: the share of the training split that a problem sees, drawn log-uniformly from this
        range. Whole splits (`key=None`) are whole whatever the subset.
      batch_size: rows per batch.
      distinct: the share of distinct rows in a training batch, drawn log-uniformly from this range
        for each problem; the other rows repeat these. The gradient is then as noisy as that of a
        smaller batch.
      init: "lecun", "he" or "glorot" for normal weights of that variance and biases of zero; or a
        number, the standard deviation of weights and biases alike.
      layer_norm: normalise each hidden layer over its units (Ba et al., 2016), then activate.
      name: what tables call the family; by default made up of the data set and the widths.

    Returns:
      A family. Params: {"linear_0": {"w": [in, out], "b": [out]}, …}, and with layer_norm
      {"norm_0": {"scale": [out], "offset": [out]}, …}. Problem:
      `supervised.Problem`. Batch: `supervised.Batch`. Data: `datasets.Dataset`. `accuracy` is None
      for regression.

    Raises:
      UserError: an unknown data set, activation or init, or an invalid range.
    """
    shape, classes = datasets.spec(dataset, "vector")
    hidden = tuple(hidden)
    sizes = (math.prod(shape), *hidden, classes or 1)
    initialise = dense_init(sizes, init, layer_norm)
    forward = dense(activations)

    def outputs(params, problem, batch):
        inputs = supervised.cast(batch.inputs, params)
        return forward(params, problem.activation, inputs.reshape(len(inputs), -1))

    return supervised.family(
        name or "-".join(map(str, ("mlp-norm" if layer_norm else "mlp", dataset, *hidden))),
        outputs,
        lambda key, problem: initialise(key, problem.scale),
        *(dataset, activations, initial_scale, subset, batch_size, distinct),
    )


def dense_init(sizes: Sequence[int], init: str | float = "lecun", layer_norm: bool = False):
    """Makes (key, scale) -> parameters of linear layers between `sizes`, the weights times
    `scale`, all but the last layer followed by a normalisation if `layer_norm`."""
    shapes = {f"linear_{i}": shape for i, shape in enumerate(itertools.pairwise(sizes))}
    layers = layers_init(shapes, init)
    hidden = sizes[1:-1] if layer_norm else ()

    def initialise(key, scale):
        norms = {
            f"norm_{i}": {"scale": jnp.ones(size), "offset": jnp.zeros(size)}
            for i, size in enumerate(hidden)
        }
        return layers(key, scale) | norms

    return initialise


def layers_init(shapes: dict[str, tuple[int, ...]], init: str | float = "lecun"):
    """Makes (key, scale) -> {name: {"w": shape, "b": shape[-1:]}}; the last axis is the output."""
    for name, shape in shapes.items():
        if any(size < 1 for size in shape):
            raise UserError(
                f"{name} of shape {shape} is impossible: every width must be 1 or more."
            )
    if isinstance(init, str):
        datasets.check_name("init", init, _INITS)
    elif init < 0:
        raise UserError(f"init={init} is a standard deviation below zero: use a positive number.")

    def initialise(key, scale):
        params = {}
        for i, (name, shape) in enumerate(shapes.items()):
            w_key, b_key = jax.random.split(jax.random.fold_in(key, i))
            w, b = jax.random.normal(w_key, shape), jnp.zeros(shape[-1])
            if isinstance(init, str):
                around = math.prod(shape[:-2])  # The area of a filter; 1 for a linear layer.
                w *= _INITS[init](around * shape[-2], around * shape[-1])
            else:
                w, b = w * init, jax.random.normal(b_key, b.shape) * init
            params[name] = {"w": scale * w, "b": b}
        return params

    return initialise


def dense(activations: Sequence[str]):
    """Makes (params, activation index, inputs [n, in]) -> [n, out]; the last layer is linear, and
    those that have a "norm_i" are normalised."""
    activate = supervised.activation(activations)

    def forward(params, index, x):
        for i in range(sum(name.startswith("linear_") for name in params)):
            layer, norm = params[f"linear_{i}"], params.get(f"norm_{i}")
            x = x if i == 0 else activate(index, x)
            x = x @ layer["w"] + layer["b"][None, :]
            if norm is not None:
                x = jax.nn.standardize(x, axis=-1, epsilon=1e-5)
                x = x * norm["scale"][None, :] + norm["offset"][None, :]
        return x

    return forward
