"""What the measurements of a suite come to: rows, summary, tables and figures.

LEGEND defines every column, for the reader of the table as for that of the code.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from l2l.evaluation import curves as evaluate
from l2l.evaluation import report
from l2l.evaluation import timing as speed
from l2l.evaluation.suites import CELLS, Result, Suite, tuned_name
from l2l.storage import files

TOLERANCE = 1.02  # Of test losses.
LEGEND = """\
Every optimizer was told the horizon and met the same problems; a cell's problems differ in their
initial values and batches. A tuned baseline is the best of its grid (15 rates × {constant, cosine},
grown where the best sat at its edge) by mean final training loss, for this cell and horizon, chosen
on the very problems it is compared on.

- *train*, *test*: loss over the whole training and test split after the last step, mean over
  problems; infinite if one is not finite.
- *ratio*: train over that of tuned Adam, geometric mean over problems, and its 95 % interval
  (Student's, over the logarithms; losses below 1e-8 count as that; no interval where a loss is
  infinite).
- *test ratio*: test over that of the Adam of its grid that is best by mean test loss.
- *area*: under the training curve, as the mean batch loss over all steps and problems.
- *diverged*: runs with a batch or final training loss that is not finite, or a final training loss
  above twice the initial one (which is positive in all cells), of all runs.
- *steps/…*: how many times fewer steps than that tuned baseline. Training losses are smoothed (mean
  of the batch losses of the last twentieth of the horizon). Of the two, the one that ends higher
  sets the target, and the factor is the horizon over the first step at which the other is there;
  below 1 where it is the baseline that is there sooner. It is between 1/horizon and horizon, 1 for
  a baseline against itself; geometric mean over problems.
- *time/…*: the same in time: steps/… times the seconds of a training step of the baseline over
  those of this optimizer (*µs*), both measured in turns in the same run, medians.

