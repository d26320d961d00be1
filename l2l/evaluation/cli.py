"""The command `python -m l2l.evaluate`: from what is typed to what is scored.

    python -m l2l.evaluate --optimizer=runs/mlp,"adam(1e-2)" --task=mlp --set hidden=32
        --vary activations=relu,tanh,sigmoid --horizons=500,1000 --seeds=10 --output=scores
    python -m l2l.evaluate --optimizer=mlp --suite=scorecard --budget=2h
    python -m l2l.evaluate --from=docs/results

Its flags are explained by `--help`. Exit codes: 0 done, 2 an error to mend, 130 interrupted: the
same command goes on from there.
"""

import ast
import functools
import inspect
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags

from l2l.cluster import environment
from l2l.console import configuration, schema
from l2l.console.commands import command
from l2l.console.configuration import split
from l2l.console.errors import UserError
from l2l.console.progress import Bar
from l2l.evaluation import baselines, comparison, entries, report, stored, suites
from l2l.evaluation import budget as budgets
from l2l.evaluation.cells import Cell, estimate, plan
from l2l.evaluation.comparison import Entry
from l2l.evaluation.curves import Problems
from l2l.evaluation.suites import Suite
from l2l.evaluation.tuning import Grid
from l2l.storage import files
from l2l.tasks import registry


def read_cells(sections: Sequence[dict], vary: str | None) -> list[Cell]:
    """A cell for each section `task`, or one for each value of `vary` ("setting=value,value") in
    each of them, by names that differ."""
    changes: list[dict] = [{}]
    if vary:
        setting, given = _assignment(vary)
        given = given if isinstance(given, tuple) else (given,)
        if not given:
            raise UserError(f"--vary={vary} has no value: write it like {setting}=64,128.")
        changes = [{setting: value} for value in given]
    wanted = [_wrapped({**s, **change}, registry.TASKS) for s in sections for change in changes]
    return [Cell(name, family) for name, family in registry.distinct(wanted)]


def _wrapped(section: dict, tasks: dict) -> dict:
    """A single value typed for a setting that is several by default, as a tuple of one."""
    factory = tasks.get(section.get("name"))
    known = inspect.signature(factory).parameters if factory else {}

    def wrap(key, value):
        several = key in known and isinstance(known[key].default, tuple)
        return (value,) if several and not isinstance(value, tuple | list) else value

    return {key: wrap(key, value) for key, value in section.items()}


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UserError(f"{text!r} sets nothing: write it like hidden=64,64.")
    values = [_literal(part) for part in split(value)]
    return name, tuple(values) if len(values) != 1 or value.endswith(",") else values[0]


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _flags() -> flags.FlagValues:
    values = flags.FlagValues()
    text, several, whole, listed = (
        functools.partial(define, flag_values=values)
        for define in (
            *(flags.DEFINE_string, flags.DEFINE_multi_string),
            *(flags.DEFINE_integer, flags.DEFINE_list),
        )
    )
    several(
        "optimizer",
        ["adam"],
        "Released names, paths of exports or of runs, optax expressions like "
        "'sgd(0.1, momentum=0.9)', or package.module:function, which is called with num_steps= if "
        "it takes it; comma-separated or repeated.",
    )
    text("suite", None, f"Score on the cells of a suite: {', '.join(suites.SUITES)}.")
    listed("cells", None, "Only these cells of the suite, by their names.")
    text(
        "budget",
        None,
        "Measure as many cells of the suite as fit into a time like 2h, 20m or 90s, some of every "
        "kind, and say what is left out.",
    )
    text(
        "from",
        None,
        "Measure nothing; make tables and figures, in this directory, from its .json files.",
    )
    text("task", "mlp", f"One of {', '.join(registry.TASKS)}, or path/to/file.py:function.")
    several("set", [], "A setting of the task, like hidden=64,64.")
    text("vary", None, "One task for each value, like activations=relu,tanh,sigmoid.")
    listed("horizons", None, "Training steps; by default 500,1000 or the suite's.")
    whole("seeds", None, "Problems of each task; by default 10 or the suite's.", lower_bound=1)
    about = "Decides the problems."
    whole("seed", 1_000_003, about, lower_bound=0, upper_bound=schema.SEEDS - 1)
    about = f"Rivals to tune: {', '.join(baselines.KINDS)}; or none. A suite has its own."
    listed("baseline", ["adam"], about)
    about = "All that is tried of Adam, AdamW, NAdamW and RMSprop is tried with this eps_root too."
    flags.DEFINE_float("eps_root", 0.0, about, lower_bound=0.0, flag_values=values)
    about = "Measure learned optimizers untrained too, at their nominal and their best single rate."
    flags.DEFINE_bool("untrained", True, about, flag_values=values)
    listed(
        "told",
        None,
        f"What a learned optimizer is told of a run's length: {', '.join(entries.TOLD)}; by "
        "default what is right, or as the suite has it.",
    )
    text(
        "output",
        "scores",
        "The directory to write to; its `cache` keeps what was measured. Results of another "
        "command that are there stay until this one is done.",
    )
    return values


