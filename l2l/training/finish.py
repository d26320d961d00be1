"""The results of a run: comparisons with tuned Adam, during and after training, and its files."""

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from l2l.console import errors
from l2l.console.errors import UserError
from l2l.console.progress import Bar
from l2l.core import base
from l2l.evaluation import comparison, curves, report, statistics, tuning
from l2l.evaluation.cells import Cell
from l2l.evaluation.comparison import Entry
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid
from l2l.optimizers import versions
from l2l.storage import exports, files, loading
from l2l.training import adapting, searching
from l2l.training.experiment import Experiment
from l2l.training.run_directory import START, differences
from l2l.version import __version__

SUMMARY = "summary.txt"  # Written last: a directory that has it holds a finished run.
# The space of `l2l.evaluate`.
ADAMS = Grid("adam")


def comparing(
    experiment: Experiment, directory, key: jax.Array, say: Callable[[str], None]
) -> Callable:
    """Makes (theta) -> (numbers for the log, a phrase), at the shortest horizon of section
    `evaluation` and on the first of its tasks. At the first call its data are read and Adam is
    tuned. Where theta holds the start of runs see `adapting.comparing`."""
    if experiment.optimizer.start is not None:
        return adapting.comparing(experiment, key)
    settings = experiment.evaluation
    horizon, (name, family) = min(settings.horizons), experiment.judged[0]

    @functools.cache
    def make():
        own = jax.device_put(family.data())
        say(f"Tuning Adam on {name}, {horizon} steps, to compare with.")
        problems = Problems(key, settings.num_problems)
        tuned = tuning.tune(
            *(ADAMS, family, own, problems, (horizon,)),
            cache_dir=Path(directory) / "cache",
        )
        run = curves.compile_evaluation(
            experiment.optimizer, family, settings.num_problems, horizon
        )
        return run, own, float(np.mean(tuned.by_train_loss[horizon].train_loss))

    def compare(theta):
        run, own, adam = make()
        found = run(theta, key, own)
        loss = float(np.mean(statistics.or_infinite(found.train_loss[:, -1])))
        ratio = float(statistics.ratio(loss, adam))
        numbers = {"comparison/loss_ratio": ratio, "comparison/adam_loss": adam}
        numbers["comparison/loss"] = loss
        if family.accuracy is not None:
            numbers["comparison/test_accuracy"] = float(np.mean(found.test_accuracy[:, -1]))
        if math.isnan(ratio):
            return numbers, f"loss {loss:.3g}, tuned Adam's {adam:.3g} at {horizon}"
        return numbers, f"{ratio:.3g} × tuned Adam's loss at {horizon}"

    return compare


def conclude(experiment: Experiment, theta, directory, key, snapshot) -> str:
    """Exports theta, scores it beside tuned Adam (a start beside other starts, or settings beside
    those of random search) and writes table, JSON and figure; returns the summary that a user is
    shown."""
    directory = Path(directory)
    theta = jax.device_get(theta)
    # First of all: whatever becomes of the comparison, the product is there.
    try:
        path = exports.export(
            directory / exports.EXPORT, experiment.specification, theta, about(experiment, snapshot)
        )
    except exports.NotExportable as error:
        raise UserError(
            f"{error} Training is done and its checkpoints are kept, so that you can then "
            f"{errors.AGAIN}."
        ) from error
    if experiment.optimizer.start is not None:
        text = adapting.conclude(experiment, theta, directory, key, about(experiment, snapshot))
    elif experiment.evaluation.against == "random_search":
        text = searching.conclude(experiment, theta, directory, key, about(experiment, snapshot))
    else:
        text = _scored(experiment, theta, directory, key, snapshot)
    text += f"\n{directory / 'metrics.jsonl'}\n{path}\n"
    taken, steps = int(snapshot.state.step), experiment.running.steps
    if taken < steps:
        text += (
            f"A callback ended meta-training after {taken} of {steps} meta-steps. To train on, "
            f"remove {directory / SUMMARY} and give the same command.\n"
        )
    files.write(directory / SUMMARY, text.encode())
    return text


