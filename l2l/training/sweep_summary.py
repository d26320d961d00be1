"""The results of a sweep's runs: tables and one JSON file, with the spread over seeds.

What a run measures depends on what it learns: the loss over tuned Adam's; the query loss of new
problems from a learned start; or the validation loss with learned settings of AdamW.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from l2l.console import errors
from l2l.console.errors import UserError
from l2l.evaluation import report, statistics
from l2l.storage import files

TABLE, CONTENT = "sweep.md", "sweep.json"
QUERY, VALIDATION = "query loss", "validation loss"
LEGEND = """\
*ratio*: of the final training loss to that of tuned Adam, geometric mean over seeds; *points*: mean
± standard deviation. *query loss* (of new problems, from the learned start) and *validation loss*
(with the learned settings): mean over seeds ± standard deviation, then those of the rivals.
"""


def finished(directory: Path) -> bool:
    """Whether a directory holds a run that has ended."""
    from l2l.training import (
        finish,  # It imports JAX, which the caller prepares for first.
    )

    return finish.finished(directory) is not None


class Written(NamedTuple):
    """text: the tables and the paths, for a terminal. damaged: sentences about finished runs whose
    results cannot be read."""

    text: str
    damaged: tuple[str, ...]


def write(root: Path, runs: Sequence, codes: Mapping[Path, int]) -> Written:
    """Writes sweep.md and sweep.json from the results of the runs that have finished.

    Args:
      runs: of `sweep.Run`.
      codes: exit codes of those that were run just now.
    """
    found, damaged = {}, {}
    for run in runs:
        if finished(run.directory):
            try:
                found[run.directory] = _results(run.directory)
            except UserError as error:  # The others have their results all the same.
                damaged[run.directory] = str(error)
    states = []
    for run in runs:
        state = _state(run.directory in found, codes.get(run.directory))
        states.append(
            {
                "setting": run.setting or "–",
                "seed": run.seed,
                "state": "finished, results damaged" if run.directory in damaged else state,
                "directory": str(run.directory),
            }
        )
    groups: dict[tuple, list] = {}
    for run in runs:
        for row in found.get(run.directory, ()):
            place = run.setting or "–", row["measure"], row["task"], row["steps"]
            groups.setdefault(place, []).append((run.seed, row))
    columns = ("setting", "measure", "task", "steps")
    rows = [
        dict(zip(columns, place, strict=True)) | SPREADS[place[1]](own)
        for place, own in groups.items()
    ]
    parts = [
        report.table([_shown(row) for row in rows if row["measure"] == measure])
        for measure in SPREADS
        if any(row["measure"] == measure for row in rows)
    ]
    text = "\n".join([*parts, report.table(states)]) + f"\n{LEGEND}"
    text += "".join(f"{sentence}\n" for sentence in damaged.values())
    files.write(root / TABLE, text.encode())
    report.write_json(root / CONTENT, {"runs": states, "results": rows})
    text = f"{text}\n{root / TABLE}\n{root / CONTENT}"
    return Written(text, tuple(damaged.values()))


def _shown(row: Mapping) -> dict:
    """Of a row what a table has: its measure is the name of a column."""
    hidden = ("each", "measure", *(["task"] if not row["task"] else []))
    return {key: value for key, value in row.items() if key not in hidden}


def _results(directory: Path) -> list[dict]:
    """What a finished run has measured, in rows of one `measure` (of `SPREADS`), `task` and number
    of `steps`; the task is "" where all were measured together."""
    path = directory / "results.json"
    with errors.naming(path):
        text = path.read_bytes() if path.exists() else b""
    try:
        content = json.loads(text)
        if "adaptation" in content:
            return _adapted(content)
        return _searched(content) if "search" in content else _compared(content)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({errors.printable(str(error))[:100]}): remove summary.txt beside "
            "it and start that run again, which rewrites it from the last checkpoint."
        ) from error


def _compared(content: Mapping) -> list[dict]:
    """Of a comparison with tuned Adam, the rows of the learned optimizer over all tasks."""
    name = content["rows"][0]["optimizer"]  # Tuned Adam's come after it.
    return [
        {
            **row,
            "measure": "ratio",
            "task": "",
            "ratio": _number(row["ratio"]),
            "points": _number(row["points"]),
            "diverged": int(row["diverged"]),
        }
        for row in content["summary"]
        if row["steps"] != "all" and row["optimizer"] == name
    ]


def _adapted(content: Mapping) -> list[dict]:
    """Of a learned start, the query loss from it and from the others: means over problems."""
    return [
        {
            "measure": QUERY,
            "task": task,
            "steps": steps,
            **{start: _mean(loss[i] for loss in x["loss"]) for start, x in starts.items()},
        }
        for task, starts in content["adaptation"].items()
        for i, steps in enumerate(starts["learned"]["steps"])
    ]


def _searched(content: Mapping) -> list[dict]:
    """Of learned settings, the validation loss with them and with the best of random search: means
    over new runs."""
    losses = {name: _mean(ended["validation"]) for name, ended in content["each"].items()}
    steps = max(content["config"]["evaluation"]["horizons"])
    return [{"measure": VALIDATION, "task": "", "steps": steps, **losses}]


def _mean(losses: Iterable) -> float:
    return float(np.mean(statistics.or_infinite(list(map(_number, losses)))))


def _ratios(own) -> dict:
    ratios, points = ([row[key] for _, row in own] for key in ("ratio", "points"))
    return {
        "seeds": len(own),
        "ratio": statistics.geometric_mean(ratios),
        "lowest": float(np.min(ratios)),  # NaN if any is, as of losses that are not positive.
        "highest": float(np.max(ratios)),
        "points": float(np.mean(points)),
        "±": _deviation(points),
        "diverged": sum(row["diverged"] for _, row in own),
        "each": _each(own),
    }


def _losses(own) -> dict:
    each = _each(own)
    others = [key for key in each[0] if key not in ("seed", "steps", "learned")]
    losses = [row["learned"] for row in each]
    return {
        "seeds": len(own),
        own[0][1]["measure"]: float(np.mean(losses)),
        "±": _deviation(losses),
        "lowest": float(np.min(losses)),
        "highest": float(np.max(losses)),
        **{name: float(np.mean([row[name] for row in each])) for name in others},
        "each": each,
    }


def _each(own) -> list[dict]:
    kept = [(seed, {k: row[k] for k in row if k not in ("measure", "task")}) for seed, row in own]
    return [{"seed": seed, **row} for seed, row in kept]


def _deviation(values: Sequence[float]) -> float:
    finite = len(values) > 1 and np.isfinite(values).all()
    return float(np.std(values, ddof=1)) if finite else float("nan")


def _number(value) -> float:
    """What `report.plain` wrote: NaN as null, infinities as text."""
    return float("nan" if value is None else value)


def _state(done: bool, code: int | None) -> str:
    if done:
        return "finished"
    return "not finished" if code is None else f"ended with code {code}"


SPREADS = {"ratio": _ratios, QUERY: _losses, VALIDATION: _losses}
