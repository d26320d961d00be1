"""The best of a grid of hand-designed optimizers, at every horizon: the baseline to beat."""

import math
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from l2l.console.errors import UserError
from l2l.core import base
from l2l.evaluation import baselines, cache
from l2l.evaluation import curves as evaluate

# Rates that go abreast on a CPU: 3 are as fast as 15 there, and a grid grows by 3 at a time, so
# that an extension needs no new program. An accelerator takes a whole schedule's rates at once.
ABREAST = 3
EXTENSION = 3


class Point(NamedTuple):
    """One setting of the grid at one horizon. Lists have a number a problem; `inf` for non-finite.

    horizon:  steps after which it was measured.
    schedule: "constant" or "cosine" (to 0 over `horizon`).
    """

    kind: str
    horizon: int
    learning_rate: float
    schedule: str
    eps_root: float
    train_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]
    diverged: list[bool]


class Tuned(NamedTuple):
    """What a search found: the best `Point` by each measure, as {horizon: Point}.

    by_train_loss, by_test_loss: least arithmetic mean over problems.
    by_test_accuracy: greatest mean, and of equals the least training loss; empty for families
      without accuracy.
    points: all that was tried.
    notes:  sentences for the reader: where the grid was extended, or its edge could not be passed.
    """

    by_train_loss: dict[int, Point]
    by_test_loss: dict[int, Point]
    by_test_accuracy: dict[int, Point]
    points: list[Point]
    notes: list[str]


