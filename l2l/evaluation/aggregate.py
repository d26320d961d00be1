"""From cells to one number: validation targets, interquartile means, performance profiles.

There is one definition of each; `report.LEGEND` has them in words.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from l2l.evaluation import statistics

if TYPE_CHECKING:  # Tables need no JAX.
    from l2l.evaluation.comparison import Row
    from l2l.evaluation.curves import Curves

# A training loss below is as good as zero: what counts there is the validation loss.
FITTED = 1e-4
# No cell counts for more than this, or for less than its inverse, in a mean of ratios.
MOST = 1e8
RESAMPLES = 2000
TRAINED_ON = "trained-on family"
# The factors at which a table has the performance profile.
FACTORS = (1.0, 1.25, 1.5, 2.0, 4.0, math.inf)


class Score(NamedTuple):
    """An optimizer in a cell at a horizon, beside the reference: the setting of the first tuned
    baseline that is best by its final validation loss, R for short.

    cost:    steps to the target, the final validation loss of R; infinite if it is never reached.
    time:    likewise in seconds; NaN where steps were not timed.
    sooner:  how many times fewer steps than R to the validation loss that both reach.
    quicker: the same in time; NaN where steps were not timed, of R too.
    train:   final training loss over that of the setting that is best by it.
    validation: final validation loss over R's.
    judged:  `train`, or `validation` where a training loss is as good as zero.
    """

    cell: str
    kind: str
    horizon: int
    optimizer: str
    cost: float
    time: float
    sooner: float
    quicker: float
    train: float
    validation: float
    judged: float


def score(rows: Sequence["Row"]) -> list[Score]:
    """The scores of all rows for which there is a tuned baseline."""
    places: dict[tuple[str, int], dict[str, Row]] = {}
    for row in rows:
        places.setdefault((row.cell, row.steps), {})[row.optimizer] = row
    scores = []
    for here in places.values():
        baselines = (row for row in here.values() if row.by_validation is not None)
        if (reference := next(baselines, None)) is not None:
            scores += [_score(row, reference) for row in here.values()]
    return scores


def _score(row: "Row", reference: "Row") -> Score:
    cost, sooner = _to_target(row, reference)
    slower = row.seconds / reference.seconds
    loss, target = (float(validation_of(one)[-1]) for one in (row, reference))
    validation = float(statistics.ratio(loss, target))
    fitted = min(row.train, reference.train) < FITTED
    return Score(
        *(row.cell, row.kind, row.steps, row.optimizer, cost, cost * row.seconds),
        *(sooner, sooner / slower, row.ratio, validation, validation if fitted else row.ratio),
    )


def _judged_by(row: "Row") -> "Curves":
    """The runs whose validation loss counts: of a baseline, those of its best setting by it."""
    return row.curves if row.by_validation is None else row.by_validation.curves


def validation_of(row: "Row") -> np.ndarray:
    """The validation loss [v] along a run, a mean over problems, infinite if one is not finite."""
    return np.mean(statistics.or_infinite(_judged_by(row).validation_loss), axis=0)


def first(steps, losses, target: float) -> float:
    """The first of `steps` [v] after which a loss [v] is finite and at most the target; infinite
    for none."""
    reached = np.flatnonzero(np.isfinite(losses) & (np.asarray(losses) <= target))
    return float(steps[reached[0]]) if len(reached) else math.inf


def _to_target(row: "Row", reference: "Row") -> tuple[float, float]:
    """(steps to the reference's end, how many times fewer than the reference's steps).

    Where that is never reached, the factor is to the best that is reached: the factors of two
    optimizers beside each other are each other's inverse, and one of itself is 1. A run that never
    has a finite loss took all its steps for the first that the reference has.
    """
    losses, others = validation_of(row), validation_of(reference)
    steps, their_steps = (_judged_by(one).validation_steps for one in (row, reference))
    target, end = float(others[-1]), float(steps[-1])
    cost = first(steps, losses, target)
    common = target if math.isfinite(cost) else float(np.min(losses))
    needed = first(their_steps, others, common)
    return cost, min(needed, end) / min(first(steps, losses, common), end)


def interquartile(values: Mapping[str, Sequence[float]]) -> tuple[float, float, float]:
    """(interquartile mean of ratios over cells, its 95 % interval), in logarithms.

    A quarter of the cells is left out at either end. The interval is the percentile bootstrap over
    cells. NaN is ignored; for fewer than two cells there is no interval.

    Args:
      values: {cell: its ratios}; their geometric mean counts.
    """
    from scipy import stats  # A second, which nobody else needs.

    logs = []
    for ratios in values.values():
        known = [x for x in ratios if not math.isnan(x)]
        if known:
            logs.append(float(np.mean(np.log(np.clip(known, 1 / MOST, MOST)))))
    if not logs:
        return math.nan, math.nan, math.nan

    def middle(x, axis=-1):
        return stats.trim_mean(x, 0.25, axis=axis)

    value = math.exp(middle(np.asarray(logs)))
    if len(logs) < 2:
        return value, math.nan, math.nan
    if min(logs) == max(logs):
        return value, value, value
    found = stats.bootstrap(
        (np.asarray(logs),), middle, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return value, math.exp(found.low), math.exp(found.high)


def overall(scores: Sequence[Score]) -> list[dict]:
    """A dict an optimizer over all cells, and where some cells are of families that the released
    optimizers were trained on, one over those and one over the others. Several horizons of a cell
    count as one cell."""
    groups = {
        "all": scores,
        "trained on": [s for s in scores if s.kind == TRAINED_ON],
        "unseen": [s for s in scores if s.kind != TRAINED_ON],
    }
    if not groups["trained on"] or not groups["unseen"]:
        groups = {"all": scores}
    found = []
    for name in dict.fromkeys(s.optimizer for s in scores):
        for group, members in groups.items():
            own = [s for s in members if s.optimizer == name]
            found += [_overall(name, group, own)] if own else []
    return found


def _overall(name: str, group: str, own: Sequence[Score]) -> dict:
    def mean(of):
        values: dict[str, list[float]] = {}
        for one in own:
            values.setdefault(one.cell, []).append(getattr(one, of))
        return interquartile(values)

    out: dict = {"optimizer": name, "cells": group, "n": len({one.cell for one in own})}
    for measure in ("sooner", "quicker", "validation", "train", "judged"):
        out[measure] = mean(measure)
    out["reached"] = sum(math.isfinite(one.cost) for one in own) / len(own)
    return out


def profile(
    scores: Sequence[Score], of: str, factors: Sequence[float] = FACTORS
) -> dict[str, list[float]]:
    """{optimizer: the share of cells in which its cost is at most `factor` times that of the
    cheapest optimizer there, for each factor} (Dolan and Moré, 2002); for an infinite factor the
    share in which the target is reached at all. A cell at a horizon counts as one.

    Args:
      of: "cost" or "time".
    """
    cheapest: dict[tuple[str, int], float] = {}
    for one in scores:
        place = one.cell, one.horizon
        cheapest[place] = min(cheapest.get(place, math.inf), getattr(one, of))
    found: dict[str, list[float]] = {}
    for name in dict.fromkeys(one.optimizer for one in scores):
        own = [one for one in scores if one.optimizer == name]
        ratios = [_times(getattr(one, of), cheapest[one.cell, one.horizon]) for one in own]
        found[name] = [
            sum(math.isfinite(x) and x <= factor for x in ratios) / len(ratios)
            for factor in factors
        ]
    return found


def _times(cost: float, least: float) -> float:
    return cost / least if math.isfinite(cost) else math.inf
