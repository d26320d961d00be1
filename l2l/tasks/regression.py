"""Regression on a noisy teacher: synthetic data, another function in every problem."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l.core.base import PyTree, TaskFamily
from l2l.data import datasets
from l2l.tasks import supervised
from l2l.tasks.mlp import dense, dense_init


class Teaching(NamedTuple):
    """teacher: the parameters of the teacher, an MLP of tanh. noise: the standard deviation added
    to its answers. key: all rows of the problem's data come from it. activation, scale: the
    student's, as in `supervised.Problem`."""

    teacher: PyTree
    noise: jax.Array
    key: jax.Array
    activation: jax.Array
    scale: jax.Array


def regression(
    *,
    inputs: int = 10,
    teacher: Sequence[int] = (16,),
    hidden: Sequence[int] = (32,),
    noise: tuple[float, float] = (0.01, 0.5),
    rows: int = 1024,
    activations: Sequence[str] = supervised.DIVERSE,
    initial_scale: tuple[float, float] = (0.5, 2.0),
    batch_size: int = 128,
    init: str | float = "lecun",
) -> TaskFamily:
    """y = teacher(x) + noise · ε with x, ε ~ N(0, 1); the loss is the mean squared error.

    Each split of a problem is a fixed set of `rows` rows, so that a student can overfit as it can
    on real data; rows are made from their number when asked for, and nothing is stored.

    Args:
      inputs: the size of x.
      teacher: the hidden widths of the teacher; its weights have twice LeCun's deviation, so that
        it is far from linear.
      hidden: the hidden widths of the student, the optimizee.
      noise: drawn log-uniformly from this range for each problem.
      rows: how many a split has.
      activations, initial_scale, batch_size, init: as in `mlp`, for the student.

    Returns:
      A family. Params as in `mlp`. Problem: `Teaching`. Batch: inputs [n, inputs], labels [n].
      Data: (). No accuracy.
    """
    supervised.check_range("noise", noise)
    supervised.check_counts(inputs=inputs, rows=rows, batch_size=batch_size)
    sample_student = supervised.sampler(activations, initial_scale, (1.0, 1.0))
    initialise_teacher = dense_init((inputs, *teacher, 1))
    initialise = dense_init((inputs, *hidden, 1), init)
    answer, forward = dense(("tanh",)), dense(activations)

    def sample(key):
        student_key, teacher_key, noise_key, rows_key = jax.random.split(key, 4)
        student = sample_student(student_key)
        return Teaching(
            initialise_teacher(teacher_key, 2.0),
            supervised.log_uniform(noise_key, noise),
            rows_key,
            student.activation,
            student.scale,
        )

    def batch(key, problem, data, split):
        del data
        names = datasets.Dataset._fields
        part = jax.random.fold_in(
            problem.key, names.index(datasets.check_name("split", split, names))
        )
        index = jnp.arange(rows)
        if key is not None:
            index = jax.random.randint(key, (batch_size,), 0, rows, jnp.int32)
        draws = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(part, i), (inputs + 1,)))
        x, epsilon = jnp.split(draws(index), [inputs], axis=1)
        y = answer(problem.teacher, 0, x) + problem.noise * epsilon
        return supervised.Batch(x, y[:, 0])

    def loss(params, problem, batch):
        outputs = forward(params, problem.activation, supervised.cast(batch.inputs, params))
        return jnp.mean((outputs[:, 0] - batch.labels.astype(outputs.dtype)) ** 2)

    return TaskFamily(
        sample=sample,
        init=lambda key, problem: initialise(key, problem.scale),
        batch=batch,
        loss=loss,
        name="-".join(map(str, ("regression", inputs, *hidden))),
    )
