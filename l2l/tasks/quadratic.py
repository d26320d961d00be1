"""The toy problems of Andrychowicz et al. (2016): squares, and random least squares."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core.base import TaskFamily
from l2l.data import datasets


class Quadratic(NamedTuple):
    """w: [batch, d, d]; y: [batch, d]."""

    w: jax.Array
    y: jax.Array


def simple() -> TaskFamily:
    """f(x) = x² from x = 1. Params: {"x": []}. Nothing in it is random."""
    return _squares("simple", ("x",))


def simple_multi() -> TaskFamily:
    """f(x) = x₀² + x₁² from x₀ = x₁ = 1, two parameters, {"x_0": [], "x_1": []}, so that two
    optimizers can share them by name."""
    return _squares("simple_multi", ("x_0", "x_1"))


def _squares(name, names):
    return TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: {x: jnp.ones(()) for x in names},
        batch=_nothing,
        loss=lambda params, problem, batch: jnp.sum(jnp.stack([params[x] for x in names]) ** 2),
        name=name,
    )


def quadratic(
    *,
    dimension: int = 10,
    batch_size: int = 128,
    stddev: float = 0.01,
    distribution: str = "uniform",
) -> TaskFamily:
    """f(x) = mean over the batch of ‖Wx − y‖² (Andrychowicz et al., 2016, section 3.1).

    Args:
      dimension: d.
      batch_size: how many independent quadratics make one problem; each has its own W, y and x.
      stddev: of the initial x, normal around 0.
      distribution: of the entries of W and y: "uniform" on [0, 1) as in the authors' code, or
        "normal" as in their paper.

    Returns:
      A family. Params: {"x": [batch_size, d]}. Problem: `Quadratic`. Batch and data: (). The loss
      is the same whatever the batch or split.
    """
    datasets.check_name("distribution", distribution, ("uniform", "normal"))
    if dimension < 1 or batch_size < 1:
        raise UserError(
            f"dimension={dimension} and batch_size={batch_size} describe no quadratic: "
            "both must be 1 or more."
        )
    entries = getattr(jax.random, distribution)

    def sample(key):
        w, y = jax.random.split(key)
        return Quadratic(
            entries(w, (batch_size, dimension, dimension)), entries(y, (batch_size, dimension))
        )

    def loss(params, problem, batch):
        del batch
        x = params["x"]
        product = jnp.einsum("bij,bj->bi", problem.w.astype(x.dtype), x)
        return jnp.mean(jnp.sum((product - problem.y.astype(x.dtype)) ** 2, axis=1))

    return TaskFamily(
        sample=sample,
        init=lambda key, problem: {"x": stddev * jax.random.normal(key, (batch_size, dimension))},
        batch=_nothing,
        loss=loss,
        name=f"quadratic-{dimension}",
    )


def _nothing(key, problem, data, split):
    datasets.check_name("split", split, datasets.Dataset._fields)
    return ()
