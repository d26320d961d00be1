"""Few-shot classification of small images: a few examples of each of a few distorted classes."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.data import datasets
from l2l.tasks import supervised
from l2l.tasks.mlp import dense, dense_init


class FewShot(NamedTuple):
    """Of N ways. classes: [N], which of the data set's is which label. angle: [N], radians. shift:
    [N, 2], pixels. key: which images are the support and the query comes from it."""

    classes: jax.Array
    angle: jax.Array
    shift: jax.Array
    key: jax.Array


def few_shot(
    *,
    dataset: str = "digits",
    ways: int = 5,
    shots: int = 5,
    queries: int = 10,
    hidden: Sequence[int] = (64,),
    activation: str = "relu",
    rotation: float = 180.0,
    shift: float = 1.0,
    init: str | float = "lecun",
) -> TaskFamily:
    """N-way classification where each class is one of the data set's, turned and shifted by amounts
    of its own, under a label of its own: problems share what images look like, and nothing else.

    Each problem has a fixed support set, `shots` training images of each class, of which every
    training batch is the whole; a fixed query set of `queries` validation images of each class; and
    as many test images as its test split.

    Args:
      dataset: grey images in classes: digits, mnist14, mnist, fashion_mnist.
      ways: N classes, drawn without replacement.
      rotation: degrees; angles are uniform within ± this.
      shift: pixels; shifts are uniform within ± this, along either axis.
      hidden, activation, init: of the network, an MLP, as in `mlp`.

    Returns:
      A family. Params as in `mlp`. Problem: `FewShot`. Batch: inputs [N · n, pixels], labels.
      Data: (train, validation, test), each [classes, rows, height, width].

    Raises:
      UserError: another kind of data set, more ways than classes, nothing to learn from, or a
        negative range; by the first batch, fewer images of a class than shots or queries.
    """
    shape, classes = datasets.spec(dataset, "vector")
    if not classes or len(shape) != 3 or shape[-1] != 1:
        raise UserError(
            f"dataset={dataset!r} is not a set of grey images in classes: use 'digits'."
        )
    if not 2 <= ways <= classes:
        raise UserError(
            f"ways={ways} does not fit the {classes} classes of {dataset}: use 2 to {classes}."
        )
    supervised.check_counts(shots=shots, queries=queries)
    for name, most in (("rotation", rotation), ("shift", shift)):
        if not 0 <= most < math.inf:
            raise UserError(f"{name}={most} is not how far an image may move: use 0 or more.")
    initialise = dense_init((math.prod(shape), *hidden, ways), init)
    forward = dense((activation,))
    counts = {"train": shots, "validation": queries, "test": queries}

    def sample(key):
        keys = jax.random.split(key, 4)
        turn = math.radians(rotation)
        return FewShot(
            jax.random.permutation(keys[0], classes)[:ways],
            jax.random.uniform(keys[1], (ways,), minval=-turn, maxval=turn),
            jax.random.uniform(keys[2], (ways, 2), minval=-shift, maxval=shift),
            keys[3],
        )

    def batch(key, problem, data, split):
        del key
        number = supervised.number_of(split)
        images, count = jnp.asarray(data[number]), counts[split]
        _check_images(dataset, split, images.shape[1], count)
        keys = jax.random.split(jax.random.fold_in(problem.key, number), ways)

        def of_class(key, label, angle, shift):
            rows = jax.random.permutation(key, images.shape[1])[:count]
            return jax.vmap(lambda image: distorted(image, angle, shift))(images[label, rows])

        inputs = jax.vmap(of_class)(keys, problem.classes, problem.angle, problem.shift)
        labels = jnp.repeat(jnp.arange(ways), inputs.shape[1])
        return supervised.Batch(inputs.reshape(len(labels), -1), labels)

    def logits(params, batch):
        return forward(params, 0, supervised.cast(batch.inputs, params))

    return TaskFamily(
        sample=sample,
        init=lambda key, problem: initialise(key, 1.0),
        batch=batch,
        loss=lambda params, problem, batch: supervised.cross_entropy(
            logits(params, batch), batch.labels
        ),
        accuracy=lambda params, problem, batch: supervised.hits(
            logits(params, batch), batch.labels
        ),
        data=functools.partial(by_class, dataset),
        name=f"few-shot-{dataset}-{ways}x{shots}",
    )


def _check_images(dataset: str, split: str, most: int, count: int) -> None:
    """UserError where so many images of each class are asked for that some have not as many."""
    if count > most:
        setting = "shots" if split == "train" else "queries"
        raise UserError(
            f"{setting}={count} is more than there are: the rarest class of {dataset} has {most} "
            f"images in its {split} split, so use {most} at most."
        )


def distorted(image: jax.Array, angle: jax.Array, shift: jax.Array) -> jax.Array:
    """An image [height, width] turned by `angle` radians about its centre and moved by `shift`
    pixels [2] (down, right), by bilinear interpolation; 0 comes in from outside."""
    centre = (jnp.asarray(image.shape, jnp.float32) - 1) / 2
    rows, columns = jnp.meshgrid(
        *(jnp.arange(n, dtype=jnp.float32) for n in image.shape), indexing="ij"
    )
    y, x = rows - centre[0] - shift[0], columns - centre[1] - shift[1]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    where = [cos * y - sin * x + centre[0], sin * y + cos * x + centre[1]]
    return jax.scipy.ndimage.map_coordinates(image, where, order=1, mode="constant")


def by_class(dataset: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(train, validation, test) of a data set of images, each [classes, rows, height, width] in
    [0, 1]: of each class as many as there are of the rarest."""
    classes = datasets.spec(dataset).classes or 0

    def stacked(split):
        rows = [np.flatnonzero(split.labels == c) for c in range(classes)]
        fewest = min(map(len, rows))
        images = np.stack([split.inputs[r[:fewest], ..., 0] for r in rows])
        scale = 255 if images.dtype == np.uint8 else 1
        return images.astype(np.float32) / scale

    train, validation, test = map(stacked, datasets.load(dataset))
    return train, validation, test
