"""Results stored as JSON, and the page of tables and figures made from them alone:

    python -m l2l.evaluate --from=docs/results

reads every `NAME.json` of a directory, each the `results.json` of a measurement, and writes
`tables.md`, and figures `NAME-….png`, beside them.
"""

import contextlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from l2l.console.errors import UserError
from l2l.evaluation import figures, report
from l2l.evaluation.cells import Cell
from l2l.evaluation.comparison import Row, Selected, Trial
from l2l.evaluation.curves import Curves
from l2l.storage import files

PAGE = "tables.md"


def read(path: str | os.PathLike) -> tuple[list[Row], list[Cell], dict]:
    """(rows, cells, everything else) of a `results.json`; the rows' curves lack the loss of each
    batch, which is (). UserError if it is not such a file, or one of another version."""
    path = Path(path)
    with _reading(path):
        content = json.loads(path.read_text())
        rows = [_row(row) for row in content.pop("rows")]
        cells = [_cell(cell) for cell in content.pop("cells")]
        return rows, cells, content


@contextlib.contextmanager
def _reading(path: Path):
    """What is wrong with a results.json, as a UserError."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} is not a results.json that this version of l2l wrote ({error!r}): measure it "
            "again with `python -m l2l.evaluate`."
        ) from None


def page(directory: str | os.PathLike) -> tuple[str, dict[str, list[Row]]]:
    """(the page of tables, the rows by the names of their files) of all results in a directory;
    UserError where there are none."""
    paths = sorted(Path(directory).glob("*.json"))
    if not paths:
        raise UserError(
            f"{directory} holds no .json file: copy a results.json into it, under any name."
        )
    text = (
        "# Measured\n\nMade of the JSON files beside this page alone, by `python -m l2l.evaluate "
        f"--from=` and their directory.\n\n{report.LEGEND}"
    )
    found = {}
    for path in paths:
        rows, cells, about = read(path)
        found[path.stem] = rows
        with _reading(path):
            told, notes = _told(about, rows), about["notes"]
            spaces = report.spaces(about.get("spaces", ()))  # Earlier versions stored none.
        laid = report.lay_out(rows, cells, (), notes, "###")
        drawn = figures.comparisons(Path(), rows, f"{path.stem}-", draw=False)
        images = "".join(f"\n![{figure.stem}]({figure.name})\n" for figure in drawn)
        text += f"\n## {path.stem}\n\n{told}\n{laid.overall}{spaces}{images}{laid.rest}"
    return text, found


def regenerate(directory: str | os.PathLike) -> list[Path]:
    """Writes the page of a directory and its figures into it; their paths."""
    text, found = page(directory)
    paths = [Path(directory) / PAGE]
    files.write(paths[0], text.encode())
    for name, rows in found.items():
        paths += figures.comparisons(Path(directory), rows, f"{name}-")
    return paths


def _told(about: dict, rows: Sequence[Row]) -> str:
    """How it was measured: by a command, or at the end of meta-training."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    seed, problems = about["seed"], max((row.runs for row in rows), default=0)
    if "command" not in about:
        training = about["training"]
        return (
            f"Measured at the end of meta-training: {about['meta_steps']:,} meta-steps on "
            f"{', '.join(training['data'])}, seed {seed}, {training['seconds']:g} seconds; "
            f"{problems} problems a cell; {versions}.\n"
        )
    command = " ".join(["python -m l2l.evaluate", *about["command"][1:]])
    return (
        f"`{command}`\n\n{about['seeds']} problems a cell, seed {seed}; {about['seconds']:g} "
        f"seconds, less what was kept of earlier ones; {versions}.\n"
    )


def _row(stored: dict) -> Row:
    stored = dict(stored)
    given = {
        "curves": _curves(stored.pop("each")),
        "by_validation": _selected(stored.pop("by_validation")),
        "trials": tuple(Trial(**_numbers(trial)) for trial in stored.pop("trials")),
        **{name: stored.pop(name) for name in ("setting", "variant_of", "multiplier")},
        "notes": tuple(stored.pop("notes")),
    }
    return Row(**_numbers(stored), **given)


def _selected(stored: dict | None) -> Selected | None:
    return None if stored is None else Selected(stored["setting"], _curves(stored["each"]))


def _curves(each: dict) -> Curves:
    return Curves(losses=(), **{name: np.asarray(_numbers(x)) for name, x in each.items()})


def _cell(stored: dict) -> Cell:
    stored = dict(stored, horizons=tuple(stored["horizons"]))
    return Cell(**stored)


def _numbers(content) -> Any:
    """What `report.plain` made of numbers: null is NaN, and infinities are text."""
    if isinstance(content, dict):
        return {key: _numbers(value) for key, value in content.items()}
    if isinstance(content, list):
        return tuple(_numbers(value) for value in content)
    if content is None:
        return math.nan
    return float(content) if content in ("inf", "-inf") else content
