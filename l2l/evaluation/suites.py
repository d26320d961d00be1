"""Suites: the cells that optimizers are scored on, and the order in which they are measured.

    python -m l2l.evaluate --optimizer=mlp --suite=quick
    python -m l2l.evaluate --optimizer=mlp --suite=scorecard --horizons=200,1000

A cell is one task; its problems differ in their initial values and batches alone. Optimizers and
baselines meet the same problems. What comes of it is `scoring.py`'s to say.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from l2l.core import base
from l2l.data import datasets
from l2l.evaluation import baselines, cache, tuning
from l2l.evaluation import curves as evaluate
from l2l.evaluation import timing as speed
from l2l.evaluation.comparison import Entry
from l2l.tasks import registry

KINDS = (
    "trained-on family",
    "wider",
    "deeper",
    "activation",
    "architecture",
    "data",
)


class Item(NamedTuple):
    """A cell of the table.

    kind:    in what it differs from the training of the released optimizers, of `KINDS`.
    task:    its section, as in a configuration; augmentations and subsets there are none.
    cost:    CPU microseconds a training step of one problem in a sweep of Adam's rates, measured
             on one core of an EPYC: for the estimate, and for what comes first.
    whole:   likewise, CPU milliseconds a run for its measurements over whole splits.
    rows:    so many of each split are used; None for all.
    instead: the cell that is measured where this one's data are absent; None for none.
    """

    kind: str
    task: Mapping[str, Any]
    cost: float
    whole: float
    rows: int | None = None
    instead: str | None = None


class Suite(NamedTuple):
    """cells: names of `CELLS`. seeds: problems a cell. grids: {baseline: eps_roots tried}, the
    first of which is what ratios are taken to."""

    cells: tuple[str, ...]
    horizons: tuple[int, ...]
    seeds: int
    grids: Mapping[str, tuple[float, ...]]


def _task(name, **settings):
    return dict(name=name, initial_scale=(1.0, 1.0), subset=(1.0, 1.0), **settings)


def _mlp(activation="relu", dataset="digits", hidden=(32,), **settings):
    return _task("mlp", dataset=dataset, hidden=hidden, activations=(activation,), **settings)


# One activation, all of the training split, initial weights of LeCun's deviation. "mlp" and "mnist"
# are the public yardsticks: 64-32-10 ReLU, and 784-20-10 sigmoid (Andrychowicz et al., 2016).
CELLS = {
    "logistic": Item("trained-on family", _task("logistic"), 17, 1),
    "regression": Item(
        "trained-on family",
        dict(name="regression", activations=("tanh",), initial_scale=(1.0, 1.0)),
        49,
        1,
    ),
    "mlp": Item("trained-on family", _mlp(), 29, 3),
    "autoencoder": Item(
        "trained-on family", _task("autoencoder", activations=("relu",), batch_size=64), 48, 2
    ),
    "conv": Item(
        "trained-on family",
        _task("conv", channels=(8, 8), dense=(), activations=("relu",), batch_size=16),
        287,
        17,
    ),
    "gru": Item(
        "trained-on family", _task("gru", width=16, context=16, batch_size=16), 331, 122, rows=32768
    ),
    "mnist": Item("trained-on family", dict(name="mnist"), 188, 91),
    "mlp 4x wider": Item("wider", _mlp(hidden=(128,)), 98, 1),
    "regression 4x wider": Item(
        "wider",
        dict(name="regression", hidden=(128,), activations=("tanh",), initial_scale=(1.0, 1.0)),
        45,
        1,
    ),
    "mlp of 4 layers": Item("deeper", _mlp(hidden=(32, 32, 32, 32)), 81, 1),
    "mlp of 6 layers": Item("deeper", _mlp("tanh", hidden=(16,) * 6), 81, 2),
    "mlp SiLU": Item("activation", _mlp("silu"), 30, 2),
    "mlp sin": Item("activation", _mlp("sin"), 70, 0),
    "residual": Item("architecture", _task("residual"), 210, 3),
    "mixer": Item("architecture", _task("mixer", batch_size=32), 547, 21),
    "row LSTM": Item("architecture", _task("row_lstm", batch_size=32), 274, 6),
    "logistic from zero": Item("trained-on family", _task("logistic", init=0.0), 14, 1),
    "fashion": Item("data", _mlp(dataset="fashion_mnist14", batch_size=64), 44, 4),
    "adult": Item("data", _mlp(dataset="adult"), 42, 10, instead="breast cancer"),
    "housing": Item("data", _mlp("tanh", "housing"), 20, 3, instead="diabetes"),
    "wine quality": Item("data", _mlp("gelu", "winequality"), 12, 1, instead="wine"),
    "breast cancer": Item("data", _mlp(dataset="breast_cancer"), 21, 1),
    "diabetes": Item("data", _mlp("tanh", "diabetes"), 18, 1),
    "wine": Item("data", _mlp("gelu", "wine"), 17, 1),
}
SUITES = {
    "scorecard": Suite(
        tuple(name for name in CELLS if name not in ("breast cancer", "diabetes", "wine")),
        (200, 1_000, 10_000),
        6,  # At least five, and two cores share six evenly.
        {"adam": (0.0, 1e-8), "adamw": (0.0,), "nadamw": (0.0,)},
    ),
    "quick": Suite(
        ("mlp", "mlp 4x wider", "logistic from zero", "breast cancer"),
        (200, 1_000),
        6,
        {"adam": (0.0,)},
    ),
}
TOGETHER = 1_000  # Horizons up to here are measured together, and in all cells before longer ones.
RATES = 15
COMPILING = 4.0  # CPU seconds a program.
LEARNED = 5.0  # Steps of Adam that a step of a learned optimizer is taken for, in the estimate.


class Contender(NamedTuple):
    """curves: `evaluate.Curves`. seconds: of one training step. setting: of a tuned baseline, as
    `baselines.parse` reads it."""

    curves: Any
    seconds: float
    setting: str | None


class Result(NamedTuple):
    """A cell at one horizon. field: {optimizer: Contender}; tuned baselines are called by their
    kind, "adam, tuned". best_test: {kind: the least mean test loss of its grid}. notes: sentences
    about the grids."""

    cell: str
    kind: str
    steps: int
    field: dict[str, Contender]
    best_test: dict[str, float]
    notes: list[str]


def find(name: str) -> Suite:
    """The suite of that name; UserError with the nearest for an unknown one."""
    return SUITES[datasets.check_name("suite", name, SUITES)]


def dataset_of(name: str) -> str:
    """The data set of a cell; of a task that reads none, the task's name."""
    task = CELLS[name].task
    return task.get("dataset", registry.setting_of(task["name"], "dataset"))


