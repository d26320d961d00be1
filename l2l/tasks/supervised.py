"""What families of supervised problems share: the problem, its batches, its activation, its loss.

A problem is a way to learn from a fixed data set: an activation, a factor on the initial weights,
and the part of the training split it may see.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.data import datasets

ACTIVATIONS = {
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "sin": jnp.sin,
}
DIVERSE = ("relu", "tanh", "sigmoid", "gelu")


class Problem(NamedTuple):
    """All scalars.

    activation: an index into the family's activations, int32.
    scale:      the factor on the initial weights.
    fraction:   the share of the training split that is seen, in (0, 1].
    offset:     where its window starts, as a share of the split, in [0, 1).
    distinct:   the share of a training batch's rows that differ, in (0, 1]; None for all of them.
    """

    activation: jax.Array
    scale: jax.Array
    fraction: jax.Array
    offset: jax.Array
    distinct: Any = None


class Batch(NamedTuple):
    """inputs: [n, …], images as float32 in [0, 1]. labels: [n], int32 classes or a target."""

    inputs: Any
    labels: Any


def sampler(
    activations: Sequence[str],
    initial_scale: tuple[float, float],
    subset: tuple[float, float],
    distinct: tuple[float, float] = (1.0, 1.0),
) -> Callable[[jax.Array], Problem]:
    """Makes `sample`: a uniform activation and offset, and log-uniform shares and scale."""
    activations = check_activations(activations)
    check_range("initial_scale", initial_scale)
    check_range("subset", subset, highest=1.0)
    check_range("distinct", distinct, highest=1.0)

    def sample(key):
        keys = jax.random.split(key, 4)
        drawn = log_uniform(jax.random.fold_in(key, 4), distinct) if min(distinct) < 1 else None
        return Problem(
            jax.random.randint(keys[0], (), 0, len(activations), jnp.int32),
            log_uniform(keys[1], initial_scale),
            log_uniform(keys[2], subset),
            jax.random.uniform(keys[3]),
            drawn,
        )

    return sample


def log_uniform(key: jax.Array, limits: tuple[float, float], shape: tuple[int, ...] = ()):
    """exp(U(log low, log high)), [shape]."""
    low, high = limits
    return jnp.exp(jax.random.uniform(key, shape, minval=math.log(low), maxval=math.log(high)))


def batcher(batch_size: int) -> Callable:
    """Makes `batch` over a `Dataset`: `batch_size` rows drawn uniformly, with replacement.

    Training rows come from the problem's window of the training split, which wraps round its end;
    the rows of the other splits from all of it. `key=None` gives the whole split in order: for
    "train" too all of it, whatever the problem's window, so that problems can be compared.
    """
    check_counts(batch_size=batch_size)

    def batch(key, problem, data, split):
        inputs, labels = (jnp.asarray(array) for array in select(data, split))
        if key is not None:
            index = draw(key, problem, batch_size, len(labels), split)
            inputs, labels = inputs[index], labels[index]
        return Batch(pixels(inputs), labels)

    return batch


def select(data: datasets.Dataset, split: str) -> datasets.Split:
    """The named split of a data set."""
    return getattr(data, datasets.check_name("split", split, datasets.Dataset._fields))


def number_of(split: str) -> int:
    """Where the named split of a data set stands among its splits."""
    names = datasets.Dataset._fields
    return names.index(datasets.check_name("split", split, names))


def draw(key: jax.Array, problem: Problem, count: int, rows: int, split: str) -> jax.Array:
    """`count` row numbers below `rows`, int32; those for "train" within the problem's window, and
    repeated where not all are to differ: such a batch has the noise of a smaller one."""
    if split != "train":
        return jax.random.randint(key, (count,), 0, rows, jnp.int32)
    length = jnp.clip(jnp.round(problem.fraction * rows).astype(jnp.int32), 1, rows)
    start = jnp.floor(problem.offset * rows).astype(jnp.int32)
    index = (start + jax.random.randint(key, (count,), 0, length, jnp.int32)) % rows
    if problem.distinct is None:
        return index
    different = jnp.clip(jnp.round(problem.distinct * count).astype(jnp.int32), 1, count)
    return index[jnp.arange(count) % different]


def pixels(inputs: jax.Array) -> jax.Array:
    """Bytes as float32 in [0, 1]; anything else as it is."""
    return inputs.astype(jnp.float32) / 255 if inputs.dtype == jnp.uint8 else inputs


def loader(dataset: str) -> Callable[[], datasets.Dataset]:
    """Makes `data`: the arrays of the data set. A partial, by which families on the same data set
    are known (`training.experiment.Experiment.reads`)."""
    return functools.partial(datasets.load, dataset)


def activation(names: Sequence[str]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Makes (index, x) -> the activation of that index. Under `vmap` all of them are computed."""
    functions = [ACTIVATIONS[name] for name in check_activations(names)]
    if len(functions) == 1:
        return lambda index, x: functions[0](x)
    return lambda index, x: jax.lax.switch(index, functions, x)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean softmax cross-entropy in nats: logits [..., classes], labels [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32)).mean()


