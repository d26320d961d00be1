"""Models of characters, which predict the next one: transformers and recurrent networks."""

import functools
import math
from collections.abc import Callable, Sequence

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.data import datasets
from l2l.tasks import attention, supervised


def transformer(
    *,
    dataset: str = "pydoc",
    width: int = 32,
    layers: int = 2,
    heads: int = 2,
    context: int = 32,
    activations: Sequence[str] = ("gelu",),
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 32,
) -> TaskFamily:
    """A causal transformer, normalised before each block, with learned positions.

    Args:
      dataset: a text of `l2l.data.datasets`, in 128 characters.
      width: of the residual stream; the hidden layers have four times as many units.
      layers, heads: of attention.
      context: how many characters a row has, which is the most that a prediction sees.
      activations: of the hidden layers, one for each problem.
      initial_scale, subset: as in `mlp`; the subset is a stretch of the text.
      batch_size: rows per batch, from random places.

    Returns:
      A family. The loss is the cross-entropy per character, in nats. Problem: `supervised.Problem`.
      Batch: inputs and labels [n, context], the labels one character ahead. A whole split is cut
      into rows end to end (the last incomplete one left out). `accuracy` is the share of characters
      predicted.

    Raises:
      UserError: sizes that do not fit, or no text of that name; by the first batch, a split that is
        shorter than a row.
    """
    attention.check(width, layers, heads)
    activate = supervised.activation(activations)

    def network(index, characters):
        x = hk.Embed(datasets.spec(dataset).classes, width, name="embedding")(characters)
        positions = hk.get_parameter(
            "positions", (context, width), x.dtype, init=hk.initializers.RandomNormal(0.02)
        )
        x = x + positions[None]
        causal = jnp.tril(jnp.ones((1, 1, context, context), bool))
        w_init = hk.initializers.VarianceScaling(1.0, "fan_in", "normal")
        for i in range(layers):
            attend = hk.MultiHeadAttention(
                heads, width // heads, w_init=w_init, name=f"attention_{i}"
            )
            y = supervised.layer_norm(x, f"norm_{i}_0")
            x = x + attend(y, y, y, causal)
            y = hk.Linear(4 * width, w_init=w_init, name=f"mlp_{i}_0")(
                supervised.layer_norm(x, f"norm_{i}_1")
            )
            x = x + hk.Linear(width, w_init=w_init, name=f"mlp_{i}_1")(activate(index, y))
        return hk.Linear(datasets.spec(dataset).classes, name="linear")(
            supervised.layer_norm(x, "norm")
        )

    name = f"transformer-{dataset}-{layers}x{width}"
    return _family(name, network, dataset, context, activations, initial_scale, subset, batch_size)


def gru(
    *,
    dataset: str = "pydoc",
    width: int = 32,
    context: int = 32,
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 32,
) -> TaskFamily:
    """A gated recurrent network that starts each row from zeros. Settings, batches and loss as in
    `transformer`."""
    network = _recurrent(lambda: hk.GRU(width, name="gru"), dataset, width)
    name = f"gru-{dataset}-{width}"
    return _family(name, network, dataset, context, ("tanh",), initial_scale, subset, batch_size)


def char_lstm(
    *,
    dataset: str = "pydoc",
    embedding: int = 64,
    width: int = 256,
    context: int = 64,
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (1.0, 1.0),
    batch_size: int = 32,
) -> TaskFamily:
    """An LSTM language model that starts each row from zeros; the bias of its forget gate counts
    from one (Jozefowicz et al., 2015).

    Args:
      embedding: the numbers that stand for a character.
      width: units of the LSTM, whose one matrix is [embedding + width, 4 · width].
      dataset, context, initial_scale, subset, batch_size: as in `transformer`.

    Returns:
      A family; see `transformer`.
    """
    if embedding < 1 or width < 1:
        raise UserError(
            f"embedding={embedding} and width={width} leave no network: both must be 1 or more."
        )
    network = _recurrent(lambda: hk.LSTM(width, name="lstm"), dataset, embedding)
    name = f"char-lstm-{dataset}-{embedding}-{width}"
    return _family(name, network, dataset, context, ("tanh",), initial_scale, subset, batch_size)


