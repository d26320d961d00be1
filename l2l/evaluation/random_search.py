"""Random search over the settings of AdamW, one run for each draw: what hypergradients must beat.

    draw:  log rate ~ U(1e-4, 1e-1), log decay ~ U(1e-4, 1), schedule constant, linear or cosine.

The draw with the lowest validation loss at the end of its run is the result.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l.core import base, unroll
from l2l.evaluation import curves, statistics
from l2l.evaluation.curves import Problems

RATES, DECAYS = (1e-4, 1e-1), (1e-4, 1.0)
LEAST = 1e-2  # Of its first rate, what a schedule ends with.


class Ended(NamedTuple):
    """Whole runs, as NumPy arrays [n]: losses over the whole validation and test split after the
    last step, and the test accuracy (NaN where there is none)."""

    validation: Any
    test: Any
    accuracy: Any


def compile_runs(optimizer: base.LearnedOptimizer, family, num_steps: int):
    """Makes (thetas [n], keys [n], data) -> `Ended`: run i is of `keys[i]`, trained by theta i."""

    def one(theta, key, data):
        run = curves.beginning(family, key)
        transform = optimizer.bind(theta)
        state = curves.opened(transform, run, num_steps)
        training = unroll.trained_on(family, optimizer, theta)
        state, _ = unroll.unroll(state, data, training, transform, num_steps)

        def measured(measure, split):
            batch = family.batch(None, state.problem, data, split)
            return measure(state.params, state.problem, batch)

        score = family.accuracy or (lambda *_: jnp.nan)
        return (
            measured(family.loss, "validation"),
            measured(family.loss, "test"),
            measured(score, "test"),
        )

    @jax.jit
    def run(thetas, keys, data):
        return jax.lax.map(lambda x: one(x[0], x[1], data), (thetas, keys))

    return lambda thetas, keys, data: Ended(*jax.device_get(run(thetas, keys, data)))


def draws(key: jax.Array, knots: int, count: int):
    """Thetas of `learned_adamw` with that many knots, leaves [count, ...]."""
    rate, decay, kind = jax.random.split(key, 3)

    def log_uniform(key, limits):
        low, high = map(math.log, limits)
        return jax.random.uniform(key, (count,), minval=low, maxval=high)

    thetas = {
        "log_learning_rate": log_uniform(rate, RATES),
        "log_weight_decay": log_uniform(decay, DECAYS),
    }
    if knots:
        progress = jnp.linspace(0.0, 1.0, knots)
        shapes = jnp.stack([jnp.ones(knots), 1 - progress, (1 + jnp.cos(jnp.pi * progress)) / 2])
        chosen = jax.random.randint(kind, (count,), 0, len(shapes))
        thetas["schedule"] = jnp.log(jnp.maximum(shapes, LEAST))[chosen]
    return thetas


def best(run, thetas, key: jax.Array, data):
    """(of the settings, leaves [n, ...], those with the lowest validation loss at the end of one
    run each; the losses [n], infinite where one is not finite)."""
    count = len(jax.tree.leaves(thetas)[0])
    ended = run(thetas, Problems(key, count).keys(), data)
    losses = statistics.or_infinite(ended.validation)
    return jax.tree.map(lambda x: x[int(np.argmin(losses))], thetas), losses
