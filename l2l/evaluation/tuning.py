"""The best of a space of hand-designed optimizers at each horizon: the baseline to beat."""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l.console.errors import UserError
from l2l.core import base
from l2l.evaluation import baselines, cache, curves, statistics
from l2l.evaluation.curves import Curves, Problems

# Every baseline of a suite gets as many trials as any other: so many rates, and with each of them
# so many settings of everything else.
RATES = 15
EACH = 2
TRIALS = RATES * EACH
# Trials run at once on a CPU: enough to share batches and loops, few enough to stay in its caches
# and to be kept often. An accelerator takes all of them at once.
AT_ONCE = 6
EXTENSION = 3  # Rates that a space grows by.


class Drawn(NamedTuple):
    """A trial before its horizon is known. Its rate is low · spacing^number."""

    number: int
    schedule: str
    eps_root: float
    weight_decay: float


class Grid(NamedTuple):
    """The space over which a kind of optimizer is tuned, and which of its points are tried.

    kind:       one of `baselines.KINDS`, which supplies whatever is not given here.
    rates:      (low, high, count), log-spaced; by default the kind's limits and 15.
    schedules:  of `baselines.SCHEDULE_KINDS`.
    eps_roots, weight_decays: values of either.
    each:       how many of all schedules × weight_decays are tried with each rate, and these with
                every eps_root: a different choice for each, so that all of them occur as evenly as
                they divide; None for all of them. Further eps_roots cost further trials, and none
                of those there are without them.
    extensions: how often, at most, the rates grow by 3 at either end when the best of some measure
                sits there. 0 keeps the number of trials.
    settings:   of `baselines.grid`.
    """

    kind: str
    rates: tuple[float, float, int] | None = None
    schedules: Sequence[str] | None = None
    eps_roots: Sequence[float] = (0.0,)
    weight_decays: Sequence[float] | None = None
    each: int | None = EACH
    extensions: int = 4
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def limits(self) -> tuple[float, float, int]:
        """Lowest and highest rate, and how many; UserError if there is no such grid."""
        found = baselines.kind(self.kind)
        low, high, count = self.rates or (found.low, found.high, RATES)
        if not (0 < low < high and count > 1):
            raise UserError(
                f"rates=({low:g}, {high:g}, {count}) is not a grid: give 0 < low < high "
                "and 2 rates or more."
            )
        return low, high, count

    def rate(self, number: int) -> float:
        """The rate of a number; those of 0 … count − 1 are between the limits."""
        low, high, count = self.limits
        return low * (high / low) ** (number / (count - 1))

    @property
    def values(self) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
        """Schedules, eps_roots and weight decays; UserError for an unknown schedule."""
        found = baselines.kind(self.kind)
        schedules = found.schedules if self.schedules is None else tuple(self.schedules)
        if unknown := set(schedules) - set(baselines.SCHEDULE_KINDS):
            raise UserError(
                f"Unknown schedules {sorted(unknown)}: choose from "
                f"{', '.join(baselines.SCHEDULE_KINDS)}."
            )
        roots = tuple(dict.fromkeys(self.eps_roots)) if found.rooted else (0.0,)
        decays = found.decays if self.weight_decays is None else tuple(self.weight_decays)
        return schedules, roots, decays

    def told(self) -> str:
        """The space in words: its rates, and what each of them is tried with."""
        low, high, count = self.limits
        names = ("schedule", "eps_root", "weight decay")
        varied = {n: v for n, v in zip(names, self.values, strict=True) if v != (0.0,)}
        some = "; ".join(
            f"{name} {', '.join(x if isinstance(x, str) else f'{x:g}' for x in values)}"
            for name, values in varied.items()
        )
        (pairs, each), roots = self._pairs, len(self.values[1])
        total, each = len(pairs) * roots, each * roots
        further = ", and further rates where the best one is at the edge" if self.extensions else ""
        return (
            f"{self.kind}: {count} rates from {low:g} to {high:g}, each with {each} of {total} "
            f"{'combinations' if total > 1 else 'combination'} ({some}){further}."
        )

    def drawn(self, numbers: Iterable[int]) -> list[Drawn]:
        """What is tried with the rates of these numbers."""
        pairs, each = self._pairs
        # In one shuffled round, so that neighbouring rates differ in all and none has one twice.
        order = np.random.RandomState(0).permutation(len(pairs))
        chosen = [
            (k, pairs[order[(k * each + j) % len(pairs)]]) for k in numbers for j in range(each)
        ]
        return [
            Drawn(k, schedule, root, decay)
            for k, (schedule, decay) in chosen
            for root in self.values[1]
        ]

    @property
    def _pairs(self) -> tuple[list[tuple[str, float]], int]:
        """(all schedules × weight decays, how many of them a rate is tried with)."""
        schedules, _, decays = self.values
        pairs = list(itertools.product(schedules, decays))
        return pairs, len(pairs) if self.each is None else min(self.each, len(pairs))

    def trials(self) -> list[Drawn]:
        """All that is tried, before extensions."""
        return self.drawn(range(self.limits[2]))

    def steps(self, horizons: Sequence[int]) -> int:
        """Training steps of one problem for all trials. A run at a constant rate passes all
        horizons on its way to the longest; any other needs one for each."""
        constant = sum(trial.schedule == "constant" for trial in self.trials())
        return constant * max(horizons) + (len(self.trials()) - constant) * sum(horizons)

    def optimizer(self) -> base.LearnedOptimizer:
        """The optimizers of the space, as functions of a `baselines.Setting`."""
        return baselines.grid(self.kind, **self.settings)


