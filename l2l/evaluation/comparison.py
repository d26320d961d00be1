"""Optimizers beside tuned baselines on the same problems: `measure`, cell by cell.

The comparison after a training, `python -m l2l.evaluate` and its suites all come through here. What
a row's numbers mean is in `report.LEGEND`.
"""

import math
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.console.errors import UserError
from l2l.core import base, unroll
from l2l.evaluation import baselines, cache, curves, statistics, timing, tuning
from l2l.evaluation.cells import Cell, Part, estimate, plan
from l2l.evaluation.curves import Curves, Problems
from l2l.evaluation.tuning import Grid

TUNING = 0.9  # Of the work on a cell, the part that is spent on its grids.


class Entry(NamedTuple):
    """An optimizer to be measured.

    optimizer:  an optax transformation; a `LearnedOptimizer`, with its theta; or a function
                (num_steps) -> an optax transformation.
    told:       the fraction of a run's length that the optimizer is told is its horizon; 0 tells
                it nothing.
    variant_of: the name of the learned optimizer that this one is there to be compared with; see
                `entries.variants`.
    multiplier: the factor on the rate of an untrained optimizer; None for others.
    """

    name: str
    optimizer: Any
    theta: Any = None
    told: float = 1.0
    variant_of: str | None = None
    multiplier: float | None = None

    def at(self, num_steps: int) -> tuple[base.LearnedOptimizer, Any]:
        """(optimizer, theta) of runs of that length."""
        optimizer, theta = self.optimizer, self.theta
        if not isinstance(optimizer, base.LearnedOptimizer):
            made = optimizer if hasattr(optimizer, "init") else optimizer(num_steps)
            optimizer, theta = base.fixed(made), ()
        return optimizer if self.told == 1 else telling(optimizer, self.told), theta


def telling(optimizer: base.LearnedOptimizer, share: float) -> base.LearnedOptimizer:
    """An optimizer that is told `share` of the steps it would be told, rounded; 0 is nothing."""

    def bind(theta):
        transform = optimizer.bind(theta)

        def update(updates, state, params=None, *, num_steps=None, **extra_args):
            if num_steps is not None:
                num_steps = jnp.round(share * num_steps).astype(jnp.int32)
            return transform.update(updates, state, params, num_steps=num_steps, **extra_args)

        return optax.GradientTransformationExtraArgs(transform.init, update)

    return optimizer._replace(bind=bind, rule=None)


class Trial(NamedTuple):
    """One setting of a baseline's space, tried in the cell to the row's horizon: what it came to,
    means over problems, infinite if one is not finite. `setting` as `baselines.parse` reads it."""

    setting: str
    train: float
    validation: float
    test: float


class Selected(NamedTuple):
    """A setting of a baseline's space, and its runs."""

    setting: str
    curves: Curves


class Row(NamedTuple):
    """One optimizer in one cell at one horizon; the numbers are those of `report.LEGEND`.

    told, variant_of, multiplier: as of its `Entry`.
    setting:  of a tuned baseline, as `baselines.parse` reads it; None of others.
    interval: (low, high) of `ratio`.
    seconds:  of a training step of one problem, mean over a run; NaN where steps are not timed.
    sooner:   {kind of tuned baseline: {"steps", "interval", "time"}}.
    notes:    of a tuned baseline, sentences about its grid.
    trials:   of a tuned baseline, all settings that were tried at this horizon, in the order of
              trying, which the grid alone decides; the row itself is the best of them by `train`.
    start:    the loss of the first batch, before the first step; mean over problems.
    curves:   the runs of this optimizer; of a tuned baseline those of `setting`.
    by_validation: of a tuned baseline, the best trial by `validation` and its runs.
    """

    cell: str
    kind: str
    steps: int
    optimizer: str
    told: float
    variant_of: str | None
    multiplier: float | None
    setting: str | None
    train: float
    ratio: float
    interval: tuple[float, float]
    test: float
    test_ratio: float
    accuracy: float
    points: float
    area: float
    diverged: int
    runs: int
    seconds: float
    sooner: dict[str, dict]
    notes: tuple[str, ...]
    trials: tuple[Trial, ...]
    start: float
    curves: Curves
    by_validation: Selected | None


