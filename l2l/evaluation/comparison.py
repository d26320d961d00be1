"""Optimizers beside tuned baselines on tasks of one's own: rows, table, JSON and figure."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from l2l.core import base
from l2l.evaluation import baselines, report, tuning
from l2l.evaluation import curves as evaluate
from l2l.storage import files


class Entry(NamedTuple):
    """An optimizer to be scored; theta only where it is a `LearnedOptimizer`."""

    name: str
    optimizer: Any
    theta: Any = None


class Cell(NamedTuple):
    """A family to score on, and its data."""

    name: str
    family: base.TaskFamily
    data: Any


class Score(NamedTuple):
    """rows: a dict an optimizer, task and horizon, means over problems, for `report.table`.
    summary: a dict an optimizer and horizon, over all tasks.
    curves: {(task, horizon): {optimizer: evaluate.Curves}}.
    notes: sentences for the reader."""

    rows: list[dict]
    summary: list[dict]
    curves: dict
    notes: list[str]


def score(
    key: jax.Array,
    entries: Sequence[Entry],
    cells: Iterable[Cell],
    horizons: Sequence[int],
    num_problems: int,
    *,
    kinds: Sequence[str] = ("adam",),
    eps_roots: Sequence[float] = (0.0, 1e-8),
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Score:
    """Scores optimizers and the best of each baseline's grid on the same problems.

    A row's `loss ratio` is its mean training loss over that of the first baseline, chosen by
    training loss; NaN, and a note, where such losses are not positive. `points` is its mean test
    accuracy less that of the first baseline chosen by test accuracy, in percentage points. A
    summary has the geometric mean of the former and the mean of the latter over tasks.

    Args:
      key: decides the problems.
      cells: taken one after another; each one's data are let go before the next.
      horizons: training steps; every run is told its own.
      num_problems: runs of each optimizer on each task at each horizon.
      kinds, eps_roots, cache_dir: of the baselines' grids; see `tuning.tune`.
    """
    rows, curves, notes = [], {}, []
    for cell in cells:
        cell = cell._replace(data=jax.device_put(cell.data))  # Once, not at every call.

        def told(done, total, text, cell=cell):
            progress(done, total, f"{cell.name}: {text}")

        tuned = {
            kind: tuning.tune(
                *(key, kind, cell.family, cell.data, num_problems, horizons),
                eps_roots=eps_roots,
                cache_dir=cache_dir,
                progress=told,
            )
            for kind in kinds
        }
        for result in tuned.values():
            notes += [f"{cell.name}: {note}" for note in result.notes]
        for i, horizon in enumerate(sorted(set(horizons))):
            field, reference = list(entries), (math.nan, math.nan)
            for kind, result in tuned.items():
                best = result.by_train_loss[horizon]
                field.append(
                    Entry(f"{kind}, tuned", baselines.grid(kind), tuning.point_setting(best))
                )
                if kind == kinds[0]:
                    accurate = result.by_test_accuracy.get(horizon)
                    reference = (
                        float(np.mean(best.train_loss)),
                        float(np.mean(accurate.test_accuracy)) if accurate else math.nan,
                    )
            here = curves[cell.name, horizon] = {}
            for entry in field:
                told(i, len(set(horizons)), f"{entry.name}, {horizon} steps")
                run = here[entry.name] = evaluate.evaluate(
                    *(key, entry.optimizer, cell.family, cell.data, num_problems, horizon),
                    theta=entry.theta,
                )
                rows.append(_row(cell.name, horizon, entry.name, run, reference))
                if isinstance(entry.theta, baselines.Setting):
                    kind = entry.name.split(",")[0]
                    rows[-1]["setting"] = baselines.expression(kind, entry.theta)
        evaluate.forget()  # No cell has a program that another can use.
        if kinds:
            notes += _without_ratio([row for row in rows if row["task"] == cell.name])
    return Score(rows, summarise(rows), curves, notes)


def _without_ratio(rows) -> list[str]:
    """A sentence on the rows of a task whose losses are such that a ratio of them says nothing."""
    if not any(math.isnan(row["loss ratio"]) for row in rows):
        return []
    if all(row["train loss"] == math.inf for row in rows):
        return [f"{rows[0]['task']}: no run has a finite training loss, so there are no ratios."]
    if any(row["train loss"] <= 0 for row in rows):
        return [
            f"{rows[0]['task']}: a training loss is 0 or negative, and such losses have no ratio: "
            "compare the losses themselves."
        ]
    return []


def _row(task, horizon, name, run, reference):
    loss = evaluate.or_infinite(run.train_loss[:, -1])
    accuracy = float(np.mean(run.test_accuracy[:, -1], dtype=float))
    return {
        "task": task,
        "steps": horizon,
        "optimizer": name,
        "train loss": float(loss.mean()),
        "loss ratio": evaluate.ratio(loss.mean(), reference[0]),
        "test loss": float(run.test_loss[:, -1].mean()),
        "test accuracy": accuracy,
        "points": 100 * (accuracy - reference[1]),
        "diverged": f"{int(run.diverged[:, -1].sum())}/{len(loss)}",
    }


def summarise(rows: Sequence[dict]) -> list[dict]:
    """One row an optimizer and horizon over all tasks; see `score`."""
    groups = {}
    for row in rows:
        groups.setdefault((row["steps"], row["optimizer"]), []).append(row)
    return [
        {
            "steps": steps,
            "optimizer": name,
            "tasks": len(group),
            "loss ratio": report.geometric_mean([row["loss ratio"] for row in group]),
            "points": float(np.mean([row["points"] for row in group])),
            "diverged": sum(int(row["diverged"].split("/")[0]) for row in group),
        }
        for (steps, name), group in groups.items()
    ]


def write(directory: str | os.PathLike, result: Score, about: dict | None = None) -> str:
    """Writes table.md, results.json and curves.png; returns the tables and the paths, as text.

    about: what else results.json should say, as plain data.
    """
    directory = files.folder(directory, "--output")
    several = len({row["task"] for row in result.rows}) > 1
    text = report.table(result.rows)
    if several:
        text += "\nOver all tasks:\n\n" + report.table(result.summary)
    text += "".join(f"\n{note}\n" for note in result.notes)
    paths = [directory / "table.md"]
    files.write(paths[0], text.encode())
    runs = [
        {"task": task, "steps": steps, "optimizer": name, **run._replace(losses=None)._asdict()}
        for (task, steps), field in result.curves.items()
        for name, run in field.items()
    ]
    content = dict(about or {}, rows=result.rows, summary=result.summary, notes=result.notes)
    paths.append(report.write_json(directory / "results.json", dict(content, runs=runs)))
    panels = {
        f"{task}, {steps} steps": {name: run.losses for name, run in field.items()}
        for (task, steps), field in result.curves.items()
    }
    paths.append(report.figure(panels, directory / "curves.png"))
    return text + "\n" + "\n".join(map(str, paths))


def watch(stream=None, unit: str = "step") -> Callable[[int, int, str], None]:
    """Makes `progress`: a bar on a terminal, elsewhere a dated line at most every 10 seconds.

    unit: what is counted."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        import tqdm

        bar = tqdm.tqdm(file=stream, dynamic_ncols=True, unit=unit, unit_scale=True)

        def show(done, total, text):
            bar.total = total
            bar.set_description(text, refresh=False)
            bar.update(done - bar.n)

        return show
    last = [-math.inf]

    def tell(done, total, text):
        if time.monotonic() - last[0] >= 10:
            last[0] = time.monotonic()
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            print(f"{when} {text} ({done / max(total, 1):.0%})", file=stream, flush=True)

    return tell
