"""The best of a grid of hand-designed optimizers, at every horizon: the baseline to beat."""

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from l2l.console.errors import UserError
from l2l.core import base
from l2l.evaluation import baselines, cache, curves, statistics
from l2l.evaluation.curves import Curves, Problems

# Rates run at once on a CPU: 3 are as fast as 15 there, and a grid grows by 3 at a time, so
# that an extension needs no new program. An accelerator takes a whole schedule's rates at once.
AT_ONCE = 3
EXTENSION = 3
RATES = 15


class Grid(NamedTuple):
    """What is tried: learning rates × schedules × eps_roots of a kind of optimizer.

    kind:       one of `baselines.KINDS`.
    rates:      (low, high, count), log-spaced; by default the kind's limits and 15.
    schedules:  of "constant" and "cosine" (to 0 over the horizon).
    extensions: how often, at most, each schedule's rates grow by 3 at either end when the best of
                some measure sits there.
    settings:   of `baselines.grid`.
    """

    kind: str
    rates: tuple[float, float, int] | None = None
    schedules: Sequence[str] = ("constant", "cosine")
    eps_roots: Sequence[float] = (0.0, 1e-8)
    extensions: int = 4
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def limits(self) -> tuple[float, float, int]:
        """Lowest and highest rate, and how many; UserError if there is no such grid."""
        found = baselines.kind(self.kind)
        low, high, count = self.rates or (found.low, found.high, RATES)
        if not (0 < low < high and count > 1):
            raise UserError(
                f"rates=({low:g}, {high:g}, {count}) is no grid: give 0 < low < high and 2 or more."
            )
        return low, high, count

    @property
    def roots(self) -> tuple[float, ...]:
        """The eps_roots that differ to this kind."""
        rooted = baselines.kind(self.kind).rooted
        return tuple(dict.fromkeys(self.eps_roots)) if rooted else (0.0,)

    def optimizer(self) -> base.LearnedOptimizer:
        """The optimizers of the grid, as functions of a `baselines.Setting`."""
        return baselines.grid(self.kind, **self.settings)


class Point(NamedTuple):
    """One setting of the grid at one horizon. Lists have a number per problem, `inf` if not finite.

    horizon:  steps after which it was measured.
    schedule: "constant" or "cosine" (to 0 over `horizon`).
    """

    kind: str
    horizon: int
    learning_rate: float
    schedule: str
    eps_root: float
    train_loss: list[float]
    validation_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]
    diverged: list[bool]


class Tuned(NamedTuple):
    """What a search found: the best `Point` by each measure, as {horizon: Point}.

    by_train_loss, by_validation_loss, by_test_loss: least arithmetic mean over problems.
    by_test_accuracy: greatest mean, and of equals the least training loss; empty for families
      without accuracy.
    points: all that was tried.
    notes:  sentences for the reader: where the grid was extended, or its edge could not be passed.
    """

    by_train_loss: dict[int, Point]
    by_validation_loss: dict[int, Point]
    by_test_loss: dict[int, Point]
    by_test_accuracy: dict[int, Point]
    points: list[Point]
    notes: list[str]