def measure(
    entries: Sequence[Entry],
    cells: Sequence[Cell],
    horizons: Sequence[int],
    problems: Problems,
    *,
    grids: Sequence[Grid] = (Grid("adam"),),
    timed: bool = False,
    cache_dir: str | os.PathLike | None = None,
    parts: Sequence[Part] | None = None,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> Iterator[Row]:
    """Measures optimizers and the best of each grid, in the order of `plan`. The rows of a cell at
    a horizon come as soon as they are ready, the entries' before the baselines'.

    Args:
      horizons: in training steps; the optimizer of every run is told its own.
      problems: of each cell; all optimizers meet the same ones.
      grids: baselines, tuned for each cell and horizon. Ratios are taken to the first.
      timed: whether to measure the seconds of a training step too.
      cache_dir: where everything is kept as it is measured, timings too: the same call continues
        where another was interrupted.
      parts: what of `plan` is measured, and in which order; by default all of it.
      progress: called with (the part of the work that is done, what is being done).

    Raises:
      UserError: two optimizers have one name, or two cells; or the start or the loss that theta
        holds belongs to another model than a cell's.
    """
    _check_names("optimizers", [e.name for e in entries] + [tuned_name(g.kind) for g in grids])
    _check_names("cells", [cell.name for cell in cells])
    parts = plan(cells, horizons) if parts is None else parts
    if particular := [entry for entry in entries if _belongs_to_a_model(entry.optimizer)]:
        for cell in {part.cell.name: part.cell for part in parts}.values():
            _check_fit(particular, cell, problems.key)
    costs = [estimate(part, grids, problems.count, len(entries)) for part in parts]
    for i, (part, cost) in enumerate(zip(parts, costs, strict=True)):
        steps = ", ".join(f"{h:,}" for h in part.horizons)
        before, label = sum(costs[:i]), f"{part.cell.name}, {steps} steps"

        def report(share, text, before=before, cost=cost, label=label):
            progress((before + share * cost) / sum(costs), f"{label}: {text}")

        yield from _Field(part, entries, problems, grids, cache_dir, report).rows(timed)
        curves.forget()  # No cell has a program that another can use.
    progress(1.0, "done")


def _check_names(what: str, names: Sequence[str]) -> None:
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(
            f"Two {what} are called {twice[0]!r}, and their numbers are kept by their names: give "
            "them names that differ."
        )


def _belongs_to_a_model(optimizer) -> bool:
    """Whether theta holds a start or a loss, which fit one model only."""
    learned = isinstance(optimizer, base.LearnedOptimizer)
    return learned and not (optimizer.start is None and optimizer.loss is None)


def _check_fit(entries: Sequence[Entry], cell: Cell, key) -> None:
    """UserError, before anything is measured, for a start or a loss of another model than the
    cell's. Data are read for a loss alone, which may ask for labels, and not kept: those of all
    cells together may be too many."""
    learned_loss = any(entry.optimizer.loss is not None for entry in entries)
    family, data = cell.read() if learned_loss else (cell.family(), ())
    for entry in entries:

        def fit(theta, key, data, optimizer=entry.optimizer):
            run = curves.started(optimizer, theta, curves.beginning(family, key))
            if optimizer.loss is not None:
                batch = family.batch(key, run.problem, data, "train")
                loss = unroll.trained_on(family, optimizer, theta).loss
                loss(run.params, run.problem, batch)

        try:
            jax.eval_shape(fit, entry.theta, key, data)
        except UserError as error:
            raise UserError(f"{entry.name} on {cell.name}: {error}") from None


class _Field:
    """All that meet in a part: the entries, and the best of each grid."""

    def __init__(self, part, entries, problems, grids, cache_dir, report):
        self.cell, self.horizons = part
        self.entries, self.problems, self.grids = entries, problems, grids
        self.cache_dir, self.report = cache_dir, report
        self.family, self.data = self.cell.load()
        # Made once, so that all settings of a kind share a compiled program.
        self.optimizers = [grid.optimizer() for grid in grids]
        self.tuned = [self._tune(i, grid) for i, grid in enumerate(grids)]

    def _tune(self, i: int, grid: Grid) -> tuning.Tuned:
        def progress(share, text):
            self.report(TUNING * (i + share) / len(self.grids), text)

        return tuning.tune(
            *(grid, self.family, self.data, self.problems, self.horizons),
            cache_dir=self.cache_dir,
            progress=progress,
        )

    def rows(self, timed: bool) -> Iterator[Row]:
        pace = self._pace() if timed else {}
        for horizon in self.horizons:
            seconds = {name: each.over(horizon) for name, each in pace.items()}
            best = [t.by_train_loss[horizon] for t in self.tuned]
            field = self.entries + [
                Entry(tuned_name(grid.kind), optimizer, tuning.point_setting(point))
                for grid, optimizer, point in zip(self.grids, self.optimizers, best, strict=True)
            ]
            runs = {}
            for entry in field:
                self.report((1 + TUNING) / 2, f"{entry.name} at {horizon:,}")
                runs[entry.name] = self._trained(entry.at(horizon), horizon)
            for entry in field:
                yield self._row(entry, horizon, runs, seconds)

    def _trained(self, made: tuple[base.LearnedOptimizer, Any], horizon: int) -> Curves:
        where = (self.family, self.data, self.problems, horizon, self.cache_dir)
        return cache.trained(*made, *where)

    def _selected(self, i: int, horizon: int, own: Curves) -> Selected:
        """Of grid i, the best by validation loss; `own`: the runs of the best by training loss."""
        point = self.tuned[i].by_validation_loss[horizon]
        if point != self.tuned[i].by_train_loss[horizon]:
            own = self._trained((self.optimizers[i], tuning.point_setting(point)), horizon)
        return Selected(_setting(self.grids[i], point), own)

    def _row(self, entry, horizon: int, runs: Mapping[str, Curves], seconds: Mapping) -> Row:
        # A step of a variant costs what one of the optimizer itself does.
        own, duration = runs[entry.name], seconds.get(entry.variant_of or entry.name, math.nan)
        final = own.train_loss[:, -1]
        test = float(np.mean(statistics.or_infinite(own.test_loss[:, -1])))
        accuracy = float(np.mean(own.test_accuracy[:, -1], dtype=float))
        middle, low, high = (math.nan,) * 3
        test_ratio = points = math.nan
        if self.grids:
            reference = runs[tuned_name(self.grids[0].kind)].train_loss[:, -1]
            if np.isfinite(final).any() or np.isfinite(reference).any():
                middle, low, high = statistics.interval(statistics.ratio(final, reference))
            if not np.isfinite([final, reference]).all():
                low = high = math.nan  # Also where two that are infinite count as equal.
            tuned = self.tuned[0]
            best_test = np.mean(tuned.by_test_loss[horizon].test_loss)
            test_ratio = float(statistics.ratio(test, best_test))
            if accurate := tuned.by_test_accuracy.get(horizon):
                points = 100 * (accuracy - float(np.mean(accurate.test_accuracy)))
        sooner, setting, notes, trials, selected = {}, None, (), (), None
        for i, (grid, tuned) in enumerate(zip(self.grids, self.tuned, strict=True)):
            name = tuned_name(grid.kind)
            steps = statistics.interval(statistics.speed_up(own.losses, runs[name].losses))
            time = seconds.get(name, math.nan) / duration
            sooner[grid.kind] = {"steps": steps[0], "interval": steps[1:], "time": steps[0] * time}
            if name == entry.name:
                setting = _setting(grid, tuned.by_train_loss[horizon])
                trials = tuple(_trial(grid, p) for p in tuned.points if p.horizon == horizon)
                selected = self._selected(i, horizon, own)
                # The notes are those of the whole search; they are told once.
                notes = tuple(tuned.notes) if horizon == self.horizons[-1] else ()
        return Row(
            cell=self.cell.name,
            kind=self.cell.kind,
            steps=horizon,
            optimizer=entry.name,
            told=entry.told,
            variant_of=entry.variant_of,
            multiplier=entry.multiplier,
            setting=setting,
            train=float(np.mean(statistics.or_infinite(final))),
            ratio=middle,
            interval=(low, high),
            test=test,
            test_ratio=test_ratio,
            accuracy=accuracy,
            points=points,
            area=float(np.mean(statistics.or_infinite(own.losses))),
            diverged=int(own.diverged[:, -1].sum()),
            runs=len(final),
            seconds=duration,
            sooner=sooner,
            notes=notes,
            trials=trials,
            start=float(np.mean(own.losses[:, 0], dtype=float)),
            curves=own,
            by_validation=selected,
        )

    def _pace(self) -> dict[str, timing.Pace]:
        """`timing.pace` of all, in one go: kept together, since they are compared."""
        longest = self.horizons[-1]
        field = {e.name: e.at(longest) for e in self.entries if e.variant_of is None}
        for grid, optimizer in zip(self.grids, self.optimizers, strict=True):
            field[tuned_name(grid.kind)] = optimizer, baselines.setting(1e-3)
        inputs, key = (), self.problems.key
        if self.cache_dir is not None:
            programs = {
                name: cache.program(optimizer, self.family, theta, (1,), key, self.data)
                for name, (optimizer, theta) in field.items()
            }
            inputs = ("pace", programs, platform.node(), jax.devices()[0].device_kind)

        def compute():
            # Of a dear cell fewer steps and rounds are enough.
            cheap = self.cell.cost * 60 < 1e6
            how = dict(steps=60, rounds=15) if cheap else dict(steps=20, rounds=3)
            return timing.pace(key, field, self.family, self.data, **how)

        return {k: timing.Pace(*x) for k, x in cache.kept(self.cache_dir, inputs, compute).items()}


def _setting(grid: Grid, point: tuning.Point) -> str:
    return baselines.expression(grid.kind, tuning.point_setting(point), **grid.settings)


def _trial(grid: Grid, point: tuning.Point) -> Trial:
    losses = (point.train_loss, point.validation_loss, point.test_loss)
    return Trial(_setting(grid, point), *(float(np.mean(x)) for x in losses))


def tuned_name(kind: str) -> str:
    """What the tuned baseline of a kind is called."""
    return f"{kind}, tuned"
