"""Small models of characters: a transformer and a GRU that predict the next one."""

from collections.abc import Callable, Sequence

import haiku as hk
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.data import datasets
from l2l.tasks import supervised


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
      context: how many characters a row has, and the most that a prediction sees.
      activations: of the hidden layers, one a problem.
      initial_scale, subset: as in `mlp`; the subset is a stretch of the text.
      batch_size: rows a batch, from random places.

    Returns:
      A family. The loss is the cross-entropy a character, in nats. Problem: `supervised.Problem`.
      Batch: inputs and labels [n, context], the labels one character on. A whole split is cut into
      rows end to end (the last incomplete one left out). `accuracy` is the share of characters
      predicted.
    """
    if layers < 1 or heads < 1 or width % heads:
        raise UserError(
            f"layers={layers} and heads={heads} do not fit width={width}: "
            "use at least one of each, and a number of heads that divides the width."
        )
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
            attention = hk.MultiHeadAttention(
                heads, width // heads, w_init=w_init, name=f"attention_{i}"
            )
            y = supervised.layer_norm(x, f"norm_{i}_0")
            x = x + attention(y, y, y, causal)
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

    def network(index, characters):
        del index
        x = hk.Embed(datasets.spec(dataset).classes, width, name="embedding")(characters)
        start = jnp.zeros((len(x), width), x.dtype)
        x, _ = hk.dynamic_unroll(hk.GRU(width, name="gru"), x, start, time_major=False)
        return hk.Linear(datasets.spec(dataset).classes, name="linear")(x)

    name = f"gru-{dataset}-{width}"
    return _family(name, network, dataset, context, ("tanh",), initial_scale, subset, batch_size)


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
