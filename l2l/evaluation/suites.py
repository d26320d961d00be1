"""Suites: lists of cells that optimizers are scored on, with horizons and grids.

    python -m l2l.evaluate --optimizer=mlp --suite=quick
    python -m l2l.evaluate --optimizer=mlp --suite=scorecard --horizons=200,1000
    python -m l2l.evaluate --optimizer=lstm --suite=models --cells=vae,nanogpt

The problems of a cell differ in their initial values and batches alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from l2l.console.errors import UserError
from l2l.data import datasets
from l2l.evaluation.cells import Cell
from l2l.evaluation.tuning import Grid
from l2l.tasks import registry

KINDS = (
    "trained-on family",
    "wider",
    "deeper",
    "activation",
    "architecture",
    "data",
    "batch size",
    "models",
)


class Suite(NamedTuple):
    """What `comparison.measure` takes: cells, horizons, problems a cell, and grids to tune.

    told: what learned optimizers are told of the length of a run, as parts of it; see
      `comparison.Entry`.
    """

    cells: tuple[Cell, ...]
    horizons: tuple[int, ...]
    seeds: int
    grids: tuple[Grid, ...]
    told: tuple[float, ...] = (1.0,)


def _task(name, **settings):
    return dict(name=name, initial_scale=(1.0, 1.0), subset=(1.0, 1.0), **settings)


def _mlp(activation="relu", dataset="digits", hidden=(32,), **settings):
    return _task("mlp", dataset=dataset, hidden=hidden, activations=(activation,), **settings)


_DEEP = _mlp(hidden=(32, 32, 32, 32))
_FASHION = _mlp(dataset="fashion_mnist14")
# One activation, all of the training split, initial weights of LeCun's deviation. "mlp" and "mnist"
# are the public yardsticks: 64-32-10 ReLU, and 784-20-10 sigmoid (Andrychowicz et al., 2016).
_CELLS = (
    Cell("logistic", _task("logistic"), "trained-on family", 17, 1),
    Cell(
        "regression",
        dict(name="regression", activations=("tanh",), initial_scale=(1.0, 1.0)),
        "trained-on family",
        49,
        1,
    ),
    Cell("mlp", _mlp(), "trained-on family", 29, 3),
    Cell(
        "autoencoder",
        _task("autoencoder", activations=("relu",), batch_size=64),
        "trained-on family",
        48,
        2,
    ),
    Cell(
        "conv",
        _task("conv", channels=(8, 8), dense=(), activations=("relu",), batch_size=16),
        "trained-on family",
        287,
        17,
    ),
    Cell(
        "gru",
        _task("gru", width=16, context=16, batch_size=16),
        "trained-on family",
        331,
        122,
        rows=32768,
    ),
    Cell("mnist", dict(name="mnist"), "trained-on family", 188, 91),
    Cell("mlp 4x wider", _mlp(hidden=(128,)), "wider", 98, 1),
    Cell(
        "regression 4x wider",
        dict(name="regression", hidden=(128,), activations=("tanh",), initial_scale=(1.0, 1.0)),
        "wider",
        45,
        1,
    ),
    Cell("mlp of 4 layers", _DEEP, "deeper", 81, 1),
    Cell("mlp of 6 layers", _mlp("tanh", hidden=(16,) * 6), "deeper", 81, 2),
    Cell("mlp SiLU", _mlp("silu"), "activation", 30, 2),
    Cell("mlp sin", _mlp("sin"), "activation", 70, 0),
    Cell("residual", _task("residual"), "architecture", 210, 3),
    Cell("mixer", _task("mixer", batch_size=32), "architecture", 547, 21),
    Cell("row LSTM", _task("row_lstm", batch_size=32), "architecture", 274, 6),
    Cell("logistic from zero", _task("logistic", init=0.0), "trained-on family", 14, 1),
    Cell("fashion", _FASHION | {"batch_size": 64}, "data", 44, 4),
    Cell("adult", _mlp(dataset="adult"), "data", 42, 10, instead="breast cancer"),
    Cell("housing", _mlp("tanh", "housing"), "data", 20, 3, instead="diabetes"),
    Cell("wine quality", _mlp("gelu", "winequality"), "data", 12, 1, instead="wine"),
    Cell("breast cancer", _mlp(dataset="breast_cancer"), "data", 21, 1),
    Cell("diabetes", _mlp("tanh", "diabetes"), "data", 18, 1),
    Cell("wine", _mlp("gelu", "wine"), "data", 17, 1),
    # The same at other levels of gradient noise. What there is no number for is batch 128.
    Cell("mlp at batch 16", _mlp(batch_size=16), "batch size", 12, 3),
    Cell("mlp at batch 64", _mlp(batch_size=64), "batch size", 20, 3),
    Cell("mlp at batch 512", _mlp(batch_size=512), "batch size", 90, 3),
    Cell("mlp of 4 layers at batch 16", _DEEP | {"batch_size": 16}, "batch size", 25, 1),
    Cell("mlp of 4 layers at batch 512", _DEEP | {"batch_size": 512}, "batch size", 240, 1),
    Cell("fashion at batch 16", _FASHION | {"batch_size": 16}, "batch size", 20, 4),
    Cell("fashion at batch 128", _FASHION | {"batch_size": 128}, "batch size", 70, 4),
    Cell("fashion at batch 512", _FASHION | {"batch_size": 512}, "batch size", 240, 4),
)

# Models of real size, each some minutes of a core: the horizons are their own, and of whole splits
# a sample is measured. The steps of nanogpt are those of its recipe.
_MODELS = (
    Cell(
        "vae",
        _task("vae", activations=("relu",)),
        "models",
        5500,
        60,
        scored=2000,
        horizons=(2000,),
    ),
    Cell(
        "mlp with LayerNorm",
        _mlp("gelu", "mnist", (512, 512), layer_norm=True, batch_size=1024),
        *("models", 32_000, 60),
        scored=2000,
        horizons=(500,),
    ),
    Cell("char LSTM", _task("char_lstm"), "models", 72_000, 900, scored=400, horizons=(500,)),
    Cell(
        "vit",
        _task("vit", patch=7, activations=("gelu",)),
        *("models", 100_000, 900),
        scored=1000,
        horizons=(500,),
    ),
    Cell(
        "nanogpt",
        _task("nanogpt", dataset="tinyshakespeare"),
        *("models", 142_000, 2400),
        instead="nanogpt on pydoc",
        scored=600,
        horizons=(2000,),
    ),
    Cell("resnet", _task("resnet"), "models", 310_000, 2400, scored=500, horizons=(500,)),
    Cell(
        "nanogpt on pydoc",
        _task("nanogpt", dataset="pydoc"),
        *("models", 142_000, 2400),
        scored=600,
        horizons=(2000,),
    ),
)
CELLS = {cell.name: cell for cell in (*_CELLS, *_MODELS)}
_QUICK = ("mlp", "mlp 4x wider", "logistic from zero", "breast cancer")
_STAND_INS = ("breast cancer", "diabetes", "wine", "nanogpt on pydoc")
_NOISE = ("mlp", "mlp of 4 layers", "fashion")
# Each is tuned in its own space (`baselines.KINDS`) with the same number of trials, so that none
# grows. Ratios are taken to the first.
RIVALS = tuple(
    Grid(kind, extensions=0)
    for kind in (*("adam", "adamw", "nadamw", "muon", "schedule_free_adamw", "prodigy", "soap"),)
)
SUITES = {
    "scorecard": Suite(
        cells=tuple(
            cell for cell in _CELLS if cell.name not in _STAND_INS and cell.kind != "batch size"
        ),
        horizons=(200, 1_000, 10_000),
        seeds=6,  # At least five, and two cores share six evenly.
        grids=RIVALS,
    ),
    # Gradient noise, and what the optimizer is told of the length of its run.
    "noise": Suite(
        cells=tuple(c for c in _CELLS if c.name in _NOISE or c.kind == "batch size"),
        horizons=(200, 1_000),
        seeds=6,
        grids=RIVALS,
        told=(1.0, 1 / 3, 0.0),
    ),
    "quick": Suite(
        cells=tuple(CELLS[name] for name in _QUICK),
        horizons=(200, 1_000),
        seeds=6,
        grids=RIVALS,
    ),
    "models": Suite(
        cells=tuple(cell for cell in _MODELS if cell.name not in _STAND_INS),
        horizons=(500,),
        seeds=1,  # A run takes minutes.
        grids=(
            Grid(
                *("adamw", (6e-4, 1.6e-2, 4), ("warmup cosine",)),
                weight_decays=(0.01, 0.1),
                each=1,
                extensions=0,
            ),
        ),
    ),
}


def find(name: str) -> Suite:
    """The suite of that name; UserError with the nearest for an unknown one."""
    return SUITES[datasets.check_name("suite", name, SUITES)]


def select(cells: Sequence[Cell], names: Sequence[str]) -> tuple[Cell, ...]:
    """The cells of these names, in the order of the suite; UserError with the nearest for an
    unknown one."""
    known = [cell.name for cell in cells]
    wanted = [datasets.check_name("cell of the suite", name, known) for name in names]
    return tuple(cell for cell in cells if cell.name in wanted)


def rivals(grids: Sequence[Grid], kinds: Sequence[str]) -> tuple[Grid, ...]:
    """The grids of these kinds, in their order: ratios are taken to the first. UserError with the
    nearest for a kind that is none of the suite's."""
    known = {grid.kind: grid for grid in grids}
    return tuple(known[datasets.check_name("rival in the suite", kind, known)] for kind in kinds)


