"""Which cells fit into a given time: `--budget=2h`."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from l2l.console.errors import UserError
from l2l.evaluation.cells import Part

_NUMBER = r"(\d+(?:\.\d*)?)"
_DURATION = re.compile(f"(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?")


def read(text: str) -> float:
    """Seconds of a duration like "2h", "20m", "90s" or "1h30m"; UserError for anything else."""
    found = _DURATION.fullmatch(text.strip())
    numbers = found.groups() if found else ()
    sizes = (3600, 60, 1)
    seconds = sum(float(n or 0) * size for n, size in zip(numbers, sizes, strict=False))
    if not seconds:
        raise UserError(f"--budget={text} is not a duration: write it like 2h, 20m, 90s or 1h30m.")
    return seconds


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever says it best."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def order(parts: Sequence[Part], costs: Sequence[float]) -> list[int]:
    """The numbers of the parts in the order that informs most: in turns the cheapest of every kind
    of cell that is left, so that whatever is done when it ends spans as many kinds as it can."""
    queues: dict[str, list[int]] = {}
    for i in sorted(range(len(parts)), key=lambda i: costs[i]):
        # Cells of a suite have a kind; of others each is its own.
        queues.setdefault(parts[i].cell.kind or parts[i].cell.name, []).append(i)
    found: list[int] = []
    while queues := {kind: queue for kind, queue in queues.items() if queue}:
        found += sorted((queue.pop(0) for queue in queues.values()), key=lambda i: costs[i])
    return found


class Planned(NamedTuple):
    """Parts that fit, in the order of measuring, with their costs; and those that do not."""

    parts: list[Part]
    costs: list[float]
    left_out: list[Part]


def fit(parts: Sequence[Part], costs: Sequence[float], budget: float) -> Planned:
    """What fits into `budget`, in the unit of the costs: in `order`, each part that still does."""
    chosen, spent = [], 0.0
    for i in order(parts, costs):
        if spent + costs[i] <= budget:
            chosen.append(i)
            spent += costs[i]
    left = [part for i, part in enumerate(parts) if i not in chosen]
    return Planned([parts[i] for i in chosen], [costs[i] for i in chosen], left)
