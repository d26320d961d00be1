"""Seconds per training step, with the optimizers measured in turns."""

import statistics
import time
from collections.abc import Mapping

import jax
import optax

from l2l.core import unroll
from l2l.evaluation import curves


def step_seconds(
    key: jax.Array, field: Mapping, family, data, *, steps: int = 50, rounds: int = 15
) -> dict[str, float]:
    """Seconds of one training step of one problem on one device, by optimizer.

    All take turns, `rounds` times, and the median round counts: what else the machine does then
    falls on all of them alike.

    Args:
      field: {name: (LearnedOptimizer, theta)}.
      steps: of a round.
    """
    start = jax.jit(lambda key: curves.beginning(family, key))(key)
    runs = {}
    for name, (optimizer, theta) in field.items():

        @jax.jit
        def run(theta, start, data, optimizer=optimizer):
            transform = optax.with_extra_args_support(optimizer.bind(theta))
            state = curves.opened(transform, start, steps)
            return unroll.unroll(state, data, family, transform, steps)

        jax.block_until_ready(run(theta, start, data))  # Compiles.
        runs[name] = run, theta
    took = {name: [] for name in field}
    for _ in range(rounds):
        for name, (run, theta) in runs.items():
            began = time.perf_counter()
            jax.block_until_ready(run(theta, start, data))
            took[name].append((time.perf_counter() - began) / steps)
    return {name: statistics.median(values) for name, values in took.items()}