def _scored(experiment: Experiment, theta, directory, key, snapshot) -> str:
    """The comparison with tuned Adam."""
    cells = [Cell(name, family) for name, family in experiment.judged]
    entry = Entry(experiment.specification["name"], experiment.optimizer, theta)
    horizons, grids, bar = experiment.evaluation.horizons, (ADAMS,), Bar(1.0)
    rows = comparison.measure(
        *([entry], cells, horizons, Problems(key, experiment.evaluation.num_problems)),
        grids=grids,
        cache_dir=directory / "cache",
        progress=bar.show,
    )
    text = report.write(
        *(directory, list(rows), cells, horizons), grids=grids, about=about(experiment, snapshot)
    )
    bar.close()
    return text


def earlier(experiment) -> tuple[base.PyTree, dict]:
    """(theta, metadata) of the export that training begins with; UserError if it does not fit."""
    _, theta, metadata = exports.read(loading.locate(experiment.start))
    mine = json.loads(json.dumps(versions.complete(experiment.specification)))
    if different := differences(exports.specification_of(metadata), mine, "optimizer"):
        raise UserError(
            f"start={experiment.start!r} is another optimizer ({'; '.join(different)}): set "
            "section `optimizer` to its settings, or begin without it."
        )
    like = jax.eval_shape(experiment.optimizer.init, jax.random.key(0))
    return exports.fitted(theta, like, f"start={experiment.start!r}"), metadata


def keep_start(experiment: Experiment, directory) -> None:
    """Copies the export that training begins with to the run's directory, if it begins with one and
    has no copy yet: at the end theta may be blended with it, and by then another file may lie
    there.

    Raises:
      UserError: it cannot be read, or does not fit.
    """
    path = Path(directory) / START
    if not experiment.start or path.exists():
        return
    earlier(experiment)
    source = loading.locate(experiment.start)
    with files.reached(source), files.copied(source) as local:
        content = local.read_bytes()
    files.write(path, content)


def with_own_start(experiment: Experiment, directory) -> Experiment:
    """The experiment that begins with what `keep_start` has copied."""
    if not experiment.start:
        return experiment
    return experiment._replace(start=str(Path(directory) / START))


def finished(directory) -> str | None:
    """The summary of a run that has ended in a directory, or None. The paths of its files are those
    of today: the directory may have been moved."""
    directory = Path(directory)
    path = directory / SUMMARY
    with errors.naming(path):
        if not path.exists():
            return None
        lines = path.read_text(encoding="utf-8").split("\n")

    def today(line):
        moved = directory / Path(line).name
        return str(moved) if os.sep in line and moved.is_file() else line

    return "\n".join(map(today, lines))


def about(experiment: Experiment, snapshot) -> dict:
    """Where an optimizer comes from, as plain data: what exports and results say of it."""
    before = earlier(experiment)[1] if experiment.start else {}
    devices, taken = snapshot.state.step.devices(), int(snapshot.state.step)
    return {
        "config": experiment.config,
        "seed": experiment.seed,
        "meta_steps": taken,
        "skipped": int(snapshot.state.skipped),
        "dropped": int(snapshot.state.dropped),
        "training": {
            "seconds": round(float(snapshot.seconds), 1),
            "devices": len(devices),
            "platform": min(devices, key=lambda device: device.id).device_kind,
            "inner_steps": experiment.inner_steps(taken),
            "data": [family.name for family in experiment.families],
        },
        # Of the optimizer that this one went on from, and of those before it.
        "training_before": [
            *before.get("training_before", ()),
            # An export that a user made of a theta may say nothing of how it was trained.
            *([before["training"]] if "training" in before else []),
        ],
        "versions": {"l2l": __version__, "jax": jax.__version__},
    }
