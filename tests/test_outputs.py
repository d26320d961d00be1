"""What l2l.evaluate writes, and when it leaves alone what is there."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import optax
import pytest

from l2l.cluster import environment
from l2l.console.errors import UserError
from l2l.evaluation import cli, comparison, figures, report, stored
from l2l.evaluation.cells import Cell
from l2l.evaluation.curves import Problems
from l2l.training import experiment, finish, sections

TASK = ["--task=quadratic", "--set", "dimension=2", "--set", "batch_size=2", "--seeds=1"]


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """(horizons, rows before Ctrl-C) -> the exit code of a command that writes to a directory."""
    monkeypatch.setattr(environment, "prepare", lambda: None)  # This process is the tests' own.
    whole = comparison.measure

    def run(horizons, stop=None):
        def measure(*arguments, **settings):
            for i, row in enumerate(whole(*arguments, **settings)):
                if i == stop:
                    raise KeyboardInterrupt
                yield row

        monkeypatch.setattr(comparison, "measure", measure)
        argv = ["evaluate", "--optimizer=sgd(0.1)", *TASK, "--baseline=none"]
        argv += [f"--horizons={horizons}", f"--output={tmp_path}"]
        return cli.main(argv, sections.settings_of)

    return run


def written(directory: Path) -> dict[str, bytes]:
    """The files in a directory, but for what is kept of measurements."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def test_what_is_interrupted_replaces_nothing_of_another_command(evaluate, tmp_path, capsys):
    assert evaluate("3") == 0
    before = written(tmp_path)
    assert sorted(before) == ["curves-3.png", "results.json", "table.md"]
    for stop in (0, 1):
        capsys.readouterr()
        assert evaluate("4,6", stop) == 130
        out, said = capsys.readouterr()
        assert written(tmp_path) == before and "Not yet measured at 6 steps" in out
        assert ("sgd(0.1)" in out) == bool(stop)
        assert "holds the results of another command, which stay until this one is done" in said
        assert f"interrupted; the same command goes on from here. {tmp_path} keeps the" in said
    # Done, it takes their place, and no figure of theirs is left beside it.
    assert evaluate("4,6") == 0
    assert sorted(written(tmp_path)) == [
        *("curves-4.png", "curves-6.png", "results.json", "table.md")
    ]


def test_what_is_interrupted_replaces_nothing_that_it_had_done_itself(evaluate, tmp_path, capsys):
    assert evaluate("4,6") == 0
    before = written(tmp_path)
    assert evaluate("4,6", 1) == 130 and written(tmp_path) == before
    assert "another command" not in capsys.readouterr().err


def test_an_unfinished_comparison_leaves_tables_and_goes_on(evaluate, tmp_path, capsys):
    assert evaluate("4,6", 0) == 130 and not written(tmp_path)
    assert evaluate("4,6", 1) == 130
    assert "not yet measured" in (tmp_path / "table.md").read_text()
    assert len(json.loads((tmp_path / "results.json").read_text())["rows"]) == 1
    said = capsys.readouterr().err
    assert said.count("goes on from here.\n") == 2 and "keeps" not in said
    assert evaluate("4,6") == 0
    assert "not yet measured" not in (tmp_path / "table.md").read_text()


def test_ctrl_c_while_figures_are_drawn(evaluate, tmp_path, capsys, monkeypatch):
    draw, calls = figures.all_of, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(figures, "all_of", interrupted)
    assert evaluate("3") == 130
    out, said = capsys.readouterr()
    assert "## 3 steps" in out and "l2l: interrupted" in said and "keeps" not in said
    assert "curves-3.png" in written(tmp_path)


def test_only_what_was_drawn_by_a_comparison_is_removed(tmp_path):
    drawn = ("curves-20.png", "scorecard.png", "scorecard-2.png", "profile.png", "trials-3.png")
    others = ("curves-mine.png", "adaptation.png", "my-trials.png", "trials.pdf")
    for name in (*drawn, *others):
        (tmp_path / name).touch()
    figures.clear(tmp_path)
    assert sorted(written(tmp_path)) == sorted(others)


def test_the_results_of_a_training_make_a_page_too(tiny, tmp_path):
    """They say what training took, and have no command."""
    built = experiment.build_experiment(tiny)
    state = SimpleNamespace(step=jnp.int32(12), skipped=0, dropped=0)
    about = finish.about(built, SimpleNamespace(state=state, seconds=1.5))
    cells = [Cell(*judged) for judged in built.judged]
    field = [comparison.Entry("sgd", optax.sgd(0.1))]
    problems = Problems(jax.random.key(0), 2)
    rows = list(comparison.measure(field, cells, (3,), problems, grids=()))
    report.write(tmp_path / "run", rows, cells, (3,), about=about, draw=False)
    (tmp_path / "pages").mkdir()
    path = tmp_path / "pages" / "mine.json"
    path.write_bytes((tmp_path / "run" / "results.json").read_bytes())
    page, found = stored.page(tmp_path / "pages")
    assert "at the end of meta-training: 12 meta-steps on quadratic-2, seed 3, 1.5 " in page
    assert "; 2 problems a cell; l2l " in page and len(found["mine"]) == 1
    content = json.loads(path.read_text())
    for lacking in ("training", "versions", "notes"):
        path.write_text(json.dumps({k: v for k, v in content.items() if k != lacking}))
        with pytest.raises(UserError, match=rf"mine.json is not a results.json .*'{lacking}'"):
            stored.page(tmp_path / "pages")
