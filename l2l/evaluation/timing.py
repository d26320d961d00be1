"""How much sooner: the speed-up of one run over another, its interval, and seconds a step."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax

from l2l.core import unroll
from l2l.evaluation import curves as evaluate

# The steps that a loss is averaged over are one part in so many of the horizon.
WINDOWS = 20
# Losses below count as this: what is left of a float32 there is rounding.
FLOOR = 1e-8


def smooth(losses) -> np.ndarray:
    """[n, T] to [n, T]: the mean of the batch losses of the last max(1, T // 20) steps, of all
    steps while there are fewer; infinite where one of them is not finite.

    Each loss is that of a training batch before its step. A running mean of them has the noise of
    the batches and of the last steps averaged out, and a value at every step.
    """
    losses = evaluate.or_infinite(losses)
    width = max(1, losses.shape[1] // WINDOWS)
    padded = np.concatenate([np.zeros((len(losses), width)), losses], axis=1)
    views = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)[:, 1:]
    return views.sum(-1) / np.minimum(np.arange(losses.shape[1]) + 1, width)


def speed_up(losses, reference) -> np.ndarray:
    """[n, T], [n, T] to [n]: how many times fewer steps a run needs than its reference.

    Of the two, one ends with the lower smoothed loss (`smooth`), and the other's final smoothed
    loss is the target. T / (the first step at which the lower one is at or below the target) is
    the factor; where the reference is the lower one, its inverse, which is below 1. So

        speed_up(a, b) = 1 / speed_up(b, a),  speed_up(a, a) = 1,  1/T <= speed_up <= T.

    A run whose loss ends not finite needed T steps for what any other does in one.
    """
    own, other = smooth(losses), smooth(reference)
    steps = own.shape[1]

    def first(curves, targets):
        return np.argmax(curves <= targets[:, None], axis=1) + 1

    ahead, behind = first(own, other[:, -1]), first(other, own[:, -1])
    level = own[:, -1] == other[:, -1]
    return np.where(level, 1.0, np.where(own[:, -1] < other[:, -1], steps / ahead, behind / steps))


def ratios(losses, reference) -> np.ndarray:
    """Final losses over those of a reference, problem by problem: [n]. Not finite counts as
    infinite, below `FLOOR` as that; two infinities are equal. NaN where either is negative."""
    both = [evaluate.or_infinite(x) for x in (losses, reference)]
    own, other = (np.maximum(x, FLOOR) for x in both)
    with np.errstate(invalid="ignore"):
        found = np.where(own == other, 1.0, own / other)
    return np.where(np.minimum(*both) < 0, np.nan, found)


def interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float, float]:
    """(geometric mean, low, high) of positive values: Student's interval of the mean of their
    logarithms over problems. NaN for low and high where an infinity, a zero or a single value
    leaves none."""
    from scipy import stats  # A second, which nobody else needs.

    with np.errstate(divide="ignore"):
        logs = np.log(np.asarray(values, float))
    with np.errstate(invalid="ignore"):
        middle = float(np.mean(logs))
    if len(logs) < 2 or not np.isfinite(logs).all():
        return float(np.exp(middle)), math.nan, math.nan
    reach = stats.t.ppf(0.5 + share / 2, len(logs) - 1) * np.std(logs, ddof=1) / len(logs) ** 0.5
    return tuple(float(np.exp(middle + x)) for x in (0, -reach, reach))


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
    start = jax.jit(lambda key: evaluate.beginning(family, key))(key)
    runs = {}
    for name, (optimizer, theta) in field.items():

        @jax.jit
        def run(theta, start, data, optimizer=optimizer):
            transform = optax.with_extra_args_support(optimizer.bind(theta))
            state = evaluate.opened(transform, start, steps)
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
