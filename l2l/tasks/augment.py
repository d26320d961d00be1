"""Wrappers that make any family more diverse. They compose: the name tells what was applied."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core.base import PyTree, TaskFamily
from l2l.data import datasets
from l2l.tasks import supervised


class Augmented(NamedTuple):
    """A problem of the wrapped family, and what the wrapper drew for it."""

    problem: PyTree
    drawn: PyTree


class Noisy(NamedTuple):
    """A batch of the wrapped family; key: of its noise, or None for none."""

    batch: PyTree
    key: Any


def rescale(
    family: TaskFamily,
    *,
    per: str = "coordinate",
    magnitude: float = 3.0,
    probability: float = 1.0,
) -> TaskFamily:
    """f(θ) becomes f(c·θ) with c = exp(U(−magnitude, magnitude)), fixed for a problem: random
    scaling (Lv et al., 2017, section 4.1, magnitude 3).

    `init` gives θ/c, so that a run starts at the same function; its gradient is c times the
    original, so an optimizer that relies on the scales it was trained on will fail.

    Args:
      family: any.
      per: "coordinate", one c for each scalar, or "tensor", one for each leaf of the parameters.
      magnitude: the largest |log c|; 0 changes nothing. A product of two wrappers has both.
      probability: the share of problems that are rescaled; the others keep c = 1.

    Returns:
      A family. Problem: `Augmented`, drawn = c, like the parameters or with a scalar for each leaf.
      Kept in the problem, since drawing it anew at every step costs more than a copy of θ.
    """
    datasets.check_name("scale per", per, ("coordinate", "tensor"))
    _check_size("magnitude", magnitude)
    if not 0 <= probability <= 1:
        raise UserError(f"probability={probability} is not a probability: use 0 to 1.")

    def sample(key):
        inner_key, some_key, c_key = jax.random.split(key, 3)
        problem = family.sample(inner_key)
        shapes = jax.eval_shape(family.init, inner_key, problem)
        some = jax.random.bernoulli(some_key, probability)

        def draw(key, like):
            shape = like.shape if per == "coordinate" else ()
            log_c = jax.random.uniform(key, shape, like.dtype, -magnitude, magnitude)
            return jnp.exp(jnp.where(some, log_c, 0))

        return Augmented(problem, jax.tree.map(draw, _keys(c_key, shapes), shapes))

    def times(params, problem):
        return jax.tree.map(lambda p, c: p * c.astype(p.dtype), params, problem.drawn)

    def init(key, problem):
        params = family.init(key, problem.problem)
        return jax.tree.map(lambda p, c: p / c.astype(p.dtype), params, problem.drawn)

    return _wrap(family, f"rescale-{per}", sample, init, times)


def convex(family: TaskFamily, *, dimension: int = 20) -> TaskFamily:
    """f(θ) becomes f(θ) + ‖x − v‖² / n with new parameters x, a convex part that keeps the meta-
    gradient informative where f is hard (Lv et al., 2017, section 4.2).

    Args:
      family: any.
      dimension: n. x starts uniform in (−1, 1), as v is drawn.

    Returns:
      A family. Params: {"task": those of the family, "convex": x [n]}. Problem: `Augmented`,
      drawn = v. The loss has both parts, so it is no longer the family's; the accuracy is.
    """
    if dimension < 1:
        raise UserError(f"dimension={dimension} adds no parameter: use 1 or more.")

    def sample(key):
        inner_key, v_key = jax.random.split(key)
        v = jax.random.uniform(v_key, (dimension,), minval=-1, maxval=1)
        return Augmented(family.sample(inner_key), v)

    def init(key, problem):
        inner_key, x_key = jax.random.split(key)
        x = jax.random.uniform(x_key, (dimension,), minval=-1, maxval=1)
        return {"task": family.init(inner_key, problem.problem), "convex": x}

    def loss(params, problem, batch):
        x = params["convex"]
        extra = jnp.mean((x - problem.drawn.astype(x.dtype)) ** 2)
        return family.loss(params["task"], problem.problem, batch) + extra

    wrapped = _wrap(family, "convex", sample, init, lambda params, problem: params["task"])
    return wrapped._replace(loss=loss)


def noise(family: TaskFamily, *, scale: float | tuple[float, float] = (1e-3, 1e-1)) -> TaskFamily:
    """Adds ε ~ N(0, scale²) to every coordinate of the gradient, and nothing to the loss.

    The loss gains ⟨ε, θ − stop(θ)⟩, which is 0 and has the derivative ε. Another ε at every batch;
    none on whole splits (`key=None`) or outside "train".

    Args:
      family: any.
      scale: a number, or a range from which it is drawn log-uniformly for each problem.

    Returns:
      A family. Problem: `Augmented`, drawn = the scale. Batch: `Noisy`.
    """
    limits = scale if isinstance(scale, (tuple, list)) else (scale, scale)
    supervised.check_range("scale", limits)

    def sample(key):
        inner_key, scale_key = jax.random.split(key)
        return Augmented(family.sample(inner_key), supervised.log_uniform(scale_key, limits))

    def batch(key, problem, data, split):
        if key is None:
            return Noisy(family.batch(None, problem.problem, data, split), None)
        key, noise_key = jax.random.split(key)
        rows = family.batch(key, problem.problem, data, split)
        return Noisy(rows, noise_key if split == "train" else None)

    def loss(params, problem, batch):
        value = family.loss(params, problem.problem, batch.batch)
        if batch.key is None:
            return value

        def term(key, p):
            epsilon = problem.drawn.astype(p.dtype) * jax.random.normal(key, p.shape, p.dtype)
            return jnp.sum(epsilon * (p - jax.lax.stop_gradient(p)))

        terms = jax.tree.map(term, _keys(batch.key, params), params)
        return value + sum(jax.tree.leaves(terms))

    def accuracy(params, problem, batch):
        assert family.accuracy is not None
        return family.accuracy(params, problem.problem, batch.batch)

    def outputs(params, problem, batch):
        assert family.outputs is not None
        return family.outputs(params, problem.problem, batch.batch)

    return family._replace(
        sample=sample,
        init=lambda key, problem: family.init(key, problem.problem),
        batch=batch,
        loss=loss,
        accuracy=accuracy if family.accuracy else None,
        name=f"{family.name}+noise",
        outputs=outputs if family.outputs else None,
    )


def _wrap(family, suffix, sample, init, unwrap):
    """The family behind new parameters: `unwrap(params, problem)` gives back the old ones."""

    def through(score):
        return score and (
            lambda params, problem, batch: score(unwrap(params, problem), problem.problem, batch)
        )

    return TaskFamily(
        sample=sample,
        init=init,
        batch=lambda key, problem, data, split: family.batch(key, problem.problem, data, split),
        loss=through(family.loss),
        accuracy=through(family.accuracy),
        data=family.data,
        name=f"{family.name}+{suffix}",
        outputs=through(family.outputs),
    )


def _keys(key, tree):
    """A key for each leaf, in a tree of the same structure."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, list(jax.random.split(key, len(leaves))))


def _check_size(name, value):
    if not 0 <= value < float("inf"):
        raise UserError(f"{name}={value} is not a size: use a finite number, zero or more.")