# What a suite decides for itself.
_OWN = ("task", "set", "vary", "eps_root")


def _sections(values, config, known) -> list[dict]:
    if config is not None and not values["task"].present:
        plain: Any = schema.plain(config)
        found = {**(known((), {}) or {}), **plain}["task"]
        sections = [found] if isinstance(found, dict) else list(found)
        sections = list(map(registry.alone, sections))
    else:
        sections = [{"name": values.task}]
    own = dict(map(_assignment, values.set))
    return [{**section, **own} for section in sections]


@command
def main(argv, known: configuration.Known) -> int:
    """known: what may stand in which section of a configuration."""
    typed = configuration.parse(argv, _flags(), lambda: known, __doc__)
    values = typed.values
    if (directory := values["from"].value) is not None:
        return _regenerate(values, directory)
    environment.prepare()  # JAX is imported already, but reads this at its first use.
    typed_entries = entries.read_all([x for text in values.optimizer for x in split(text)])
    if values.suite is None:
        sections = _sections(values, typed.config, known)
        cells = read_cells(sections, values.vary)
        if given := [f"--{name}" for name in ("cells", "budget") if values[name].present]:
            raise UserError(
                f"{' and '.join(given)} choose among the cells of a suite: add --suite."
            )
        chosen, notes = Suite(tuple(cells), (500, 1000), 10, _grids(values)), []
    else:
        chosen, notes = _suite(values, typed.config)
    chosen = chosen._replace(
        horizons=_horizons(values, chosen.horizons), seeds=values.seeds or chosen.seeds
    )
    budget = None if values.budget is None else budgets.read(values.budget)
    # Before hours of work that it could not keep.
    output = files.folder(values.output, "--output")
    field = _field(values, typed_entries, chosen)
    parts, left = _plan(chosen, len(field), budget, output)
    notes = [*notes, *left]
    for note in notes:
        print(note, file=sys.stderr)
    command = ["l2l.evaluate", *argv[1:]]
    return _measure(values, field, chosen, parts, notes, output, budget, command)


def _field(values, typed: list[Entry], chosen: Suite) -> list[Entry]:
    """What was typed, each followed by what it is measured beside."""
    told = chosen.told
    if values.told is not None:
        if unknown := [name for name in values.told if name not in entries.TOLD]:
            raise UserError(
                f"--told={','.join(unknown)} is unknown: choose from {', '.join(entries.TOLD)}."
            )
        told = tuple(entries.TOLD[name] for name in values.told)
    rates = entries.MULTIPLIERS if values.untrained else ()
    field = [x for entry in typed for x in (entry, *entries.variants(entry, told, rates))]
    for entry in field:
        for horizon in {h for cell in chosen.cells for h in cell.steps(chosen.horizons)}:
            entry.at(horizon)  # A function of the user's is called now, not in an hour.
    return field


def _regenerate(values, directory) -> int:
    given = [f"--{name}" for name in values if values[name].present and name != "from"]
    if given:
        raise UserError(f"--from measures nothing: leave out {', '.join(given)}.")
    print("\n".join(map(str, stored.regenerate(directory))))
    return 0


def _grids(values) -> tuple[Grid, ...]:
    return tuple(Grid(kind, eps_roots=(0.0, values.eps_root)) for kind in _kinds(values))


def _kinds(values) -> list[str]:
    return [kind for kind in dict.fromkeys(values.baseline) if kind not in ("", "none")]


def _suite(values, config) -> tuple[Suite, list[str]]:
    """The suite that was named, of cells whose data are here, and sentences about the others."""
    given = [f"--{name}" for name in _OWN if values[name].present]
    if given := [*given, *(["--config"] if config is not None else [])]:
        raise UserError(
            f"--suite={values.suite} decides its own tasks: leave out {', '.join(given)}."
        )
    chosen = suites.find(values.suite)
    if values["baseline"].present:
        chosen = chosen._replace(grids=suites.rivals(chosen.grids, _kinds(values)))
    if values.cells is not None:
        if not values.cells:
            names = ", ".join(cell.name for cell in chosen.cells)
            raise UserError(f"--cells= names no cell: choose from {names}.")
        chosen = chosen._replace(cells=suites.select(chosen.cells, values.cells))
    cells, notes = suites.available(chosen.cells)
    if not cells:
        raise UserError(f"None of these cells can be measured here. {' '.join(notes)}")
    if values.horizons is not None:  # What is typed comes before a cell's own.
        cells = tuple(cell._replace(horizons=()) for cell in cells)
    return chosen._replace(cells=cells), notes


