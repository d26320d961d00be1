"""The numbers that compare runs: ratios of losses, speed-ups, intervals, means over cells.

There is one definition of each. Losses are those of `Curves`; [n] are the problems of a cell.
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float

# The steps that a loss is averaged over are one part in so many of the horizon.
WINDOWS = 20
# Losses below count as this: what is left of a float32 there is rounding.
FLOOR = 1e-8
TOLERANCE = 1.02  # Of test losses.


def or_infinite(losses) -> np.ndarray:
    """Losses as float64, infinite where they are not finite."""
    losses = np.asarray(losses, float)
    return np.where(np.isfinite(losses), losses, np.inf)


def smooth(losses: Float[Array | np.ndarray, "n T"]) -> Float[np.ndarray, "n T"]:
    """[n, T] to [n, T]: the mean of the batch losses of the last max(1, T // 20) steps, of all
    steps while there are fewer; infinite where one of them is not finite.

    Each loss is that of a training batch before its step. A running mean of them has the noise of
    the batches and of the last steps averaged out, and a value at every step.
    """
    losses = or_infinite(losses)
    width = max(1, losses.shape[1] // WINDOWS)
    padded = np.concatenate([np.zeros((len(losses), width)), losses], axis=1)
    views = np.lib.stride_tricks.sliding_window_view(padded, width, axis=1)[:, 1:]
    return views.sum(-1) / np.minimum(np.arange(losses.shape[1]) + 1, width)


def speed_up(
    losses: Float[Array | np.ndarray, "n T"], reference: Float[Array | np.ndarray, "n T"]
) -> Float[np.ndarray, " n"]:
    """[n, T], [n, T] to [n]: how many times fewer steps a run needs than its reference.

    Of the two, one ends with the lower smoothed loss (`smooth`), and the other's final smoothed
    loss is the target. T / (the first step at which the lower one is at or below the target) is
    the factor; where the reference is the lower one, its inverse, which is below 1. So

        speed_up(a, b) = 1 / speed_up(b, a),  speed_up(a, a) = 1,  1/T <= speed_up <= T.

    A run whose final loss is not finite counts as needing T steps for what any other does in one.
    """
    own, other = smooth(losses), smooth(reference)
    steps = own.shape[1]

    def first(curves, targets):
        return np.argmax(curves <= targets[:, None], axis=1) + 1

    ahead, behind = first(own, other[:, -1]), first(other, own[:, -1])
    level = own[:, -1] == other[:, -1]
    return np.where(level, 1.0, np.where(own[:, -1] < other[:, -1], steps / ahead, behind / steps))


def ratio(loss, reference):
    """Losses over those of a reference, number by number: not finite counts as infinite, below
    `FLOOR` as that; two infinities are equal. NaN where either is negative: such losses have no
    ratio."""
    own, other = or_infinite(loss), or_infinite(reference)
    negative = (own < 0) | (other < 0)
    own, other = np.maximum(own, FLOOR), np.maximum(other, FLOOR)
    with np.errstate(invalid="ignore"):
        return np.where(negative, np.nan, np.where(own == other, 1.0, own / other))[()]


def standard_error(values) -> float:
    """Of the mean of independent values [n]; 0 of a single one."""
    return float(np.std(values) / math.sqrt(max(len(values) - 1, 1)))


def geometric_mean(values) -> float:
    """exp(mean(log)); infinite if any value is, NaN if there are none or one is negative or NaN."""
    from scipy import stats  # A second, which nobody else needs.

    values = np.asarray(values, float)
    if not values.size or not (values >= 0).all():
        return math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(stats.gmean(values))


def interval(values, confidence: float = 0.95) -> tuple[float, float, float]:
    """(geometric mean, low, high) of positive values: Student's interval of the mean of their
    logarithms over problems. NaN for low and high where an infinity, a zero or a single value
    leaves none."""
    from scipy import stats

    values = np.asarray(values, float)
    middle = geometric_mean(values)
    if len(values) < 2 or not (np.isfinite(values) & (values > 0)).all():
        return middle, math.nan, math.nan
    logs = np.log(values)
    spread = stats.sem(logs)
    if spread == 0:
        return middle, middle, middle
    low, high = stats.t.interval(confidence, len(logs) - 1, loc=np.mean(logs), scale=spread)
    return middle, math.exp(low), math.exp(high)


def summarise(rows: Sequence) -> list[dict]:
    """One dict for each optimizer and horizon, over all cells, and if there are several
    horizons, one over all of them; `report.LEGEND` defines the columns.

    Args:
      rows: `comparison.Row`s.
    """
    names = list(dict.fromkeys(row.optimizer for row in rows))
    horizons = sorted({row.steps for row in rows})
    groups = []
    for name in names:
        own = [row for row in rows if row.optimizer == name]
        groups += [(name, h, [row for row in own if row.steps == h]) for h in horizons]
        groups += [(name, "all", own)] if len(horizons) > 1 else []
    return [_summary(name, steps, group) for name, steps, group in groups if group]


def _summary(name: str, steps, group: Sequence) -> dict:
    def part(test):
        return sum(map(test, group)) / len(group)

    out: dict = {"optimizer": name, "steps": steps, "cells": len(group)}
    for measure in ("steps", "time"):
        for kind in group[0].sooner:
            values = [row.sooner[kind][measure] for row in group]
            out[f"{measure}/{kind}"] = float(np.median(values))
    judged = not all(math.isnan(row.ratio) for row in group)
    return out | {
        "ratio": geometric_mean([row.ratio for row in group]),
        "train no worse": part(lambda row: row.ratio <= 1) if judged else math.nan,
        "test within 2 %": part(lambda row: row.test_ratio <= TOLERANCE) if judged else math.nan,
        "points": float(np.mean([row.points for row in group])),
        "diverged": sum(row.diverged for row in group),
        "runs": sum(row.runs for row in group),
    }


def without_ratio(rows: Sequence) -> list[str]:
    """A sentence on each cell whose losses are such that a ratio of them says nothing."""
    sentences = []
    for cell in dict.fromkeys(row.cell for row in rows):
        own = [row for row in rows if row.cell == cell]
        if not any(row.sooner for row in own):
            continue
        lost = all(row.train == math.inf for row in own)
        without = [math.isnan(row.ratio) for row in own]
        if lost and all(without):
            sentences.append(f"{cell}: no run has a finite training loss, so ratios say nothing.")
        elif lost:
            sentences.append(
                f"{cell}: no optimizer has a finite training loss on every problem, so means are "
                "infinite, and ratios count problems on which two are both infinite as equal."
            )
        elif any(without):
            sentences.append(
                f"{cell}: a training loss is negative, and such losses have no ratio: compare the "
                "losses themselves."
            )
    return sentences
