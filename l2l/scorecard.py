"""Optimizers beside tuned baselines on tasks, as table, JSON and figure: `python -m l2l.evaluate`.

    python -m l2l.evaluate --optimizer=runs/mlp,"adam(1e-2)" --task=mlp --set hidden=32
        --vary activations=relu,tanh,sigmoid --horizons=500,1000 --seeds=10 --output=scores

Its flags are explained by `--help`. Exit codes: 0 done, 2 an error to mend.
"""

import ast
import inspect
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from l2l import base, evaluate, files, host, report, tuning
from l2l.optimizers import baselines


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
    cells: Sequence[Cell],
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
    training loss; `points` is its mean test accuracy less that of the first baseline chosen by test
    accuracy, in percentage points. A summary has the geometric mean of the former and the mean of
    the latter over tasks.

    Args:
      key: decides the problems.
      horizons: training steps; every run is told its own.
      num_problems: runs of each optimizer on each task at each horizon.
      kinds, eps_roots, cache_dir: of the baselines' grids; see `tuning.tune`.
    """
    rows, curves, notes = [], {}, []
    for cell in cells:

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
    return Score(rows, summarise(rows), curves, notes)


def _row(task, horizon, name, run, reference):
    loss = np.where(np.isfinite(run.train_loss[:, -1]), run.train_loss[:, -1], np.inf)
    accuracy = float(np.mean(run.test_accuracy[:, -1], dtype=float))
    return {
        "task": task,
        "steps": horizon,
        "optimizer": name,
        "train loss": float(loss.mean()),
        "loss ratio": float(loss.mean() / reference[0]),
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
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
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


def read_optimizer(text: str) -> Entry:
    """An entry from a released name, the path of an export or run, or an optax expression."""
    from l2l import checkpoint

    if os.sep in text or Path(text).exists() or text in checkpoint.released():
        optimizer, theta, _ = checkpoint.read(checkpoint.locate(text))
        path = Path(text)
        return Entry(path.name if path.is_dir() else path.stem, optimizer, theta)
    return Entry(text, baselines.parse(text))


def read_cells(section: dict, vary: str | None) -> list[Cell]:
    """A cell for each value of `vary` ("setting=value,value"), or one, of a section `task`."""
    from l2l import build

    sections = {"": section}
    if vary:
        name, values = _assignment(vary)
        values = values if isinstance(values, tuple) else (values,)
        sections = {str(value): {**section, name: value} for value in values}
    families = {name: build.task(_wrapped(s, build.TASKS)) for name, s in sections.items()}
    return [Cell(" ".join((f.name, name)).strip(), f, f.data()) for name, f in families.items()]


def _wrapped(section: dict, tasks: dict) -> dict:
    """A single value typed for a setting that is several by default, as a tuple of one."""
    factory = tasks.get(section.get("name"))
    known = inspect.signature(factory).parameters if factory else {}

    def wrap(key, value):
        several = key in known and isinstance(known[key].default, tuple)
        return (value,) if several and not isinstance(value, tuple | list) else value

    return {key: wrap(key, value) for key, value in section.items()}


def split(text: str) -> list[str]:
    """The parts between commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"{text!r} sets nothing: write it like hidden=64,64.")
    values = [_literal(part) for part in split(value)]
    return name, tuple(values) if len(values) != 1 or value.endswith(",") else values[0]


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def watch(stream=None) -> Callable[[int, int, str], None]:
    """Makes `progress`: a bar on a terminal, elsewhere a dated line at most every 10 seconds."""
    stream = sys.stderr if stream is None else stream
    if stream.isatty():
        import tqdm

        bar = tqdm.tqdm(file=stream, dynamic_ncols=True, unit="step", unit_scale=True)

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


def _define_flags():
    text, several = flags.DEFINE_string, flags.DEFINE_multi_string
    several(
        "optimizer",
        ["adam"],
        "Released names, paths of exports or of runs, or optax expressions like "
        "'sgd(0.1, momentum=0.9)'; comma-separated or repeated.",
    )
    text("task", "mlp", "A name of build.TASKS.")
    several("set", [], "A setting of the task, like hidden=64,64.")
    text("vary", None, "One task for each value, like activations=relu,tanh,sigmoid.")
    config_flags.DEFINE_config_file("config", None, "Take the task of this file of configs/.")
    flags.DEFINE_list("horizons", ["500", "1000"], "Training steps.")
    flags.DEFINE_integer("seeds", 10, "Problems of each task.", lower_bound=1)
    flags.DEFINE_integer("seed", 1_000_003, "Decides the problems.")
    flags.DEFINE_list("baseline", ["adam"], "Grids to tune, of baselines.KINDS; or none.")
    flags.DEFINE_float("eps_root", 1e-8, "Grids are tried with this eps_root, and with 0.")
    text("output", "scores", "The directory to write to; its `cache` keeps the grids.")


def _sections(values) -> list[dict]:
    if values.config is not None and not values["task"].present:
        found = values.config.to_dict().get("task", {"name": "mlp"})
        sections = [found] if isinstance(found, dict) else list(found)
        # What belongs to the mixture is not the task's.
        sections = [{k: v for k, v in s.items() if k not in _MIXTURE} for s in sections]
    else:
        sections = [{"name": values.task}]
    own = dict(map(_assignment, values.set))
    return [{**section, **own} for section in sections]


_MIXTURE = ("weight", "augmentations")


def main(argv) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    values = flags.FLAGS
    try:
        entries = [read_optimizer(part) for text in values.optimizer for part in split(text)]
        cells = [c for section in _sections(values) for c in read_cells(section, values.vary)]
        kinds = [kind for kind in values.baseline if kind not in ("", "none")]
        if not all(x.strip().isdecimal() for x in values.horizons):
            raise ValueError(f"--horizons={','.join(values.horizons)} are no steps: try 500,1000.")
        horizons = [int(x) for x in values.horizons]
        output = files.local(values.output, "--output")
        began = time.monotonic()
        result = score(
            *(jax.random.key(values.seed), entries, cells, horizons, values.seeds),
            kinds=kinds,
            eps_roots=(0.0, values.eps_root),
            cache_dir=output / "cache",
            progress=watch(),
        )
        about = dict(
            command=sys.argv,
            seeds=values.seeds,
            seed=values.seed,
            seconds=round(time.monotonic() - began, 1),
            versions={"jax": jax.__version__},
        )
        print(write(output, result, about))
    except (ValueError, OSError) as error:
        print(f"l2l: {files.sentence(error)}", file=sys.stderr)
        return 2
    return 0


def run() -> None:
    """The command: one device a core on a CPU, then `main`."""
    host.prepare()  # JAX is imported already, but reads this at its first use.
    _define_flags()
    app.run(main)