def dataset_of(cell: Cell) -> str:
    """The data set of a suite's cell; of a task that reads none, the task's name."""
    assert isinstance(cell.task, Mapping)  # As those of all suites are.
    return cell.task.get("dataset", registry.setting_of(cell.task["name"], "dataset"))


def available(cells: Sequence[Cell]) -> tuple[tuple[Cell, ...], list[str]]:
    """(the cells that can be measured here, sentences about those that cannot). All data are read,
    so that what is wrong with them shows before hours of work."""
    chosen, notes = [], []
    for cell in cells:
        reason = _lacking(cell)
        if reason is None:
            chosen.append(cell.name)
            continue
        other = f"; {cell.instead} in its place" if cell.instead else ""
        notes.append(f"{cell.name}: skipped: {reason.rstrip('.')}{other}.")
        chosen += [cell.instead] if cell.instead else []
    return tuple(CELLS[name] for name in dict.fromkeys(chosen)), notes


def _lacking(cell: Cell) -> str | None:
    """Why a cell of a suite cannot be measured here; None where it can."""
    dataset = dataset_of(cell)
    if dataset in datasets.SPECS and not datasets.present(dataset):  # Nothing is downloaded.
        return f"{dataset} is not present below {datasets.data_dir()}"
    try:
        family, data = cell.read()

        def batches(key, data):
            return [family.batch(None, family.sample(key), data, s) for s in ("validation", "test")]

        # Data may be too few for the task's batches.
        jax.eval_shape(batches, jax.random.key(0), data)
    except UserError as error:
        return str(error)
    return None