def _plan(chosen: Suite, count: int, budget: float | None, output):
    """(the parts to be measured, in order; sentences about what a budget leaves out). Says what
    they cost."""
    parts = plan(chosen.cells, chosen.horizons)
    costs = [estimate(p, chosen.grids, chosen.seeds, count) for p in parts]
    left = []
    if budget is not None:
        cores = min(len(jax.local_devices()), chosen.seeds)
        dear = min(costs, default=0.0) / cores
        parts, costs, rest = budgets.fit(parts, costs, budget * cores)
        if not parts:
            raise UserError(
                f"A budget of {budgets.duration(budget)} leaves nothing to measure: the cheapest "
                f"cell takes about {budgets.duration(dear)}. Allow more, or fewer --horizons or "
                "--seeds."
            )
        steps = sorted({h for part in rest for h in part.horizons})
        for h in steps:
            names = ", ".join(part.cell.name for part in rest if h in part.horizons)
            left.append(f"Left out at {h:,} steps by the budget: {names}.")
    runs = sum(len(part.horizons) for part in parts)
    if budget is not None or any(cell.kind for cell in chosen.cells):
        print(
            f"{len({part.cell.name for part in parts})} cells, {runs} horizons in all, "
            f"{chosen.seeds} {'problems' if chosen.seeds > 1 else 'problem'} each: some "
            f"{budgets.duration(sum(costs))} of CPU time on one core, less what "
            f"{output / 'cache'} holds.",
            file=sys.stderr,
        )
    return parts, left


# Eight: what is measured, how long, by which command, and where it goes.
def _measure(values, field, chosen: Suite, parts, notes, output, budget, command) -> int:
    """Measures, and writes what there is after every cell: a run that is killed leaves tables. What
    is not done yet never replaces more than it has."""
    began, rows, bar, done, code = time.monotonic(), [], Bar(1.0), False, 0
    standing = _standing(output, command)
    if math.isinf(standing):
        print(
            f"{output} holds the results of another command, which stay until this one is done.",
            file=sys.stderr,
        )

    def write(draw):
        where = (rows, chosen.cells, chosen.horizons)
        if not done and len(rows) < max(standing, 1):
            return report.lay_out(*where, notes).short
        about = _about(values, chosen.seeds, began, command)
        return report.write(output, *where, notes=notes, grids=chosen.grids, about=about, draw=draw)

    measured = comparison.measure(
        *(field, chosen.cells, chosen.horizons),
        Problems(jax.random.key(values.seed), chosen.seeds),
        grids=chosen.grids,
        timed=True,
        cache_dir=output / "cache",
        parts=parts,
        progress=bar.show,
    )
    count = len(field) + len(chosen.grids)
    whole = count * sum(len(part.horizons) for part in parts)
    try:
        for row in measured:
            rows.append(row)
            if len(rows) % count == 0:
                write(draw=False)
                late = budget is not None and time.monotonic() - began > budget
                if late and len(rows) < whole:
                    notes = [*notes, "The budget was spent before all that it planned was done."]
                    break
        done = True
        bar.close()
        shown = write(draw=True)
    except KeyboardInterrupt:
        bar.close()
        code = 130
        kept = not done and len(rows) < standing
        more = f" {output} keeps the results that it had." if kept else ""
        print(f"l2l: interrupted; the same command goes on from here.{more}", file=sys.stderr)
        shown = write(draw=True)
    print(shown)
    return code


def _standing(output, command: Sequence[str]) -> float:
    """How many rows a command has written to a directory; infinitely many, if what is there is
    another's."""
    try:
        content = json.loads((output / "results.json").read_text())
        return len(content["rows"]) if content["command"] == command else math.inf
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, TypeError, KeyError):
        return math.inf


def _horizons(values, default) -> tuple[int, ...]:
    if values.horizons is None:
        return default
    if not values.horizons or not all(x.strip().isdecimal() and int(x) for x in values.horizons):
        raise UserError(
            f"--horizons={','.join(values.horizons)} are not numbers of steps: try 500,1000."
        )
    return tuple(int(x) for x in values.horizons)


def _about(values, seeds: int, began: float, command: Sequence[str]) -> dict:
    return dict(
        command=command,
        seeds=seeds,
        seed=values.seed,
        seconds=round(time.monotonic() - began, 1),
        versions={"jax": jax.__version__},
    )