class Point(NamedTuple):
    """One trial at one horizon. Lists have a number per problem, `inf` if not finite.

    horizon:  steps after which it was measured; its schedule is one of so many steps.
    """

    kind: str
    horizon: int
    learning_rate: float
    schedule: str
    eps_root: float
    weight_decay: float
    train_loss: list[float]
    validation_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]
    diverged: list[bool]


class Tuned(NamedTuple):
    """What a search found: the best `Point` by each measure, as {horizon: Point}.

    by_train_loss, by_validation_loss, by_test_loss: least arithmetic mean over problems; of those
      that have one that is not finite, the fewest such problems and then the least mean of the
      others.
    by_test_accuracy: greatest mean, ties broken by the least training loss; empty for families
      without accuracy.
    points: all that was tried, by horizon, in the order of `Grid.trials`.
    notes:  sentences for the reader: where the space was extended, or its edge could not be passed.
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
    """Tries a space on the problems that `evaluate` would give its optimizers.

    The baseline is chosen on the very problems it is then compared on, which favours it.

    Args:
      cache_dir: where results are kept as they come, so that no search is run twice; a result is
        found again by its program, its data and its inputs.
      progress: called with (the part of the training steps that is done, what was done last).
    """
    devices = list(jax.local_devices() if devices is None else devices)
    search = _Search(grid, family, data, problems, tuple(sorted(set(horizons))), devices)
    search.cache_dir, search.progress = cache_dir, progress
    search.sweep()
    while search.grow():
        pass
    points = search.points()
    return Tuned(*_best(points), points, search.notes())


class _Search:
    """A search under way: what was tried, in order, and what came of it.

    The numbers of rates leave 0 … count − 1 where the space grows.
    """

    cache_dir: str | os.PathLike | None = None
    progress: Callable[[float, str], None]

    def __init__(self, grid, family, data, problems, horizons, devices):
        self.grid, self.family, self.data, self.problems = grid, family, data, problems
        self.horizons, self.devices = horizons, devices
        self.optimizer = grid.optimizer()
        self.tried: list[Drawn] = []
        self.found: dict[tuple[int, Drawn], Point] = {}  # By horizon.
        self.grown = {-1: 0, 1: 0}  # By end, how often.
        self.programs: dict[int, tuple] = {}  # By steps.
        self.abreast: dict[int, int] = {}  # Trials at once, by steps.
        self.done = 0
        self.total = grid.steps(horizons) * problems.count

    def points(self) -> list[Point]:
        return [self.found[horizon, drawn] for horizon in self.horizons for drawn in self.tried]

    def sweep(self) -> None:
        """Tries the space as it was given."""
        self.measure(self.grid.trials())

    def grow(self) -> bool:
        """Extends the rates wherever a best point sits at their edge; whether it did."""
        numbers = [drawn.number for drawn in self.tried]
        growing = [e for e in self.edges() if self.grown[e] < self.grid.extensions]
        for end in growing:
            edge = max(numbers) if end > 0 else min(numbers)
            drawn = self.grid.drawn(sorted(edge + end * j for j in range(1, EXTENSION + 1)))
            self.total += (
                self.grid.steps(self.horizons)
                * self.problems.count
                * len(drawn)
                // len(self.grid.trials())
            )
            self.measure(drawn)
            self.grown[end] += 1
        return bool(growing)

    def edges(self) -> dict[int, Point]:
        """The best points that sit at the lowest (−1) or highest (1) rate, by end."""
        numbers = [drawn.number for drawn in self.tried]
        ends = {-1: self.grid.rate(min(numbers)), 1: self.grid.rate(max(numbers))}
        winners = [point for by in _best(self.points()) for point in by.values()]
        return {
            end: point
            for end, rate in ends.items()
            for point in winners
            if point.learning_rate == rate and math.isfinite(np.mean(point.train_loss))
        }

    def measure(self, drawn: Sequence[Drawn]) -> None:
        """Trains with these, all problems, to every horizon."""
        self.tried.extend(drawn)
        longest = self.horizons[-1]
        for steps in self.horizons:
            here = [d for d in drawn if steps == longest or d.schedule != "constant"]
            if not here:
                continue
            if steps not in self.abreast:
                most = AT_ONCE if self.devices[0].platform == "cpu" else len(here)
                # Evenly, so that one compiled program serves all.
                self.abreast[steps] = -(-len(here) // -(-len(here) // most))
            size = self.abreast[steps]
            for i in range(0, len(here), size):
                self._together(steps, here[i : i + size])

    def _together(self, steps: int, drawn: Sequence[Drawn]) -> None:
        """Runs of so many steps, abreast."""
        checkpoints, run, program = self._program(steps)
        settings = [
            baselines.scheduled(self.grid.rate(d.number), d.schedule, steps, *d[2:]) for d in drawn
        ]
        settings += settings[-1:] * (self.abreast[steps] - len(drawn))
        theta = jax.tree.map(lambda *x: jnp.stack(x), *settings)
        key, count = self.problems
        inputs = (program, self._digest, count, _numbers((theta, jax.random.key_data(key))))
        result = cache.kept(self.cache_dir, inputs, lambda: _plain(run(theta, key, self.data)))
        for i, one in enumerate(drawn):
            for horizon in self.horizons if one.schedule == "constant" else (steps,):
                c = checkpoints.index(horizon)
                measures = {k: [row[c] for row in v[i]] for k, v in result.items()}
                rate = self.grid.rate(one.number)
                point = Point(self.grid.kind, horizon, rate, *one[1:], **measures)
                self.found[horizon, one] = point
        self.done += steps * len(drawn) * count
        what = f"{self.grid.kind}, {steps} steps, trial {self.tried.index(drawn[-1]) + 1}"
        self.progress(self.done / self.total, what)

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
        """Sentences for the reader: where the space was extended, or its edge was not passed."""
        kind, notes = self.grid.kind, []
        low, high, _ = self.grid.limits
        numbers = [drawn.number for drawn in self.tried]
        for end, times in self.grown.items():
            if times:
                reach = self.grid.rate(max(numbers) if end > 0 else min(numbers))
                notes.append(
                    f"The best {kind} sat at the edge of its rates {low:g} … {high:g}, which were "
                    f"extended to {reach:.3g} ({times * EXTENSION} more rates)."
                )
        for winner in self.edges().values():
            more = (
                f": allow more than {self.grid.extensions} extensions"
                if self.grid.extensions
                else ""
            )
            notes.append(
                f"The best {kind} at {winner.horizon} steps sits at the edge of its rates "
                f"({winner.learning_rate:.3g}, {winner.schedule}){more}."
            )
        return notes


def point_setting(point: Point) -> baselines.Setting:
    """The theta of `baselines.grid` that a point stands for."""
    rest = point.horizon, point.eps_root, point.weight_decay
    return baselines.scheduled(point.learning_rate, point.schedule, *rest)


def _rank(losses: Sequence[float]) -> tuple[int, float]:
    """What is least for the best of several lists of losses over the same problems."""
    finite = [x for x in losses if math.isfinite(x)]
    return len(losses) - len(finite), float(np.mean(finite)) if finite else 0.0


def _best(points):
    def best(measure):
        out = {}
        for point in points:
            if point.horizon not in out or measure(point) < measure(out[point.horizon]):
                out[point.horizon] = point
        return dict(sorted(out.items()))

    accurate = not any(math.isnan(x) for point in points for x in point.test_accuracy)
    return (
        best(lambda p: _rank(p.train_loss)),
        best(lambda p: _rank(p.validation_loss)),
        best(lambda p: _rank(p.test_loss)),
        best(lambda p: (-np.mean(p.test_accuracy), _rank(p.train_loss))) if accurate else {},
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
