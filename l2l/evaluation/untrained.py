"""The untrained twin of a learned optimizer, at the best single rate for all cells: how much of a
result comes from the direction and one well-chosen number, and how much was learned.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from l2l.evaluation import aggregate, statistics

if TYPE_CHECKING:  # Tables need no JAX.
    from l2l.evaluation.comparison import Row


def with_best_rates(rows: Sequence["Row"]) -> tuple[list["Row"], list[str]]:
    """(rows, sentences): of every untrained optimizer those at its nominal rate, and once more, as
    "…, untrained, best rate", those at the multiplier that has the least geometric mean, over all
    cells and horizons at which all of them were measured, of its final validation loss over that
    of the nominal rate. Other rows stay as they are.
    """
    out = [row for row in rows if row.multiplier in (None, 1.0)]
    notes = []
    for name in dict.fromkeys(row.variant_of for row in rows if row.multiplier is not None):
        own = [row for row in rows if row.variant_of == name and row.multiplier is not None]
        multipliers = list(dict.fromkeys(row.multiplier for row in own))
        if len(multipliers) < 2:
            continue
        best = _best(own, multipliers)
        called = f"{name}, untrained, best rate"
        out += [row._replace(optimizer=called) for row in own if row.multiplier == best]
        among = ", ".join(f"{m:g}" for m in multipliers)
        notes.append(f"{called}: of its nominal rate × {among} the best for all is × {best:g}.")
    return out, notes


def _best(rows: Sequence["Row"], multipliers: Sequence) -> float:
    losses = {
        (row.cell, row.steps, row.multiplier): aggregate.validation_of(row)[-1] for row in rows
    }
    places = {(row.cell, row.steps) for row in rows}
    places = sorted(p for p in places if all((*p, m) in losses for m in multipliers))

    def score(multiplier):
        ratios = [statistics.ratio(losses[*p, multiplier], losses[*p, 1.0]) for p in places]
        return statistics.geometric_mean([x for x in ratios if not math.isnan(x)])

    scores = {multiplier: score(multiplier) for multiplier in multipliers}
    # Where nothing tells them apart, the nominal one.
    return min(multipliers, key=lambda m: (math.isnan(scores[m]), scores[m], m != 1.0))