def hits(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of labels that have the largest logit: logits [..., classes], labels [...]."""
    return jnp.mean(jnp.argmax(logits, -1) == labels)


def cast(inputs: jax.Array, params) -> jax.Array:
    """The inputs in the precision of the parameters, so that float64 stays float64."""
    return inputs.astype(jnp.result_type(*jax.tree.leaves(params)))


def family(
    name: str,
    outputs: Callable,
    init: Callable,
    dataset: str,
    activations: Sequence[str],
    initial_scale: tuple[float, float],
    subset: tuple[float, float],
    batch_size: int,
    distinct: tuple[float, float] = (1.0, 1.0),
) -> TaskFamily:
    """A family of networks on a data set: classification by cross-entropy, or regression by the
    mean squared error of the first output where the data set has no classes.

    Args:
      outputs: (params, problem, batch) -> [n, classes or 1].
      init: (key, problem) -> Params.
    """
    classes = datasets.spec(dataset).classes

    def loss(params, problem, batch):
        out = outputs(params, problem, batch)
        if classes:
            return cross_entropy(out, batch.labels)
        return jnp.mean((out[:, 0] - batch.labels.astype(out.dtype)) ** 2)

    def accuracy(params, problem, batch):
        return hits(outputs(params, problem, batch), batch.labels)

    return TaskFamily(
        sample=sampler(activations, initial_scale, subset, distinct),
        init=init,
        batch=batcher(batch_size),
        loss=loss,
        accuracy=accuracy if classes else None,
        data=loader(dataset),
        name=name,
    )


def rescaled(params, scale: jax.Array):
    """The parameters with their matrices times `scale`. Vectors are offsets and the scales of
    normalisation: they start where they should."""
    return jax.tree.map(lambda p: p * scale.astype(p.dtype) if p.ndim > 1 else p, params)


def layer_norm(x: jax.Array, name: str, *, offset: bool = True) -> jax.Array:
    """Layer normalisation over the last axis with a scale of its own and, unless told otherwise, an
    offset, inside haiku."""
    return hk.LayerNorm(-1, create_scale=True, create_offset=offset, name=name)(x)


def in_chunks(apply: Callable, inputs: jax.Array, rows: int = 1000) -> jax.Array:
    """apply(inputs), at most `rows` rows at a time: a whole split need not fit as activations."""
    if len(inputs) <= rows:
        return apply(inputs)
    whole, rest = divmod(len(inputs), rows)
    blocks = inputs[: whole * rows].reshape(whole, rows, *inputs.shape[1:])
    outputs = jax.lax.map(apply, blocks)
    outputs = outputs.reshape(whole * rows, *outputs.shape[2:])
    if not rest:
        return outputs
    # The last block overlaps: batch norm over a rest of few rows would be another network.
    return jnp.concatenate([outputs, apply(inputs[-rows:])[-rest:]])


def check_activations(names: Sequence[str]) -> tuple[str, ...]:
    """A tuple of known activations (one name counts as a tuple), or a UserError."""
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names:
        raise UserError("activations=() leaves no network: name at least one, like 'relu'.")
    return tuple(datasets.check_name("activation", name, ACTIVATIONS) for name in names)


def check_counts(**counts: int) -> None:
    """UserError for a number of examples that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise UserError(f"{name}={count} leaves nothing to learn from: use 1 or more.")


def check_range(name: str, limits: tuple[float, float], highest: float = math.inf) -> None:
    """A UserError unless `limits` is a pair with 0 < low <= high <= highest."""
    if len(limits) != 2 or not 0 < limits[0] <= limits[1] <= highest:
        bound = "" if highest == math.inf else f" <= {highest:g}"
        raise UserError(
            f"{name}={limits!r} is not a range to draw from on a logarithmic scale: "
            f"give (low, high) with 0 < low <= high{bound}."
        )
