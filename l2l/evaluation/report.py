"""Tables and JSON of what was measured, and what every column means (`LEGEND`)."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from l2l.evaluation import aggregate, figures, statistics, trials, untrained
from l2l.storage import files

if TYPE_CHECKING:  # Tables need no JAX.
    from l2l.evaluation.cells import Cell
    from l2l.evaluation.comparison import Row
    from l2l.evaluation.curves import Curves
    from l2l.evaluation.tuning import Grid

LEGEND = """\
Every optimizer was told the horizon and met the same problems. The problems of a cell differ in
their initial values and batches, and in whatever else its task draws at random. A tuned baseline is
the best trial in its space by mean final training loss. It is chosen anew for each cell and
horizon, on the very problems it is compared on. A space has log-spaced rates, and with each of them
some of the combinations of schedule (constant; cosine to 0; cosine after a warm-up over the first
twentieth of the run; for Schedule-Free constant, with and without the warm-up), weight decay and
eps_root. All combinations are used as evenly as they divide. In a suite all baselines have the same
number of trials; outside the suites, further rates are tried where the best one was at the edge.
Schedule-Free is measured at its averaged parameters, except in training curves.

*untrained* is a learned optimizer with fresh weights, such as meta-training begins with; its runs
begin where the task says. *best rate* is the same at one multiple of its rate: the one that gives
the best validation losses over all cells.
*told nothing* and *told third* are the optimizer itself, given no length of the run or a third of
the true one.

- *train*, *test*: loss over the whole training or test split after the last step, mean over
  problems; infinite if any of them is not finite.