def tune(
    key: jax.Array,
    kind: str,
    family: base.TaskFamily,
    data,
    num_problems: int,
    horizons: Sequence[int],
    *,
    rates: tuple[float, float, int] | None = None,
    schedules: Sequence[str] = ("constant", "cosine"),
    eps_roots: Sequence[float] = (0.0, 1e-8),
    extensions: int = 4,
    cache_dir: str | os.PathLike | None = None,
    devices: Sequence[jax.Device] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    **settings,
) -> Tuned:
    """Tries learning rates × schedules × eps_roots on the problems that `evaluate` would give them.

    The baseline is chosen on the very problems it is then compared on, which favours it. A run at
    a constant rate passes all horizons on its way to the longest; a cosine needs one for each.

    Args:
      kind: one of `baselines.KINDS`.
      rates: (low, high, count), log-spaced; by default the kind's limits and 15.
      extensions: how often, at most, each schedule's grid grows by 3 rates at either end when the
        best of some measure sits there.
      cache_dir: where results are kept as they come, so that the same search is not made twice; a
        result is found again by its program, its data and its inputs.
      progress: called with (training steps done, in all, what was done last).
      settings: of `baselines.grid`.
    """
    found = baselines.kind(kind)
    low, high, count = rates or (found.low, found.high, 15)
    if not (0 < low < high and count > 1):
        raise UserError(
            f"rates=({low:g}, {high:g}, {count}) is no grid: give 0 < low < high and 2 or more."
        )
    if unknown := set(schedules) - {"constant", "cosine"}:
        raise UserError(f"Unknown schedules {sorted(unknown)}: choose constant, cosine or both.")
    horizons = tuple(sorted(set(horizons)))
    roots = tuple(dict.fromkeys(eps_roots)) if found.rooted else (0.0,)
    spacing = (high / low) ** (1 / (count - 1))
    optimizer = baselines.grid(kind, **settings)
    devices = list(jax.local_devices() if devices is None else devices)
    abreast = ABREAST if devices[0].platform == "cpu" else count
    digest = cache.digest(data) if cache_dir is not None else ""

    # A group is what shares a compiled program and a range of rates: (schedule, steps, eps_root).
    lengths = {"constant": horizons[-1:], "cosine": horizons}
    groups = [(s, steps, root) for s in schedules for steps in lengths[s] for root in roots]
    tried = {group: [] for group in groups}  # Numbers k of the rates low · spacing^k.
    points: list[Point] = []
    done, total = 0, sum(steps for _, steps, _ in groups) * count * num_problems
    programs = {}

    def measure(group, numbers):
        nonlocal done
        schedule, steps, root = group
        marks = horizons if schedule == "constant" else (steps,)
        # The program with all horizons as checkpoints serves the longest cosine too.
        checkpoints = horizons if steps == horizons[-1] else (steps,)
        if steps not in programs:
            arguments = dict(checkpoints=checkpoints, sweep=True, devices=devices)
            programs[steps] = (
                evaluate.compile_evaluation(optimizer, family, num_problems, steps, **arguments),
                cache.program(optimizer, family, baselines.setting(1.0), checkpoints, key, data)
                if cache_dir is not None
                else "",
            )
        run, program = programs[steps]
        values = [low * spacing**k for k in numbers]
        theta = baselines.setting(values, steps if schedule == "cosine" else 0, root)
        inputs = (program, digest, num_problems, _numbers((theta, jax.random.key_data(key))))
        result = cache.kept(cache_dir, inputs, lambda: _plain(run(theta, key, data)))
        for i, value in enumerate(values):
            for horizon in marks:
                c = checkpoints.index(horizon)
                measures = {k: [row[c] for row in v[i]] for k, v in result.items()}
                points.append(Point(kind, horizon, value, schedule, root, **measures))
        tried[group].extend(numbers)
        done += steps * len(numbers) * num_problems
        progress(done, total, f"{kind} {schedule}, {steps} steps, rates to {values[-1]:.2g}")

    for group in groups:
        for i in range(0, count, abreast):
            measure(group, range(i, min(i + abreast, count)))

    notes, grown = [], {}
    while True:
        best = _best(points)
        edges = {}
        for winner in (p for by in best for p in by.values()):
            steps = winner.horizon if winner.schedule == "cosine" else horizons[-1]
            group = (winner.schedule, steps, winner.eps_root)
            k = round(math.log(winner.learning_rate / low) / math.log(spacing))
            for end, edge in ((-1, min(tried[group])), (1, max(tried[group]))):
                if k == edge and math.isfinite(np.mean(winner.train_loss)):
                    edges[group, end] = winner
        growing = {e: w for e, w in edges.items() if grown.get(e, 0) < extensions}
        if not growing:
            break
        total += sum(group[1] * EXTENSION * num_problems for group, _ in growing)
        for (group, end), _ in growing.items():
            edge = max(tried[group]) if end > 0 else min(tried[group])
            measure(group, sorted(edge + end * j for j in range(1, EXTENSION + 1)))
            grown[group, end] = grown.get((group, end), 0) + 1
    for (group, end), times in grown.items():
        schedule, steps, root = group
        reach = low * spacing ** (max(tried[group]) if end > 0 else min(tried[group]))
        notes.append(
            f"The best {kind} ({schedule}, {steps} steps, eps_root {root:g}) sat at the edge of "
            f"the grid {low:g} … {high:g}, which was extended to {reach:.3g} "
            f"({times * EXTENSION} more rates)."
        )
    for (group, _), winner in edges.items():
        notes.append(
            f"The best {kind} at {winner.horizon} steps still sits at the edge of its grid "
            f"(rate {winner.learning_rate:.3g}, {group[0]}): allow more than {extensions} "
            "extensions."
        )
    return Tuned(*best, points, notes)


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
        best(lambda p: np.mean(p.test_loss)),
        best(lambda p: (-np.mean(p.test_accuracy), np.mean(p.train_loss))) if accurate else {},
    )


def _plain(curves: evaluate.Curves) -> dict:
    """The measures as nested lists [s][n][c]; a loss that is not finite becomes `inf`."""
    return {
        "train_loss": evaluate.or_infinite(curves.train_loss).tolist(),
        "test_loss": evaluate.or_infinite(curves.test_loss).tolist(),
        "test_accuracy": curves.test_accuracy.astype(float).tolist(),
        "diverged": curves.diverged.tolist(),
    }


def _numbers(tree) -> list:
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(tree)]