def available(names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """(the cells that can be measured here, sentences about those that cannot)."""
    chosen, notes = [], []
    for name in names:
        item, dataset = CELLS[name], dataset_of(name)
        if dataset not in datasets.SPECS or datasets.present(dataset):
            chosen.append(name)
            continue
        other = f"; {item.instead} in its place" if item.instead else ""
        notes.append(
            f"{name}: skipped: {dataset} is not present below {datasets.data_dir()}{other}."
        )
        chosen += [item.instead] if item.instead else []
    return tuple(dict.fromkeys(chosen)), notes


def plan(names: Sequence[str], horizons: Sequence[int]) -> list[tuple[tuple[int, ...], str]]:
    """(horizons, cell) in the order of measuring: the short horizons in all cells, then each longer
    one, always from the cheapest cell on, so that what was done when it ends early is of use."""
    short = tuple(h for h in sorted(set(horizons)) if h <= TOGETHER)
    groups = [short] * bool(short) + [(h,) for h in sorted(set(horizons)) if h > TOGETHER]
    cheapest = sorted(names, key=lambda name: CELLS[name].cost)
    return [(group, name) for group in groups for name in cheapest]


def estimate(part: tuple[tuple[int, ...], str], suite: Suite, seeds: int, entries: int) -> float:
    """CPU seconds of one entry of a plan, without extensions of the grids."""
    horizons, name = part
    roots = sum(map(len, suite.grids.values()))
    swept = RATES * roots * (max(horizons) + sum(horizons))
    runs = RATES * roots * (1 + len(horizons))
    single = sum(horizons) * (len(suite.grids) + LEARNED * entries)
    programs = (len(suite.grids) * 2 + entries) * (len(horizons) + 1)
    steps, whole = CELLS[name].cost * 1e-6 * (swept + single), CELLS[name].whole * 1e-3 * runs
    return seeds * (steps + whole) + COMPILING * programs


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever says it best."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def measure(
    key: jax.Array,
    entries: Sequence[Entry],
    suite: Suite,
    parts: Sequence[tuple[tuple[int, ...], str]],
    seeds: int,
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Iterator[Result]:
    """Measures the parts of a plan, in order: a `Result` a cell and horizon as soon as it is there.

    Args:
      key: decides the problems.
      entries: what is scored, beside the suite's tuned baselines.
      seeds: problems a cell.
      cache_dir: where everything is kept as it comes, the timings too: the same call goes on where
        another was interrupted.
      progress: called with (CPU seconds done, in all, what is done), all as `estimate` has them.
    """
    costs = [estimate(part, suite, seeds, len(entries)) for part in parts]
    for i, ((horizons, name), cost) in enumerate(zip(parts, costs, strict=True)):
        before, total = sum(costs[:i]), sum(costs)
        label = f"{name}, {', '.join(f'{h:,}' for h in horizons)} steps"

        def told(share, text, before=before, total=total, cost=cost, label=label):
            progress(round(before + share * cost), round(total), f"{label}: {text}")

        yield from _cell(key, entries, suite, horizons, name, seeds, cache_dir, told)
        evaluate.forget()  # No cell has a program that another can use.
    progress(round(sum(costs)), round(sum(costs)), "done")


def _cell(key, entries, suite, horizons, name, seeds, cache_dir, told) -> Iterator[Result]:
    family, data = load(name)
    tuned = {}
    for i, (kind, roots) in enumerate(suite.grids.items()):

        def tuning_told(done, total, text, i=i):
            told(0.9 * (i + done / total) / len(suite.grids), text)

        tuned[kind] = tuning.tune(
            *(key, kind, family, data, seeds, horizons),
            eps_roots=roots,
            cache_dir=cache_dir,
            progress=tuning_told,
        )
    seconds = _seconds(key, entries, suite, family, data, cache_dir)
    for horizon in horizons:
        field, settings = list(map(_bindable, entries)), {}
        for kind, result in tuned.items():
            best = tuning.point_setting(result.by_train_loss[horizon])
            settings[tuned_name(kind)] = baselines.expression(kind, best)
            field.append(Entry(tuned_name(kind), baselines.grid(kind), best))
        contenders = {}
        for entry in field:
            told(0.95, f"{entry.name} at {horizon:,}")
            curves = cache.curves(
                *(key, entry.optimizer, entry.theta, family, data, seeds, horizon, cache_dir)
            )
            contenders[entry.name] = Contender(
                curves, seconds[entry.name], settings.get(entry.name)
            )
        best_test = {
            kind: float(np.mean(result.by_test_loss[horizon].test_loss))
            for kind, result in tuned.items()
        }
        # The tables have a note for every horizon; those of the grids belong to the last.
        notes = [note for r in tuned.values() for note in r.notes if horizon == horizons[-1]]
        yield Result(name, CELLS[name].kind, horizon, contenders, best_test, notes)


def load(name: str) -> tuple[base.TaskFamily, Any]:
    """The family of a cell and its data, cut to its `rows`."""
    family, rows = registry.task(CELLS[name].task), CELLS[name].rows
    data = family.data()
    return family, jax.device_put(jax.tree.map(lambda x: x[:rows], data))


def tuned_name(kind: str) -> str:
    """What the tuned baseline of a kind is called."""
    return f"{kind}, tuned"


def _bindable(entry: Entry) -> Entry:
    """An entry whose optimizer is a `LearnedOptimizer`."""
    if isinstance(entry.optimizer, base.LearnedOptimizer):
        return entry
    return Entry(entry.name, base.fixed(entry.optimizer), ())


def _seconds(key, entries, suite, family, data, cache_dir) -> dict[str, float]:
    """`speed.step_seconds` of all, in one go: kept together, since they are compared."""
    field = {e.name: (e.optimizer, e.theta) for e in map(_bindable, entries)}
    for kind in suite.grids:
        field[tuned_name(kind)] = baselines.grid(kind), baselines.setting(1e-3)
    inputs = ()
    if cache_dir is not None:
        programs = {
            name: cache.program(optimizer, family, theta, (1,), key, data)
            for name, (optimizer, theta) in field.items()
        }
        inputs = ("seconds", programs, platform.node(), jax.devices()[0].device_kind)
    return cache.kept(cache_dir, inputs, lambda: speed.step_seconds(key, field, family, data))
