"""Seconds per training step, with the optimizers measured in turns."""

import statistics
import time
from collections.abc import Mapping
from typing import NamedTuple

import jax
import optax

from l2l.core import unroll
from l2l.evaluation import curves


class Pace(NamedTuple):
    """Seconds per training step of one problem on one device: of the first `steps` of a run, and of
    those that follow. They differ where an optimizer works more at first, as `lstm` and SOAP do:
    their bases turn in each of the first ten steps and seldom later."""

    steps: int
    first: float
    later: float

    def over(self, horizon: int) -> float:
        """The mean over a run of that length."""
        share = min(self.steps / horizon, 1.0)
        return share * self.first + (1 - share) * self.later


def pace(
    key: jax.Array, field: Mapping, family, data, *, steps: int = 60, rounds: int = 15
) -> dict[str, Pace]:
    """What a training step takes, by optimizer.

    All take turns, `rounds` times, and the median round counts: what else the machine does then
    falls on all of them alike.

    Args:
      field: {name: (LearnedOptimizer, theta)}.
      steps: of either part of a round. What an optimizer does only every so many steps is counted
        right if this is a multiple of them.
    """
    start = jax.jit(lambda key: curves.beginning(family, key))(key)
    runs = {}
    for name, (optimizer, theta) in field.items():

        @jax.jit
        def begin(theta, start, optimizer=optimizer):
            transform = optax.with_extra_args_support(optimizer.bind(theta))
            return curves.opened(transform, curves.started(optimizer, theta, start), 2 * steps)

        @jax.jit
        def run(theta, state, data, optimizer=optimizer):
            transform = optax.with_extra_args_support(optimizer.bind(theta))
            training = unroll.trained_on(family, optimizer, theta)
            return unroll.unroll(state, data, training, transform, steps)

        first = begin(theta, start)
        later = jax.block_until_ready(run(theta, first, data)[0])  # Compiles.
        runs[name] = run, theta, (first, later)
    took = {name: ([], []) for name in field}
    for _ in range(rounds):
        for name, (run, theta, states) in runs.items():
            for state, seconds in zip(states, took[name], strict=True):
                began = time.perf_counter()
                jax.block_until_ready(run(theta, state, data))
                seconds.append((time.perf_counter() - began) / steps)
    return {name: Pace(steps, *map(statistics.median, both)) for name, both in took.items()}