def tune(
    grid: Grid,
    family: base.TaskFamily,
    data,
    problems: Problems,
    horizons: Sequence[int],
    *,
    cache_dir: str | os.PathLike | None = None,
    devices: Sequence[Any] | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Tuned:
    """Tries a grid on the problems that `evaluate` would give its optimizers.

    The baseline is chosen on the very problems it is then compared on, which favours it. A run at
    a constant rate passes all horizons on its way to the longest; a cosine needs one for each.

    Args:
      cache_dir: where results are kept as they come, so that the same search is not made twice; a
        result is found again by its program, its data and its inputs.
      progress: called with (the part of the training steps that is done, what was done last).
    """
    if unknown := set(grid.schedules) - {"constant", "cosine"}:
        raise UserError(f"Unknown schedules {sorted(unknown)}: choose constant, cosine or both.")
    devices = list(jax.local_devices() if devices is None else devices)
    search = _Search(grid, family, data, problems, tuple(sorted(set(horizons))), devices)
    search.cache_dir, search.progress = cache_dir, progress
    search.sweep()
    while search.grow():
        pass
    return Tuned(*_best(search.points), search.points, search.notes())


class Group(NamedTuple):
    """What shares a compiled program and a range of rates."""

    schedule: str
    steps: int
    root: float


class _Search:
    """A search under way: the rates tried in each group, and what came of them.

    Rate k of a group is low · spacing^k; k leaves 0 … count − 1 where the grid grows.
    """

    cache_dir: str | os.PathLike | None = None
    progress: Callable[[float, str], None]

    def __init__(self, grid, family, data, problems, horizons, devices):
        self.grid, self.family, self.data, self.problems = grid, family, data, problems
        self.horizons, self.devices = horizons, devices
        self.low, self.high, self.count = grid.limits
        self.spacing = (self.high / self.low) ** (1 / (self.count - 1))
        self.optimizer = grid.optimizer()
        lengths = {"constant": horizons[-1:], "cosine": horizons}
        self.tried: dict[Group, list[int]] = {
            Group(schedule, steps, root): []
            for schedule in grid.schedules
            for steps in lengths[schedule]
            for root in grid.roots
        }
        self.points: list[Point] = []
        self.grown: dict[tuple[Group, int], int] = {}  # By group and end, how often.
        self.programs: dict[int, tuple] = {}  # By steps.
        self.done = 0
        self.total = sum(group.steps for group in self.tried) * self.count * problems.count

    def sweep(self) -> None:
        """Tries the grid as it was given."""
        at_once = AT_ONCE if self.devices[0].platform == "cpu" else self.count
        for group in self.tried:
            for i in range(0, self.count, at_once):
                self.measure(group, range(i, min(i + at_once, self.count)))

    def grow(self) -> bool:
        """Extends the grid wherever a best point sits at its edge; whether it did."""
        growing = [e for e in self.edges() if self.grown.get(e, 0) < self.grid.extensions]
        count = self.problems.count
        self.total += sum(group.steps * EXTENSION * count for group, _ in growing)
        for group, end in growing:
            edge = max(self.tried[group]) if end > 0 else min(self.tried[group])
            self.measure(group, sorted(edge + end * j for j in range(1, EXTENSION + 1)))
            self.grown[group, end] = self.grown.get((group, end), 0) + 1
        return bool(growing)

    def edges(self) -> dict[tuple[Group, int], Point]:
        """The best points that sit at the edge of their grid, by group and end (−1 or 1)."""
        found = {}
        for winner in (point for by in _best(self.points) for point in by.values()):
            steps = winner.horizon if winner.schedule == "cosine" else self.horizons[-1]
            group = Group(winner.schedule, steps, winner.eps_root)
            k = round(math.log(winner.learning_rate / self.low) / math.log(self.spacing))
            for end, edge in ((-1, min(self.tried[group])), (1, max(self.tried[group]))):
                if k == edge and math.isfinite(np.mean(winner.train_loss)):
                    found[group, end] = winner
        return found

    def measure(self, group: Group, numbers: Sequence[int]) -> None:
        """Trains with the rates of these numbers, all problems, to every horizon of the group."""
        checkpoints, run, program = self._program(group.steps)
        values = [self.low * self.spacing**k for k in numbers]
        theta = baselines.setting(
            values, group.steps if group.schedule == "cosine" else 0, group.root
        )
        key, count = self.problems
        inputs = (program, self._digest, count, _numbers((theta, jax.random.key_data(key))))
        result = cache.kept(self.cache_dir, inputs, lambda: _plain(run(theta, key, self.data)))
        marks = self.horizons if group.schedule == "constant" else (group.steps,)
        for i, value in enumerate(values):
            for horizon in marks:
                c = checkpoints.index(horizon)
                measures = {k: [row[c] for row in v[i]] for k, v in result.items()}
                point = (self.grid.kind, horizon, value, group.schedule, group.root)
                self.points.append(Point(*point, **measures))
        self.tried[group].extend(numbers)
        self.done += group.steps * len(numbers) * count
        self.progress(
            self.done / self.total,
            f"{self.grid.kind} {group.schedule}, {group.steps} steps, rates to {values[-1]:.2g}",
        )

    def _program(self, steps: int):
        """(checkpoints, program, its digest for the cache) of the runs of that many steps."""
        if steps not in self.programs:
            # The program with all horizons as checkpoints serves the longest cosine too.
            checkpoints = self.horizons if steps == self.horizons[-1] else (steps,)
            run = curves.compile_evaluation(
                *(self.optimizer, self.family, self.problems.count, steps),
                checkpoints=checkpoints,
                sweep=True,
                devices=self.devices,
            )
            name = ""
            if self.cache_dir is not None:
                start = baselines.setting(1.0)
                arguments = (start, checkpoints, self.problems.key, self.data)
                name = cache.program(self.optimizer, self.family, *arguments)
            self.programs[steps] = checkpoints, run, name
        return self.programs[steps]

    @functools.cached_property
    def _digest(self) -> str:
        return cache.digest(self.data) if self.cache_dir is not None else ""

    def notes(self) -> list[str]:
        """Sentences for the reader: where the grid was extended, or its edge was not passed."""
        kind, notes = self.grid.kind, []
        for (group, end), times in self.grown.items():
            schedule, steps, root = group
            tried = self.tried[group]
            reach = self.low * self.spacing ** (max(tried) if end > 0 else min(tried))
            notes.append(
                f"The best {kind} ({schedule}, {steps} steps, eps_root {root:g}) sat at the edge "
                f"of the grid {self.low:g} … {self.high:g}, which was extended to {reach:.3g} "
                f"({times * EXTENSION} more rates)."
            )
        for (group, _), winner in self.edges().items():
            notes.append(
                f"The best {kind} at {winner.horizon} steps still sits at the edge of its grid "
                f"(rate {winner.learning_rate:.3g}, {group.schedule}): allow more than "
                f"{self.grid.extensions} extensions."
            )
        return notes


def point_setting(point: Point) -> baselines.Setting:
    """The theta of `baselines.grid` that a point stands for."""
    horizon = point.horizon if point.schedule == "cosine" else 0
    return baselines.setting(point.learning_rate, horizon, point.eps_root)


def _best(points):
    def best(measure):
        out = {}
        for point in points:
            if point.horizon not in out or measure(point) < measure(out[point.horizon]):
                out[point.horizon] = point
        return dict(sorted(out.items()))

    accurate = not any(math.isnan(x) for point in points for x in point.test_accuracy)
    return (
        best(lambda p: np.mean(p.train_loss)),
        best(lambda p: np.mean(p.validation_loss)),
        best(lambda p: np.mean(p.test_loss)),
        best(lambda p: (-np.mean(p.test_accuracy), np.mean(p.train_loss))) if accurate else {},
    )


def _plain(run: Curves) -> dict:
    """The measures as nested lists [s][n][c]; a loss that is not finite becomes `inf`."""
    return {
        "train_loss": statistics.or_infinite(run.train_loss).tolist(),
        "validation_loss": statistics.or_infinite(run.validation_loss).tolist(),
        "test_loss": statistics.or_infinite(run.test_loss).tolist(),
        "test_accuracy": run.test_accuracy.astype(float).tolist(),
        "diverged": run.diverged.tolist(),
    }


def _numbers(tree) -> list:
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(tree)]
