"""The results of a sweep's runs: one table and one JSON file, with the spread over seeds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from l2l.console import errors
from l2l.console.errors import UserError
from l2l.evaluation import report, statistics
from l2l.storage import files

TABLE, CONTENT = "sweep.md", "sweep.json"


def finished(directory: Path) -> bool:
    """Whether a directory holds a run that has ended."""
    from l2l.training import (
        finish,  # It imports JAX, which the caller prepares for first.
    )

    return finish.finished(directory) is not None


def write(root: Path, runs: Sequence, codes: Mapping[Path, int]) -> str:
    """Writes sweep.md and sweep.json from the results of the runs that have finished; returns the
    tables and the paths, as text.

    Args:
      runs: of `sweep.Run`.
      codes: exit codes of those that were run just now.
    """
    found = {run.directory: _results(run.directory) for run in runs if finished(run.directory)}
    states = [
        {
            "setting": run.setting or "–",
            "seed": run.seed,
            "state": _state(run.directory in found, codes.get(run.directory)),
            "directory": str(run.directory),
        }
        for run in runs
    ]
    rows = []
    for setting in dict.fromkeys(run.setting for run in runs):
        mine = [run for run in runs if run.setting == setting and run.directory in found]
        steps = {row["steps"] for run in mine for row in found[run.directory]}
        for horizon in sorted(steps):
            own = [
                (run, row)
                for run in mine
                for row in found[run.directory]
                if row["steps"] == horizon
            ]
            rows.append({"setting": setting or "–", "steps": horizon, **_spread(own)})
    table = [{key: value for key, value in row.items() if key != "each"} for row in rows]
    text = report.table(table) + "\n" if rows else ""
    text += report.table(states)
    text += "\nratio: geometric mean over seeds; points: mean ± standard deviation.\n"
    files.write(root / TABLE, text.encode())
    report.write_json(root / CONTENT, {"runs": states, "results": rows})
    return f"{text}\n{root / TABLE}\n{root / CONTENT}"


def _results(directory: Path) -> list[dict]:
    """The rows of the learned optimizer, one a horizon; of a run with several tasks, over all."""
    path = directory / "results.json"
    with errors.naming(path):
        text = path.read_bytes() if path.exists() else b""
    try:
        content = json.loads(text)
        name = content["rows"][0]["optimizer"]  # Tuned Adam's come after it.
        summary = (row for row in content["summary"] if row["steps"] != "all")
        return [row for row in summary if row["optimizer"] == name]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({errors.printable(str(error))[:100]}): remove summary.txt beside "
            "it and start that run again, which rewrites it from the last checkpoint."
        ) from error


def _spread(own) -> dict:
    ratios = [_number(row["ratio"]) for _, row in own]
    points = [_number(row["points"]) for _, row in own]
    return {
        "seeds": len(own),
        "ratio": statistics.geometric_mean(ratios),
        "lowest": float(np.min(ratios)),  # NaN if any is, as of losses that are not positive.
        "highest": float(np.max(ratios)),
        "points": float(np.mean(points)),
        "±": float(np.std(points, ddof=1)) if len(points) > 1 else float("nan"),
        "diverged": sum(row["diverged"] for _, row in own),
        "each": [{"seed": run.seed, **row} for run, row in own],
    }


def _number(value) -> float:
    """What `report.plain` wrote: NaN as null, infinities as text."""
    return float("nan" if value is None else value)


def _state(done: bool, code: int | None) -> str:
    if done:
        return "finished"
    return "not finished" if code is None else f"ended with code {code}"
