"""How many random trials of a baseline's space it takes to match an optimizer's one run.

From the trials that were made anyway: the expectation of the best of k of them, over all subsets.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from l2l.evaluation import aggregate, statistics

if TYPE_CHECKING:  # Tables need no JAX.
    from l2l.evaluation.comparison import Row

BUDGETS = (1, 5, 15)  # Beside all of them.
LOSSES = ("train", "validation")


def best_of(losses: Sequence[float] | np.ndarray, count: int) -> float:
    """The expected minimum of `count` of n losses, drawn without replacement.

    Of the losses in ascending order ℓ₁ ≤ … ≤ ℓₙ, ℓᵢ is the least of a subset of k if that has i and
    k − 1 of the n − i after it: E = Σᵢ ℓᵢ C(n − i, k − 1) / C(n, k).

    Raises:
      ValueError: count is not between 1 and n.
    """
    ordered = np.sort(np.asarray(losses, float))
    n = len(ordered)
    if not 1 <= count <= n:
        raise ValueError(f"There is no subset of {count} of {n} losses.")
    weights = [math.comb(n - i, count - 1) / math.comb(n, count) for i in range(1, n + 1)]
    # The last k − 1 are never the least: an infinity among them is not in the sum.
    return float(np.dot(weights[: n - count + 1], ordered[: n - count + 1]))


class Match(NamedTuple):
    """A baseline's trials beside one optimizer, at one cell and horizon, by one loss.

    ratios: [n], the expected best of 1, …, n trials over the optimizer's loss.
    needed: the least number of trials whose expected best is at most that; infinite if none is.
    """

    optimizer: str
    baseline: str
    loss: str
    steps: int
    cell: str
    ratios: np.ndarray
    needed: float


def matches(rows: Sequence["Row"]) -> list[Match]:
    """Compares every optimizer that is not a baseline with every baseline, by training and
    validation loss; rows that are there for comparison with a learned optimizer are left out.

    A trial's loss counts as at most the initial one, as if it had kept its initial parameters.
    """
    places: dict[tuple[str, int], list] = {}
    for row in rows:
        places.setdefault((row.cell, row.steps), []).append(row)
    found = []
    for (cell, steps), here in places.items():
        for row in (row for row in here if row.setting is None and row.variant_of is None):
            own = {"train": row.train, "validation": aggregate.validation_of(row)[-1]}
            for rival in (rival for rival in here if rival.trials):
                for loss in LOSSES:
                    tried = [min(getattr(t, loss), rival.start) for t in rival.trials]
                    best = np.array([best_of(tried, k) for k in range(1, len(tried) + 1)])
                    ratios = statistics.ratio(best, np.full(len(best), own[loss]))
                    reached = np.flatnonzero(ratios <= 1)
                    needed = float(reached[0] + 1) if len(reached) else math.inf
                    names = (row.optimizer, rival.optimizer.removesuffix(", tuned"))
                    found.append(Match(*names, loss, steps, cell, ratios, needed))
    return found


def summary(found: Sequence[Match]) -> list[dict]:
    """A dict an optimizer, baseline and loss, over all cells and horizons; `report.LEGEND` defines
    the columns."""
    groups: dict[tuple, list[Match]] = {}
    for match in found:
        groups.setdefault((match.optimizer, match.baseline, match.loss), []).append(match)
    return [_summary(key, group) for key, group in groups.items()]


def _summary(key, group: Sequence[Match]) -> dict:
    most = min(len(match.ratios) for match in group)
    needed = float(np.median([match.needed for match in group]))
    out: dict = dict(zip(("optimizer", "baseline", "loss"), key, strict=True))
    for count in (*(k for k in BUDGETS if k < most), most):
        out[f"best of {count}"] = statistics.geometric_mean([m.ratios[count - 1] for m in group])
    out["matched by 1"] = sum(match.needed == 1 for match in group) / len(group)
    out["never matched"] = sum(math.isinf(match.needed) for match in group) / len(group)
    return out | {"trials to match": f"> {most}" if math.isinf(needed) else needed}


def curve(found: Sequence[Match], optimizer: str, baseline: str, loss: str) -> np.ndarray:
    """[n], the geometric mean over cells and horizons of the ratios of such matches; NaN where a
    loss is negative."""
    chosen = [m.ratios for m in found if m[:3] == (optimizer, baseline, loss)]
    most = min(map(len, chosen))
    return np.array([statistics.geometric_mean([r[k] for r in chosen]) for k in range(most)])
