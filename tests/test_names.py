"""Optimizers and cells are known by their names: no two have the same."""

import jax
import numpy as np
import optax
import pytest

from l2l.console.errors import UserError
from l2l.evaluation import aggregate, cli, comparison, entries
from l2l.evaluation.cells import Cell
from l2l.evaluation.comparison import Entry
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid
from l2l.storage import exports
from l2l.tasks import registry
from l2l.training.experiment import build_experiment

PROBLEMS = Problems(jax.random.key(0), 1)
TASK = {"name": "quadratic", "dimension": 2, "batch_size": 2}


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Exports below the working directory, of descents at 0.1, 0.2, 0.3 and 0.4."""
    monkeypatch.chdir(tmp_path)
    paths = ("a/one/optimizer", "b/one/optimizer", "b/two/optimizer", "lstm")
    for i, path in enumerate(paths):
        file = tmp_path / f"{path}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        exports.export(file, {"name": "sgd", "learning_rate": 0.1 * (i + 1)}, ())


@pytest.mark.parametrize(
    "texts, names",
    [
        (["a/one/optimizer.safetensors", "lstm"], ["optimizer", "lstm"]),
        (["a/one", "b/one/", "b/two"], ["a/one", "b/one", "two"]),
        (
            [f"{run}/optimizer.safetensors" for run in ("a/one", "b/one", "b/two")],
            ["a/one/optimizer", "b/one/optimizer", "two/optimizer"],
        ),
        (["lstm", "lstm.safetensors"], ["lstm", "lstm.safetensors"]),
        (["a/one", "./a/one"], ["a/one", "./a/one"]),
        (["sgd(0.1)", "sgd(0.2)"], ["sgd(0.1)", "sgd(0.2)"]),
    ],
)
def test_paths_are_called_by_what_tells_them_apart(saved, texts, names):
    assert [entry.name for entry in entries.read_all(texts)] == names


def test_a_directory_without_a_name_has_one(saved, monkeypatch):
    monkeypatch.chdir("a/one")
    assert [entry.name for entry in entries.read_all(["."])] == ["."]


def test_the_same_text_twice_is_refused(saved):
    with pytest.raises(UserError, match=r"--optimizer names a/one twice: leave one out"):
        entries.read_all(["a/one", "lstm", "a/one"])


def test_each_of_two_exports_of_one_name_has_its_own_numbers(saved):
    field = entries.read_all([f"{run}/optimizer.safetensors" for run in ("a/one", "b/one")])
    field += [Entry("0.1", optax.sgd(0.1)), Entry("0.2", optax.sgd(0.2))]
    cells = [Cell("one", TASK)]
    rows = list(comparison.measure(field, cells, (3,), PROBLEMS, grids=()))
    trained = [row.train for row in rows]
    np.testing.assert_allclose(trained[:2], trained[2:], rtol=1e-6)
    assert trained[0] != trained[1]


SMALL, LARGE = TASK | {"stddev": 0.01}, TASK | {"stddev": 3.0}


def test_tasks_of_one_name_are_called_by_the_settings_that_differ():
    wide = {"name": "quadratic", "dimension": 2}
    other = wide | {"dimension": 3}
    # The last is the second, with a default spelt out.
    found = registry.distinct([SMALL, wide, other, LARGE, {**wide, "batch_size": 128}])
    assert [name for name, _ in found] == [
        "quadratic-2 batch_size=2 stddev=0.01",
        "quadratic-2 batch_size=128 stddev=0.01",
        "quadratic-3",  # Says what it is.
        "quadratic-2 batch_size=2 stddev=3.0",
    ]
    assert all(name.startswith(family.name) for name, family in found)


def test_cells_of_one_family_have_names_that_differ(tiny):
    expected = ["quadratic-2 stddev=0.01", "quadratic-2 stddev=3.0"]
    assert [cell.name for cell in cli.read_cells([SMALL, LARGE], None)] == expected
    varied = [cell.name for cell in cli.read_cells([SMALL, LARGE], "batch_size=2,3")]
    assert len(set(varied)) == 4 and varied[0] == "quadratic-2 batch_size=2 stddev=0.01"
    mixture = (SMALL | {"weight": 2.0}, LARGE, LARGE | {"augmentations": {"name": "rescale"}})
    judged = build_experiment(tiny | {"task": mixture}).judged
    assert [name for name, _ in judged] == expected
    assert [family.name for _, family in judged] == ["quadratic-2"] * 2


def test_the_scores_of_two_tasks_of_one_family_are_two():
    cells = cli.read_cells([SMALL, LARGE], None)
    grid = Grid("sgd", (1e-2, 1e-1, 2), ("constant",), extensions=0)
    field = [Entry("slow", optax.sgd(1e-3))]
    rows = list(comparison.measure(field, cells, (3,), PROBLEMS, grids=(grid,)))
    scores = [one for one in aggregate.score(rows) if one.optimizer == "slow"]
    assert [one.cell for one in scores] == [cell.name for cell in cells]
    assert scores[0].train != scores[1].train


@pytest.mark.parametrize(
    "names, cells, message",
    [
        (["x", "x"], ["one"], "Two optimizers are called 'x'"),
        (["x", "adam, tuned"], ["one"], "Two optimizers are called 'adam, tuned'"),
        (["x"], ["one", "one"], "Two cells are called 'one'"),
    ],
)
def test_what_has_the_name_of_another_is_not_measured(names, cells, message):
    field = [Entry(name, optax.sgd(0.1)) for name in names]
    with pytest.raises(UserError, match=message):
        next(comparison.measure(field, [Cell(name, TASK) for name in cells], (3,), PROBLEMS))