In the summary: *steps/…* and *time/…*, medians over cells; *train no worse*, the share of cells
with a ratio of at most 1; *test within 2 %*, the share with a test ratio of at most 1.02.
"""


def rows(result: Result) -> list[dict]:
    """A dict an optimizer: the columns of `LEGEND` as numbers."""
    kinds = list(result.best_test)
    reference = result.field[tuned_name(kinds[0])].curves
    return [_row(result, name, reference, kinds) for name in result.field]


def _row(result, name, reference, kinds) -> dict:
    own = result.field[name]
    losses, final = own.curves.losses, own.curves.train_loss[:, -1]
    train, test, area = (
        float(np.mean(evaluate.or_infinite(x)))
        for x in (final, own.curves.test_loss[:, -1], losses)
    )
    ratio, low, high = speed.interval(speed.ratios(final, reference.train_loss[:, -1]))
    sooner = {}
    for kind in kinds:
        other = result.field[tuned_name(kind)]
        steps = speed.interval(speed.speed_up(losses, other.curves.losses))
        time = 1.0 if other is own else other.seconds / own.seconds
        sooner[kind] = {"steps": steps[0], "interval": steps[1:], "time": steps[0] * time}
    best_test = result.best_test[kinds[0]]
    return {
        "cell": result.cell,
        "kind": result.kind,
        "steps": result.steps,
        "optimizer": name,
        "setting": own.setting,
        "train": train,
        "ratio": ratio,
        "interval": (low, high),
        "test": test,
        "test ratio": 1.0 if test == best_test else test / max(best_test, speed.FLOOR),
        "area": area,
        "diverged": int(own.curves.diverged[:, -1].sum()),
        "runs": len(final),
        "microseconds": 1e6 * own.seconds,
        "sooner": sooner,
    }


def summarise(found: Sequence[Mapping]) -> list[dict]:
    """A dict an optimizer and horizon, and one over all horizons; see `LEGEND`."""
    groups = {}
    for row in found:
        for steps in (row["steps"], "all"):
            groups.setdefault((row["optimizer"], steps), []).append(row)
    order = sorted(groups, key=lambda g: (_place(found, g[0]), g[1] == "all", str(g[1]).zfill(9)))
    return [_sum(name, steps, groups[name, steps]) for name, steps in order]


def _place(found, name) -> int:
    return next(i for i, row in enumerate(found) if row["optimizer"] == name)


def _sum(name, steps, group) -> dict:

    def share(test):
        return sum(map(test, group)) / len(group)

    out = {"optimizer": name, "steps": steps, "cells": len(group)}
    for measure in ("steps", "time"):
        for kind in group[0]["sooner"]:
            values = [row["sooner"][kind][measure] for row in group]
            out[f"{measure}/{kind}"] = float(np.median(values))
    return out | {
        "ratio": report.geometric_mean([row["ratio"] for row in group]),
        "train no worse": share(lambda row: row["ratio"] <= 1),
        "test within 2 %": share(lambda row: row["test ratio"] <= TOLERANCE),
        "diverged": f"{sum(row['diverged'] for row in group)}/{sum(row['runs'] for row in group)}",
    }


def missing(results: Sequence[Result], cells: Sequence[str], horizons: Sequence[int]) -> list[str]:
    """A sentence a horizon for the cells that should have been measured and were not."""
    have = {(result.cell, result.steps) for result in results}
    sentences = []
    for steps in sorted(set(horizons)):
        if lacking := [cell for cell in cells if (cell, steps) not in have]:
            sentences.append(f"Not yet measured at {steps:,} steps: {', '.join(lacking)}.")
    return sentences


def write(
    directory: str | os.PathLike,
    results: Sequence[Result],
    suite: Suite,
    cells: Sequence[str],
    horizons: Sequence[int],
    notes: Sequence[str],
    about: Mapping,
    figures: bool = True,
) -> str:
    """Writes table.md and results.json, and scorecard.png and curves-….png if `figures`; returns
    the summary and the paths, as text.

    Args:
      results: what was measured; of `cells` × `horizons`, what is not among it is told.
      notes: further sentences for the reader.
      about: what else results.json should say, as plain data.
    """
    directory = files.folder(directory, "--output")
    ordered = sorted(results, key=lambda r: (r.steps, list(CELLS).index(r.cell)))
    found = [row for result in ordered for row in rows(result)]
    summary, lacking = summarise(found), missing(results, cells, horizons)
    notes = [*lacking, *notes, *(f"{r.cell}: {note}" for r in ordered for note in r.notes)]
    short = "" if not found else report.table(summary)
    short += "".join(f"\n{sentence}\n" for sentence in lacking)
    text = f"# Scorecard\n\n{short}\n{LEGEND}"
    for steps in sorted(set(horizons)):
        here = [_shown(row) for row in found if row["steps"] == steps]
        done = {row["cell"] for row in here}
        here += [
            {"cell": cell, "kind": CELLS[cell].kind, "optimizer": "not yet measured"}
            for cell in cells
            if cell not in done
        ]
        text += f"\n## {steps:,} steps\n\n{report.table(here)}"
    text += "\n## Notes\n\n" + "".join(f"- {note}\n" for note in notes) if notes else ""
    paths = [directory / "table.md"]
    files.write(paths[0], text.encode())
    content = dict(about, summary=summary, rows=found, notes=notes, suite=suite)
    content["tasks"] = {cell: CELLS[cell] for cell in cells}
    paths.append(report.write_json(directory / "results.json", content))
    if figures and found:
        paths += _draw(directory, ordered, found)
    return short + "\n" + "\n".join(map(str, paths))


def _shown(row: Mapping) -> dict:
    """A row as the table has it."""
    shown = {key: row[key] for key in ("cell", "kind", "optimizer", "train", "ratio")}
    low, high = row["interval"]
    shown["95 %"] = None if math.isnan(low) else f"{low:.2g} … {high:.2g}"
    shown |= {key: row[key] for key in ("test", "test ratio", "area")}
    shown["diverged"] = f"{row['diverged']}/{row['runs']}"
    for measure in ("steps", "time"):
        for kind, sooner in row["sooner"].items():
            shown[f"{measure}/{kind}"] = sooner[measure]
    shown["µs"] = row["microseconds"]
    return shown


def _draw(directory, ordered, found) -> list[Path]:
    baselines = {tuned_name(kind) for kind in found[0]["sooner"]}
    names = [n for n in dict.fromkeys(row["optimizer"] for row in found) if n not in baselines]
    paths = []
    for i, name in enumerate(names):
        own = [row for row in found if row["optimizer"] == name]
        reference = next(iter(own[0]["sooner"]))
        points = [
            {
                **{key: row[key] for key in ("cell", "kind", "steps")},
                "ratio": (row["ratio"], *row["interval"]),
                "sooner": (
                    row["sooner"][reference]["steps"],
                    *row["sooner"][reference]["interval"],
                ),
            }
            for row in own
        ]
        path = directory / ("scorecard.png" if i == 0 else f"scorecard-{i + 1}.png")
        paths.append(report.scorecard(points, path, f"{name} beside tuned {reference}"))
    for steps in sorted({result.steps for result in ordered}):
        panels = {
            result.cell: {name: c.curves.losses for name, c in result.field.items()}
            for result in ordered
            if result.steps == steps
        }
        paths.append(report.figure(panels, directory / f"curves-{steps}.png"))
    return paths
