"""What optimizers are measured on: cells, in which order, and about how long that takes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from l2l.core import base
from l2l.evaluation import baselines, curves
from l2l.evaluation.tuning import Grid
from l2l.tasks import registry

TOGETHER = 1_000  # Horizons up to here are measured together, and in all cells before longer ones.
COMPILING = 4.0  # CPU seconds a program.
# A step of a learned optimizer is taken for so many of Adam's in the estimate, but its own part for
# no more than so many CPU microseconds: those that a per-coordinate LSTM takes for a million.
LEARNED, DEAREST = 5.0, 150_000.0


class Cell(NamedTuple):
    """What optimizers are measured on: a task, whose problems vary as the task defines.

    task:    a family, or the section `task` of a configuration that makes one.
    kind:    in what it differs from the training of the released optimizers, of `suites.KINDS`.
    cost:    CPU microseconds a training step of one problem in a sweep of Adam's rates, measured
             on one core of an EPYC: for the estimate, and for what comes first.
    whole:   likewise, CPU milliseconds a run for its measurements over whole splits.
    rows:    how many of each split are used; None for all.
    instead: the cell that is measured where this one's data are absent; None for none.
    scored:  how many rows of a whole split are measured, evenly spaced, while batches come from
             all of them; None for all.
    horizons: its own numbers of training steps, instead of those asked for; () for none.
    """

    name: str
    task: base.TaskFamily | Mapping[str, Any]
    kind: str = ""
    cost: float = 50.0
    whole: float = 3.0
    rows: int | None = None
    instead: str | None = None
    scored: int | None = None
    horizons: tuple[int, ...] = ()

    def steps(self, horizons: Sequence[int]) -> tuple[int, ...]:
        """The steps after which it is measured where `horizons` are asked for, increasing."""
        return tuple(sorted(set(self.horizons or horizons)))

    def family(self) -> base.TaskFamily:
        """The family, measured on `scored` rows of whole splits."""
        task = self.task
        family = task if isinstance(task, base.TaskFamily) else registry.task(task)
        if self.scored is not None:
            family = family._replace(batch=_spaced(family.batch, self.scored))
        return family

    def read(self) -> tuple[base.TaskFamily, Any]:
        """The family and its data, cut to `rows`, where the family keeps them."""
        family = self.family()
        data = family.data()
        if self.rows is not None:
            data = jax.tree.map(lambda x: x[: self.rows], data)
        return family, data

    def load(self) -> tuple[base.TaskFamily, Any]:
        """What `read` gives, with the data on a device: for what trains on them."""
        family, data = self.read()
        return family, jax.device_put(data)


def _spaced(batch: Callable, count: int) -> Callable:
    """`batch` of a family, of whose whole splits at most `count` rows are left, evenly spaced."""

    def spaced(key, problem, data, split):
        rows = batch(key, problem, data, split)
        return rows if key is not None else curves.spaced(rows, count)

    return spaced


class Part(NamedTuple):
    """What is measured in one go: a cell at several horizons."""

    cell: Cell
    horizons: tuple[int, ...]


def plan(cells: Sequence[Cell], horizons: Sequence[int]) -> list[Part]:
    """The parts in the order of measuring. Of several cells, the short horizons in all of them
    first, then each longer one, always from the cheapest cell on, so that what was done when it
    ends early is of use. A single cell is one part: its grids share their runs."""
    parts = []
    for cell in cells:
        steps = cell.steps(horizons)
        short = tuple(h for h in steps if h <= TOGETHER)
        groups = [short] * bool(short) + [(h,) for h in steps if h > TOGETHER]
        parts += [Part(cell, group) for group in ([steps] if len(cells) == 1 else groups)]

    def place(part):
        longest = part.horizons[-1]
        return longest if longest > TOGETHER else 0, part.cell.cost

    return sorted(parts, key=place)


def estimate(part: Part, grids: Sequence[Grid], count: int, entries: int) -> float:
    """CPU seconds of one part, without extensions of the grids."""
    cell, horizons = part
    swept = sum(g.steps(horizons) * baselines.kind(g.kind).cost for g in grids)
    runs = sum(len(g.trials()) for g in grids) * (1 + len(horizons))
    learned = min(LEARNED, 1 + DEAREST / cell.cost)
    single = sum(horizons) * (len(grids) + learned * entries)
    programs = (len(grids) * 2 + entries) * (len(horizons) + 1)
    steps, whole = cell.cost * 1e-6 * (swept + single), cell.whole * 1e-3 * runs
    return count * (steps + whole) + COMPILING * programs