def nanogpt(
    *,
    dataset: str | None = None,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    context: int = 64,
    activations: Sequence[str] = ("gelu_exact",),
    initial_scale: tuple[float, float] = (1.0, 1.0),
    subset: tuple[float, float] = (1.0, 1.0),
    batch_size: int = 12,
) -> TaskFamily:
    """nanoGPT's character model in its size for a CPU (Karpathy, 2022, `train_shakespeare_char`
    without dropout): 0.8 million parameters, an embedding shared with the output layer, no biases,
    weights N(0, 0.02²), those that add to the residual stream divided by √(2 · layers).

    The recipe that goes with it: 2,000 steps of AdamW, rate 1e-3 (100 steps of warm-up, cosine to
    1e-4), betas 0.9 and 0.99, decay 0.1 on matrices, gradients clipped to a norm of 1.

    Args:
      dataset: a text of `l2l.data.datasets`; None for tinyshakespeare where it is present, else
        pydoc. The family's name says which.
      width, layers, heads, context, activations, initial_scale, subset, batch_size: as in
        `transformer`.

    Returns:
      A family; see `transformer`. Only the text differs: its characters are those that occur in it,
      numbered in order, and its first 90 % are for training. The recipe validates on all of the
      last 10 %: here their first half is the validation split and their second the test split, so
      that the mean of the two losses is what it would print.

    Raises:
      UserError: as of `transformer`; or the text is absent, when it is first read.
    """
    if dataset is None:
        known = datasets.present("tinyshakespeare")
        dataset = "tinyshakespeare" if known else "pydoc"
    attention.check(width, layers, heads)
    activate = supervised.activation(activations)
    normal = hk.initializers.RandomNormal(0.02)
    smaller = hk.initializers.RandomNormal(0.02 / math.sqrt(2 * layers))

    def network(index, characters):
        size = len(np.unique(_characters(dataset)))
        embedding = hk.get_parameter("embedding", (size, width), init=normal)
        positions = hk.get_parameter("positions", (context, width), init=normal)
        x = embedding[characters] + positions[None]
        for i in range(layers):
            x = attention.block(
                x,
                functools.partial(activate, index),
                f"block_{i}",
                heads,
                causal=True,
                bias=False,
                w_init=normal,
                out_init=smaller,
            )
        return supervised.layer_norm(x, "norm", offset=False) @ embedding.T

    name = f"nanogpt-{dataset}-{layers}x{width}"
    family = _family(
        name, network, dataset, context, activations, initial_scale, subset, batch_size
    )
    return family._replace(data=functools.partial(_renumbered, dataset))


def _characters(dataset: str) -> np.ndarray:
    """The text in reading order, [n] uint8."""
    train, validation, test = datasets.load(dataset)
    return np.concatenate([train.inputs, validation.inputs, test.inputs, test.labels[-1:]])


def _renumbered(dataset: str) -> datasets.Dataset:
    """The text in numbers of the characters that occur, 90 %, 5 % and 5 % in reading order. No
    character is in two splits, as a label neither."""
    characters = _characters(dataset)
    _, numbers = np.unique(characters, return_inverse=True)
    first, second = int(0.9 * len(numbers)), int(0.95 * len(numbers))
    parts = np.split(numbers.astype(np.uint8), (first, second))
    return datasets.Dataset(*(datasets.Split(part[:-1], part[1:]) for part in parts))


def _recurrent(core: Callable[[], hk.RNNCore], dataset: str, embedding: int) -> Callable:
    """The network of `gru` and `char_lstm`."""
    classes = datasets.spec(dataset, "text").classes

    def network(index, characters):
        del index
        x = hk.Embed(classes, embedding, name="embedding")(characters)
        cell = core()
        start = jax.tree.map(lambda s: s.astype(x.dtype), cell.initial_state(len(x)))
        outputs, _ = hk.dynamic_unroll(cell, x, start, time_major=False)
        return hk.Linear(classes, name="linear")(jnp.asarray(outputs))

    return network


def _family(
    name: str,
    network: Callable,
    dataset: str,
    context: int,
    activations: Sequence[str],
    initial_scale: tuple[float, float],
    subset: tuple[float, float],
    batch_size: int,
) -> TaskFamily:
    datasets.spec(dataset, "text")
    if context < 1 or batch_size < 1:
        raise UserError(
            f"context={context} and batch_size={batch_size} leave nothing to predict: "
            "both must be 1 or more."
        )
    net = hk.without_apply_rng(hk.transform(network))

    def initialise(key, problem):
        params = net.init(key, problem.activation, jnp.zeros((1, context), jnp.int32))
        return supervised.rescaled(params, problem.scale)

    def batch(key, problem, data, split):
        inputs, labels = (jnp.asarray(a).astype(jnp.int32) for a in supervised.select(data, split))
        if len(labels) < context:
            raise UserError(
                f"context={context} is longer than the {split} split of {dataset}, of "
                f"{len(labels)} characters: use {len(labels)} at most, or a longer text."
            )
        if key is None:
            whole = len(labels) // context * context
            rows = (a[:whole].reshape(-1, context) for a in (inputs, labels))
        else:
            places = len(labels) - context + 1
            start = supervised.draw(key, problem, batch_size, places, split)
            index = start[:, None] + jnp.arange(context, dtype=jnp.int32)[None, :]
            rows = (inputs[index], labels[index])
        return supervised.Batch(*rows)

    def scores(params, problem, batch):
        """[n, 2]: the loss and the hits of each row. Scored by blocks, since the logits of a
        whole text would take half a gigabyte."""

        def score(pairs):
            inputs, labels = pairs[:, 0], pairs[:, 1]
            logits = net.apply(params, problem.activation, inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            right = (jnp.argmax(logits, -1) == labels).astype(losses.dtype)
            return jnp.stack([losses.mean(1), right.mean(1)], axis=1)

        return supervised.in_chunks(score, jnp.stack([batch.inputs, batch.labels], axis=1))

    return TaskFamily(
        sample=supervised.sampler(activations, initial_scale, subset),
        init=initialise,
        batch=batch,
        loss=lambda params, problem, batch: scores(params, problem, batch)[:, 0].mean(),
        accuracy=lambda params, problem, batch: scores(params, problem, batch)[:, 1].mean(),
        data=supervised.loader(dataset),
        name=name,
    )