- *ratio*: *train* divided by that of the first tuned baseline, geometric mean over problems, with
  its 95 % interval (Student's t, on the logarithms). Losses below 1e-8 count as 1e-8. There is no
  interval if a loss is infinite, and no ratio if losses are negative or all infinite.
- *test ratio*: *test* divided by that of the trial of the first baseline with the best mean test
  loss.
- *accuracy*: on the test split, mean over problems. *points*: the difference, in percentage points,
  from the accuracy of the trial of the first baseline that is best by accuracy.
- *area*: under the training curve, given as the mean batch loss over all steps and problems.
- *diverged*: how many of all runs had a batch loss or final training loss that is not finite, or
  ended with a training loss that exceeds the initial one by more than its size.
- *steps/…*: how many times fewer steps the optimizer needs than the first tuned baseline, whose
  name follows the slash (results.json has the other baselines too). Training losses are smoothed:
  each is the mean batch loss over the last twentieth of the horizon. The target is the final loss
  of whichever of the two ends higher. The factor is the horizon divided by the first step at which
  the other reaches the target, and is inverted if the other is the baseline. It lies between
  1/horizon and horizon, and is 1 for a baseline against itself; geometric mean over problems.
- *time/…*: the same in time, which is *steps/…* times the baseline's seconds for a training step
  divided by this optimizer's (*µs*). Both are measured in turns in one run, in the first steps of
  a run and in later ones, and weighed by how many of either the horizon has.
- *validation*: loss over the validation split (over 1,024 evenly spaced examples if it has more)
  after the last step, mean over problems. For a tuned baseline it is that of the trial with the
  lowest validation loss, which need not be the trial behind *train*. *validation ratio*: that
  divided by the first tuned baseline's, whose final validation loss is the validation target.
- *to target*: how many times fewer steps than the first tuned baseline are needed to reach the
  validation target. Losses are checked after every twentieth of the horizon, as means over
  problems. If an optimizer never reaches the target, the steps are compared at the best loss that
  it does reach; if its loss is never finite, it counts as having needed all its steps for the
  baseline's first measurement. *target in time*: the same in seconds.

*Trials to match* asks how many random trials a baseline needs to match a single run of the
optimizer. *best of n* is the expected best of n trials (over all subsets of those made, for each
cell and horizon; a trial counts with at most the loss at the start) divided by the loss of that
run, geometric mean over cells and horizons. *matched by 1* and *never matched* are the shares of
cells and horizons in which one trial is enough, and in which all of them are not. *trials to match*
is the median of the smallest sufficient number. One row chooses and judges by training loss, the
other by validation loss.

In the summary, *steps/…* and *time/…* are medians over cells, *ratio* is a geometric mean over
cells, *train no worse* is the share of cells with a ratio of at most 1, *test within 2 %* the share
with a test ratio of at most 1.02, and *points* the mean over cells.

The table over cells compares everything with the first tuned baseline. *to target*, *target in
time*, *validation ratio* and *ratio* (of training losses) are interquartile means of the
logarithms, which leave out a quarter of the cells at either end. Brackets hold their 95 % intervals
(percentile bootstrap over cells; the horizons of a cell count as one number, their mean; ratios are
limited to between 1e-8 and 1e8). *judged* is *ratio*, replaced by *validation ratio* where either
training loss ends below 1e-4, which is as good as zero. *reached* is the share of cells and
horizons in which the target was reached. *trained on* are the families that the released optimizers
were trained on; *unseen* are the others.

The performance profile (Dolan and Moré, 2002) is the share of cells and horizons in which an
optimizer reached the validation target within a given multiple of the steps, or of the seconds, of
the fastest optimizer in these tables.
"""


def table(rows: Sequence[Mapping]) -> str:
    """Rows as a Markdown table, columns as first met; floats to three digits, None and NaN as –."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [
        all(isinstance(row.get(c), int | float | None) for row in rows) and len(rows) > 0
        for c in columns
    ]

    def line(texts):
        pairs = zip(texts, widths, numeric, strict=True)
        return "| " + " | ".join(t.rjust(w) if n else t.ljust(w) for t, w, n in pairs) + " |"

    rule = ["-" * (w - 1) + ":" if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    return "\n".join([line(columns), line(rule), *map(line, cells)]) + "\n"


def write(
    directory: str | os.PathLike,
    rows: Sequence["Row"],
    cells: Sequence["Cell"],
    horizons: Sequence[int],
    *,
    notes: Sequence[str] = (),
    grids: Sequence["Grid"] = (),
    about: Mapping = MappingProxyType({}),
    draw: bool = True,
) -> str:
    """Writes table.md and results.json; and if `draw`, curves-….png, one for each horizon, and for
    several cells scorecard.png, in place of such figures that are there. Returns what is shown on a
    terminal: the summary for several cells, the rows for one, and the paths.

    Args:
      rows: what was measured; whatever of `cells` × `horizons` is not there is listed as missing.
      notes: further sentences for the reader.
      grids: the spaces of the tuned baselines, to be described.
      about: anything else that results.json should contain, as plain data.
    """
    directory = files.folder(directory, "--output")
    page, told = lay_out(rows, cells, horizons, notes), [grid.told() for grid in grids]
    paths = [directory / "table.md"]
    text = f"# Scorecard\n\n{page.overall}\n{LEGEND}{spaces(told)}{page.rest}"
    files.write(paths[0], text.encode())
    stored = [_stored(row) for row in page.rows]
    content = dict(about, summary=statistics.summarise(page.rows), rows=stored, notes=page.notes)
    content["spaces"] = told
    content["cells"] = [_described(cell, horizons) for cell in cells]
    paths.append(write_json(directory / "results.json", content))
    if draw and rows:
        figures.clear(directory)  # Those of an earlier comparison would stand beside this one.
        paths += figures.all_of(directory, page.rows)
    return f"{page.short}\n" + "\n".join(map(str, paths))


def spaces(told: Sequence[str]) -> str:
    """The spaces of the tuned baselines as a list; nothing of none."""
    return "\nThe spaces:\n\n" + "".join(f"- {one}\n" for one in told) if told else ""


class Page(NamedTuple):
    """Rows in the order of the tables, those of all rates that were tried, and the tables.

    overall: the summaries over cells. rest: a table a horizon, and the notes. short: what a
    terminal is shown. notes: the sentences for the reader.
    """

    rows: list["Row"]
    overall: str
    rest: str
    short: str
    notes: list[str]


def lay_out(
    rows: Sequence["Row"],
    cells: Sequence["Cell"],
    horizons: Sequence[int],
    notes: Sequence[str] = (),
    level: str = "##",
) -> Page:
    """The tables of some rows, under headings of a level; for the rest see `write`."""
    order = [cell.name for cell in cells]
    whole_rows = sorted(rows, key=lambda row: (row.steps, order.index(row.cell)))
    rows, rates = untrained.with_best_rates(whole_rows)
    lacking = missing(rows, cells, horizons)
    notes = [*lacking, *notes, *rates, *statistics.without_ratio(rows)]
    notes += [f"{row.cell}: {note}" for row in rows for note in row.notes]
    notes = list(dict.fromkeys(notes))  # Notes that were stored hold all of these already.
    scores = aggregate.score(rows)
    tables = {steps: _at(steps, rows, scores, wanted) for steps, wanted in _wanted(cells, horizons)}
    whole = "".join(f"\n{level} {steps:,} steps\n\n{text}" for steps, text in tables.items())
    summary = table([_joined(row) for row in statistics.summarise(rows)]) if rows else ""
    over = over_cells(scores, level) if len(cells) > 1 else ""
    over += to_match(trials.matches(rows), level)
    said = "".join(f"\n{note}\n" for note in (notes if len(cells) == 1 else lacking))
    told = f"\n{level} Notes\n\n" + "".join(f"- {note}\n" for note in notes) if notes else ""
    short = summary + over if len(cells) > 1 else whole
    return Page(whole_rows, summary + over, whole + told, short + said, notes)


def over_cells(scores: Sequence[aggregate.Score], level: str = "##") -> str:
    """Interquartile means and performance profiles as tables; nothing of no scores."""
    if not scores:
        return ""
    shown = []
    for row in aggregate.overall(scores):
        one = {"optimizer": row["optimizer"], "cells": f"{row['cells']}, {row['n']}"}
        for name, measure in _MEASURES.items():
            one[name] = _interval(*row[measure])
        shown.append(one | {"reached": row["reached"]})
    text = f"\n{level} Over cells\n\n{table(shown)}"
    timed = not all(math.isnan(score.time) for score in scores)
    for of, title in (("cost", "Steps"), ("time", "Seconds"))[: 1 + timed]:
        shares = aggregate.profile(scores, of)
        headed = [
            {"optimizer": name, **dict(zip(_FACTORS, own, strict=True))}
            for name, own in shares.items()
        ]
        text += f"\n{level} {title} to the validation target, of the fewest\n\n{table(headed)}"
    return text


def to_match(found: Sequence[trials.Match], level: str = "##") -> str:
    """How many trials of each baseline match an optimizer's one run, as a table."""
    return f"\n{level} Trials to match\n\n{table(trials.summary(found))}" if found else ""


_MEASURES = {
    "to target": "sooner",
    "target in time": "quicker",
    "validation ratio": "validation",
    "ratio": "train",
    "judged": "judged",
}
_FACTORS = [
    "reached" if math.isinf(factor) else f"within {factor:g} ×" for factor in aggregate.FACTORS
]


def _interval(middle: float, low: float, high: float) -> str:
    return _text(middle) + ("" if math.isnan(low) else f" ({low:.2g} … {high:.2g})")


def missing(rows: Sequence["Row"], cells: Sequence["Cell"], horizons: Sequence[int]) -> list[str]:
    """A sentence a horizon for the cells that should have been measured and were not."""
    have = {(row.cell, row.steps) for row in rows}
    sentences = []
    for steps, wanted in _wanted(cells, horizons):
        if lacking := [cell.name for cell in wanted if (cell.name, steps) not in have]:
            sentences.append(f"Not yet measured at {steps:,} steps: {', '.join(lacking)}.")
    return sentences


def _wanted(cells: Sequence["Cell"], horizons: Sequence[int]) -> list[tuple[int, list["Cell"]]]:
    """The cells that are to be measured at each horizon, in its order."""
    found: dict[int, list[Cell]] = {}
    for cell in cells:
        for steps in cell.steps(horizons):
            found.setdefault(steps, []).append(cell)
    return sorted(found.items())


def _at(
    steps: int,
    rows: Sequence["Row"],
    scores: Sequence[aggregate.Score],
    cells: Sequence["Cell"],
) -> str:
    """The table of one horizon, without the columns that say nothing in any row."""
    scored = {(one.cell, one.horizon, one.optimizer): one for one in scores}
    here = [
        _shown(row, scored.get((row.cell, steps, row.optimizer)))
        for row in rows
        if row.steps == steps
    ]
    done = {row["cell"] for row in here}
    here += [
        {"cell": cell.name, "kind": cell.kind or None, "optimizer": "not yet measured"}
        for cell in cells
        if cell.name not in done
    ]
    empty = {c for row in here for c in row} - {
        c for row in here for c, value in row.items() if _text(value) != "–"
    }
    return table([{c: v for c, v in row.items() if c not in empty} for row in here])


def _shown(row: "Row", score: aggregate.Score | None) -> dict:
    """A row as the table has it."""
    low, high = row.interval
    shown = {
        "cell": row.cell,
        "kind": row.kind or None,
        "optimizer": row.optimizer,
        "train": row.train,
        "ratio": row.ratio,
        "95 %": None if math.isnan(low) else f"{low:.2g} … {high:.2g}",
        "test": row.test,
        "test ratio": row.test_ratio,
        "accuracy": row.accuracy,
        "points": row.points,
        "area": row.area,
        "diverged": f"{row.diverged}/{row.runs}",
    }
    for measure in ("steps", "time"):
        for kind, sooner in list(row.sooner.items())[:1]:
            shown[f"{measure}/{kind}"] = sooner[measure]
    if score is not None:
        shown["validation"] = float(aggregate.validation_of(row)[-1])
        shown["validation ratio"] = score.validation
        shown |= {"to target": score.sooner, "target in time": score.quicker}
    return shown | {"µs": 1e6 * row.seconds}


def _joined(row: Mapping) -> dict:
    """A row of the summary as the table has it."""
    ratios = [key for key in row if key.startswith(("steps/", "time/"))]
    kept = {key.split("/")[1] for key in ratios[:1]}  # The first baseline's.
    hidden = {"diverged", "runs", *(key for key in ratios if key.split("/")[1] not in kept)}
    shown = {key: value for key, value in row.items() if key not in hidden}
    return shown | {"diverged": f"{row['diverged']}/{row['runs']}"}


def _stored(row: "Row") -> dict:
    """A row as results.json has it: of each problem its numbers, but not the loss of each batch."""
    stored = row._asdict() | {"each": _each(row.curves)}
    del stored["curves"]
    if (selected := row.by_validation) is not None:
        each = _each(selected.curves)
        stored["by_validation"] = {"setting": selected.setting, "each": each}
    return stored


def _each(runs: "Curves") -> dict:
    return {name: x for name, x in runs._asdict().items() if name != "losses"}


def _described(cell: "Cell", horizons: Sequence[int]) -> dict:
    """A cell as results.json has it: of a family its name alone."""
    task = getattr(cell.task, "name", cell.task)
    described = {"name": cell.name, "kind": cell.kind, "task": task, "rows": cell.rows}
    return described | {"scored": cell.scored, "horizons": cell.steps(horizons)}


def write_json(path: str | os.PathLike, content) -> Path:
    """Writes plain data and NumPy arrays as JSON; what is not finite becomes null or "inf"."""
    files.write(path, json.dumps(plain(content), indent=1, allow_nan=False).encode() + b"\n")
    return Path(path)


def plain(content):
    """NamedTuples and mappings as dicts, sequences and arrays as lists, NaN as None, ±∞ as text."""
    if hasattr(content, "_asdict"):
        content = content._asdict()
    if isinstance(content, Mapping):
        return {str(key): plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [plain(x) for x in content]
    if hasattr(content, "tolist"):  # NumPy's and JAX's arrays and scalars.
        array = np.asarray(content)
        # As many digits as tell a number of this type from its neighbours, half of a double's.
        return plain(
            (array.astype(str).astype(float) if array.dtype == np.float32 else array).tolist()
        )
    if isinstance(content, float) and not math.isfinite(content):
        return None if math.isnan(content) else str(content)
    return content


def _text(value) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)
