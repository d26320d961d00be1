"""Regression of sinusoids from a few points: the few-shot problem of MAML (Finn et al. 2017)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.tasks import supervised
from l2l.tasks.mlp import dense, dense_init

LIMIT = 5.0  # Inputs lie in [−LIMIT, LIMIT].


class Sinusoid(NamedTuple):
    """amplitude, phase: scalars. key: the points of the problem come from it."""

    amplitude: jax.Array
    phase: jax.Array
    key: jax.Array


def sinusoid(
    *,
    shots: int = 10,
    queries: int = 10,
    hidden: Sequence[int] = (40, 40),
    activation: str = "relu",
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    init: str | float = "lecun",
) -> TaskFamily:
    """y = A sin(x + φ) with A, φ and x uniform, x in [−5, 5] (Finn et al. 2017, section 5.1; their
    code writes x − φ, the same up to the range of φ).

    Each problem has a fixed support set, its training split, of which every batch is the whole;
    and a fixed query set, its validation split. The test split is 100 evenly spaced points.

    Args:
      shots, queries: points of the support and of the query set.
      hidden, activation: of the network.
      amplitude, phase: the ranges of A and φ.
      init: of the network, as in `mlp`.

    Returns:
      A family. Params as in `mlp`. Problem: `Sinusoid`. Batch: inputs [n, 1], labels [n]. Data: ().
      The loss is the mean squared error; no accuracy.

    Raises:
      UserError: no points, a range in the wrong order, or an unknown activation or init.
    """
    supervised.check_counts(shots=shots, queries=queries)
    for name, limits in (("amplitude", amplitude), ("phase", phase)):
        if not limits[0] <= limits[1]:
            raise UserError(f"{name}={limits} is not a range: give (low, high) with low <= high.")
    initialise, forward = dense_init((1, *hidden, 1), init), dense((activation,))
    counts = {"train": shots, "validation": queries, "test": 0}

    def sample(key):
        height, shift, points = jax.random.split(key, 3)
        return Sinusoid(
            jax.random.uniform(height, minval=amplitude[0], maxval=amplitude[1]),
            jax.random.uniform(shift, minval=phase[0], maxval=phase[1]),
            points,
        )

    def batch(key, problem, data, split):
        del key, data
        number = supervised.number_of(split)
        if split == "test":
            x = jnp.linspace(-LIMIT, LIMIT, 100)
        else:
            key = jax.random.fold_in(problem.key, number)
            x = jax.random.uniform(key, (counts[split],), minval=-LIMIT, maxval=LIMIT)
        return supervised.Batch(x[:, None], problem.amplitude * jnp.sin(x + problem.phase))

    def outputs(params, problem, batch):
        del problem
        return forward(params, 0, supervised.cast(batch.inputs, params))[:, 0]

    def loss(params, problem, batch):
        answers = outputs(params, problem, batch)
        return jnp.mean((answers - batch.labels.astype(answers.dtype)) ** 2)

    return TaskFamily(
        sample=sample,
        init=lambda key, problem: initialise(key, 1.0),
        batch=batch,
        loss=loss,
        name=f"sinusoid-{shots}",
        outputs=outputs,
    )
