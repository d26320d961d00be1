"""Suites: definitions against closed forms, cells that build, runs that go on after a stop."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from l2l.cluster import environment
from l2l.console.errors import UserError
from l2l.core import base
from l2l.data import datasets
from l2l.evaluation import (
    baselines,
    budget,
    cache,
    cli,
    comparison,
    curves,
    report,
    statistics,
    stored,
    suites,
    timing,
    tuning,
)
from l2l.evaluation.cells import Cell, Part, estimate, plan
from l2l.evaluation.comparison import Entry
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid
from l2l.tasks import registry
from l2l.training import sections


def descent(rate, steps):
    """The losses of gradient descent on ½ x² from 1: L_t = ½ (1 − rate)^{2t}."""
    return 0.5 * (1 - rate) ** (2.0 * np.arange(steps))[None]


# --- definitions -----------------------------------------------------------------------------


@pytest.mark.parametrize("steps, smaller", [(16, 9), (12, 7), (6, 4)])
def test_speed_up_of_gradient_descent_is_the_closed_form(steps, smaller):
    # With rate ½ the loss is ½ 4^{-t}, with rate 1 − 2^{-1/2} it is ½ 2^{-t}. The slow one ends
    # (before its last step, t = T − 1) at ½ 2^{-(T − 1)}, which the quick one has at
    # t >= (T − 1)/2: at its step ceil((T − 1)/2) + 1, counted from 1.
    quick, slow = descent(0.5, steps), descent(1 - 0.5**0.5, steps) * (1 + 1e-12)
    assert smaller == -(-(steps - 1) // 2) + 1
    np.testing.assert_allclose(statistics.speed_up(quick, slow), [steps / smaller])
    np.testing.assert_allclose(statistics.speed_up(slow, quick), [smaller / steps])


def test_speed_up_is_symmetric_and_one_for_itself():
    draws = np.random.RandomState(0)
    a, b = (np.exp(-np.linspace(0, 3, 200) + 0.3 * draws.randn(4, 200)) for _ in range(2))
    np.testing.assert_array_equal(statistics.speed_up(a, a), np.ones(4))
    np.testing.assert_allclose(statistics.speed_up(a, b) * statistics.speed_up(b, a), np.ones(4))
    assert not np.array_equal(statistics.speed_up(a, b), np.ones(4))


def test_a_run_that_diverges_is_as_slow_as_can_be():
    good, worse, bad = descent(0.5, 10), descent(-0.1, 10), descent(0.5, 10)
    bad[0, 7] = np.nan
    for diverged in (worse, bad * np.where(np.arange(10) < 7, 1, np.nan)):
        np.testing.assert_array_equal(statistics.speed_up(diverged, good), [0.1])
        np.testing.assert_array_equal(statistics.speed_up(good, diverged), [10.0])
        np.testing.assert_array_equal(statistics.speed_up(diverged, diverged), [1.0])


@pytest.mark.parametrize("steps, width", [(100, 5), (39, 1), (139, 6)])
def test_smoothing_is_a_trailing_mean(steps, width):
    losses = np.random.RandomState(1).rand(2, steps)
    truth = [[row[max(0, t + 1 - width) : t + 1].mean() for t in range(steps)] for row in losses]
    np.testing.assert_allclose(statistics.smooth(losses), truth)
    losses[0, 20] = np.inf
    assert np.isinf(statistics.smooth(losses)[0]).sum() == width


def test_ratios_count_what_is_not_finite_or_too_small():
    got = statistics.ratio([np.nan, 1.0, np.inf, 0.0, 0.0], [1.0, np.inf, np.nan, 1e-9, 2.0])
    np.testing.assert_array_equal(got, [np.inf, 0, 1, 1, 1e-8 / 2])


def test_the_interval_is_students():
    # Logarithms −1, 0, 1: mean 0, deviation 1, t(0.975, 2) = 4.3027, so exp(± 4.3027 / √3).
    middle, low, high = statistics.interval(np.exp([-1.0, 0.0, 1.0]))
    np.testing.assert_allclose(
        (middle, low, high), np.exp(np.array([0, -1, 1]) * 4.302653 / 3**0.5), rtol=1e-5
    )
    assert np.isinf(statistics.interval([1.0, np.inf])[0]) and np.isnan(
        statistics.interval([2.0])[1]
    )


def test_the_standard_error_is_that_of_the_samples_own_mean():
    values = np.random.RandomState(2).rand(7)
    assert statistics.standard_error(values) == pytest.approx(stats.sem(values))
    assert statistics.standard_error([3.0]) == 0


def test_seconds_of_a_step():
    known = timing.Pace(10, 5.0, 2.0)
    assert known.over(10) == known.over(4) == 5.0
    np.testing.assert_allclose(known.over(40) * 40, 10 * 5.0 + 30 * 2.0)
    family, data = suites.CELLS["logistic"].load()
    field = {
        "one": (base.fixed(optax.sgd(0.1)), ()),
        "adam": (baselines.grid("adam"), baselines.setting(1e-3)),
    }
    took = timing.pace(jax.random.key(0), field, family, data, steps=2, rounds=3)
    assert set(took) == set(field)
    assert all(x.steps == 2 and 0 < x.first < 1 and 0 < x.later < 1 for x in took.values())


# --- the table of cells ----------------------------------------------------------------------


@pytest.mark.parametrize("cell", suites.CELLS.values(), ids=suites.CELLS)
def test_every_cell_takes_a_step(cell):
    dataset = suites.dataset_of(cell)
    if dataset in datasets.SPECS and not datasets.present(dataset):
        pytest.skip(f"{dataset} is not present below {datasets.data_dir()}")
    assert cell.kind in suites.KINDS and cell.cost > 0
    family, data = cell.load()

    @jax.jit
    def step(key, data):
        problem = family.sample(key)
        params = family.init(key, problem)
        batch = family.batch(key, problem, data, "train")
        loss, gradient = jax.value_and_grad(family.loss)(params, problem, batch)
        return loss, optax.tree.norm(gradient)

    loss, norm = step(jax.random.key(0), data)
    assert np.isfinite(loss) and norm > 0


def test_suites_reach_all_kinds_and_the_quick_one_needs_no_files():
    for name, one in suites.SUITES.items():
        assert len({len(grid.trials()) for grid in one.grids}) == 1
        assert not any(grid.extensions for grid in one.grids)
        assert one.seeds >= (1 if name == "models" else 5)
    every = {cell.kind for one in suites.SUITES.values() for cell in one.cells}
    assert every == set(suites.KINDS)
    needed = {suites.dataset_of(cell) for cell in suites.SUITES["quick"].cells}
    assert needed <= {"digits", "breast_cancer"}


def test_new_activations_are_in_no_default_mixture():
    from l2l.tasks import supervised

    assert not {"silu", "sin"} & set(supervised.DIVERSE)


def test_absent_data_are_told_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    wanted = ("mlp", "adult", "fashion", "mnist", "breast cancer", "regression")
    cells, notes = suites.available([suites.CELLS[name] for name in wanted])
    # Once, though it is asked for itself too.
    assert [cell.name for cell in cells] == ["mlp", "breast cancer", "regression"]
    assert "adult: skipped: adult is not present below" in notes[0]
    assert "breast cancer in its place" in notes[0] and len(notes) == 3


def test_what_can_be_measured_is_found_without_placing_data(monkeypatch):
    monkeypatch.setattr(Cell, "load", None)
    cells = [suites.CELLS["mlp"], suites.CELLS["nanogpt on pydoc"]]
    assert suites.available(cells) == (tuple(cells), [])


def test_data_that_cannot_be_read_are_told_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    (tmp_path / "reserved" / "adult").mkdir(parents=True)  # Empty.
    (tmp_path / "reserved" / "housing").mkdir()
    (tmp_path / "reserved" / "housing" / "housing.csv").write_text("not a table")
    (tmp_path / "tinyshakespeare").mkdir()  # Of a twentieth of it no row of 64 can be made.
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(bytes(range(40, 104)) * 20)
    wanted = ("mlp", "adult", "housing", "nanogpt")
    cells, notes = suites.available([suites.CELLS[name] for name in wanted])
    assert [c.name for c in cells] == ["mlp", "breast cancer", "diabetes", "nanogpt on pydoc"]
    expected = [
        r"adult: skipped: .*reserved/adult.*; breast cancer in its place\.$",
        r"housing: skipped: .*housing\.csv.*; diabetes in its place\.$",
        r"nanogpt: skipped: context=64 is longer.*; nanogpt on pydoc in its place\.$",
    ]
    for note, sentence in zip(notes, expected, strict=True):
        assert re.match(sentence, note)


def test_short_horizons_come_first_and_cheap_cells_before_dear_ones():
    cells = [suites.CELLS[name] for name in ("conv", "logistic")]
    order = plan(cells, (10_000, 1_000, 200))
    assert [(part.horizons, part.cell.name) for part in order] == [
        ((200, 1_000), "logistic"),
        ((200, 1_000), "conv"),
        ((10_000,), "logistic"),
        ((10_000,), "conv"),
    ]
    grids = suites.find("scorecard").grids
    costs = [estimate(part, grids, 6, 1) for part in order]
    assert costs[2] > costs[0] and costs[3] > costs[2] > 0
    # Up to a thousand steps it is not the horizon that decides, but what a step costs.
    dear = cells[0]._replace(horizons=(500,))
    order = plan([dear, cells[1]], (200, 1_000))
    assert [part.cell.name for part in order] == ["logistic", "conv"]
    # Runs at a constant rate serve all horizons of a part, so that a single cell is one.
    assert plan(cells[:1], (20_000, 200)) == [Part(cells[0], (200, 20_000))]


def test_a_cell_has_its_own_horizons_and_a_sample_of_whole_splits():
    own, other = suites.CELLS["vae"], suites.CELLS["mlp"]
    order = plan([own, other], (200, 1_000))
    assert order == [Part(other, (200, 1_000)), Part(own, (2_000,))]
    family, data = suites.CELLS["mlp"].load()
    sampled, _ = suites.CELLS["mlp"]._replace(scored=100).load()
    problem = family.sample(jax.random.key(0))
    for split in ("train", "validation", "test"):
        whole = family.batch(None, problem, data, split)
        part = sampled.batch(None, problem, data, split)
        rows = np.arange(100) * len(whole.labels) // 100
        assert rows[-1] > 0.98 * len(whole.labels)
        np.testing.assert_array_equal(part.inputs, whole.inputs[rows])
        np.testing.assert_array_equal(part.labels, whole.labels[rows])
    batches = (f.batch(jax.random.key(1), problem, data, "train") for f in (family, sampled))
    np.testing.assert_array_equal(*(batch.inputs for batch in batches))
    # Whatever else a batch holds, like the key of a variational autoencoder's noise, is whole.
    noisy = family._replace(batch=lambda *_: (jnp.arange(9), jax.random.key(0)))
    rows, _ = Cell("noisy", noisy, scored=3).family().batch(None, problem, data, "train")
    assert rows.tolist() == [0, 3, 6]


def test_cells_of_a_suite_by_name():
    cells = suites.SUITES["models"].cells
    assert [c.name for c in suites.select(cells, ["nanogpt", "vae"])] == ["vae", "nanogpt"]
    with pytest.raises(UserError, match="did you mean 'vae'"):
        suites.select(cells, ["vaes"])


def test_a_text_that_is_absent_is_replaced_and_said(tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    cells, notes = suites.available(suites.SUITES["models"].cells)
    assert [cell.name for cell in cells] == ["char LSTM", "nanogpt on pydoc"]
    assert sum("nanogpt on pydoc in its place" in note for note in notes) == 1
    assert {note.split(":")[0] for note in notes} >= {"resnet", "vit", "vae"}


# --- budgets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, seconds", [("2h", 7200), ("90s", 90), ("20m", 1200), ("1h30m", 5400), ("1.5h", 5400)]
)
def test_a_budget_is_a_time(text, seconds):
    assert budget.read(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "h", "0s", "-1h", "2 hours", "1m2h"])
def test_what_is_no_time_is_told(text):
    with pytest.raises(UserError, match="is not a duration: write it like 2h"):
        budget.read(text)


def test_a_budget_spans_the_kinds_before_it_repeats_one():
    kinds = {"a": "x", "b": "x", "c": "x", "d": "y", "e": "z"}
    costs = [5.0, 2.0, 3.0, 10.0, 4.0]
    parts = [Part(Cell(name, TASK, kind), (9,)) for name, kind in kinds.items()]

    def fit(seconds):
        plan = budget.fit(parts, costs, seconds)
        assert sum(plan.costs) <= seconds and len(plan.parts) + len(plan.left_out) == 5
        return ["".join(part.cell.name for part in some) for some in (plan.parts, plan.left_out)]

    # The cheapest of each kind, b, e, d; then of those that are left.
    assert fit(24) == ["bedca", ""]
    assert fit(19) == ["bedc", "a"]
    # What does not fit is left out, and what comes after it may still fit.
    assert fit(9) == ["bec", "ad"]
    assert fit(1) == ["", "abcde"]


def test_what_a_budget_leaves_out_is_said(capsys):
    chosen = suites.find("quick")
    whole = plan(chosen.cells, chosen.horizons)
    costs = [estimate(part, chosen.grids, chosen.seeds, 1) for part in whole]
    cores = min(len(jax.local_devices()), chosen.seeds)
    parts, said = cli._plan(chosen, 1, 0.6 * sum(costs) / cores, Path("scores"))
    assert 0 < len(parts) < len(whole)
    left = [part for part in whole if part not in parts]
    for steps in chosen.horizons:
        names = ", ".join(part.cell.name for part in left)
        assert f"Left out at {steps:,} steps by the budget: {names}." in said
    assert f"{len(parts)} cells, {2 * len(parts)} horizons in all, 6 problems each" in (
        capsys.readouterr().err
    )
    parts, said = cli._plan(chosen, 1, None, Path("scores"))
    assert (parts, said) == (whole, [])
    with pytest.raises(UserError, match="leaves nothing"):
        cli._plan(chosen, 1, 1e-3, Path("scores"))


@pytest.mark.parametrize(
    "seconds, text", [(5, "5 seconds"), (600, "10 minutes"), (36_000, "10 hours")]
)
def test_durations(seconds, text):
    assert budget.duration(seconds) == text


# --- measuring -------------------------------------------------------------------------------

TASK = dict(name="quadratic", dimension=2, batch_size=3)
CELLS = (
    Cell("one", TASK, "data", 1.0, 1.0),
    Cell("two", TASK | {"dimension": 3}, "data", 1.0, 1.0),
)
RATES = dict(rates=(1e-2, 1e-1, 3), schedules=("constant", "cosine"), extensions=0)
GRIDS = (Grid("adam", **RATES), Grid("sgd", **RATES))
HORIZONS = (3, 6)


def pace(key, field, *a, **k):
    """Steps take 20 µs, those of the optimizer called "slow" 40."""
    return dict.fromkeys(field, timing.Pace(1, 2e-5, 2e-5)) | {"slow": timing.Pace(1, 4e-5, 4e-5)}


@pytest.fixture
def timed(monkeypatch):
    monkeypatch.setattr(timing, "pace", pace)


SLOW = Entry("slow", optax.sgd(1e-3))


def measure(directory=None, cells=CELLS, entries=(SLOW,), **more):
    problems = Problems(jax.random.key(0), 2)
    more = dict(grids=GRIDS, timed=True, cache_dir=directory) | more
    return comparison.measure(list(entries), cells, HORIZONS, problems, **more)


def live() -> int:
    """Compiled programs of this process."""
    return len(jax.local_devices()[0].client.live_executables())


@pytest.fixture(scope="module")
def measured():
    """Of one measurement of everything, as in a command of l2l's: its rows, what was told of its
    progress, and how many programs there were more than before, after every row and at the end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "pace", pace)
        patch.setattr(environment, "prepared", True)
        curves.forget()
        before, rows, told, programs = live(), [], [], []
        for row in measure(progress=lambda *a: told.append(a)):
            rows.append(row)
            programs.append(live() - before)
        programs.append(live() - before)
    return SimpleNamespace(rows=rows, told=told, programs=programs)


def test_programs_go_with_their_cell(measured):
    """A process has room for some hundreds."""
    first, *_, last, after = measured.programs
    assert first >= 2 and last <= 1.5 * first and after == 0


def test_a_baseline_beside_itself_is_even(measured):
    rows = measured.rows
    places = [("one", 3), ("one", 6), ("two", 3), ("two", 6)]
    names = ["slow", "adam, tuned", "sgd, tuned"]
    assert [(row.cell, row.steps, row.optimizer) for row in rows] == [
        (*place, name) for place in places for name in names
    ]
    for i in range(0, len(rows), 3):
        slow, adam, sgd = rows[i : i + 3]
        assert adam.ratio == 1 and adam.sooner["adam"]["steps"] == 1
        assert adam.sooner["adam"]["time"] == 1 and sgd.sooner["sgd"]["steps"] == 1
        assert slow.ratio > 1 and slow.sooner["adam"]["steps"] < 1
        np.testing.assert_allclose(slow.sooner["adam"]["time"], slow.sooner["adam"]["steps"] / 2)
        assert baselines.parse(adam.setting) and slow.setting is None
        assert adam.test_ratio == pytest.approx(1) and slow.runs == 2
        # What is said of a whole search is said once.
        assert adam.notes == () or adam.steps == HORIZONS[-1]
        assert slow.trials == () and slow.by_validation is None
        check_trials(adam)
    summary = statistics.summarise(rows)
    assert [(row["optimizer"], row["steps"]) for row in summary[:3]] == [
        ("slow", 3),
        ("slow", 6),
        ("slow", "all"),
    ]
    adam = next(
        row for row in summary if row["optimizer"] == "adam, tuned" and row["steps"] == "all"
    )
    assert adam["steps/adam"] == adam["train no worse"] == 1
    assert (adam["diverged"], adam["runs"]) == (0, 8)
    assert summary[2]["cells"] == 4 and summary[2]["train no worse"] == 0


def check_trials(row):
    """All of a grid is in its row, and the best by either loss are what they are said to be."""
    assert len({trial.setting for trial in row.trials}) == 3 * 2  # Rates × schedules.
    named = {trial.setting: trial for trial in row.trials}
    assert row.train == pytest.approx(min(trial.train for trial in row.trials), rel=1e-4)
    assert named[row.setting].train == min(trial.train for trial in row.trials)
    chosen = named[row.by_validation.setting]
    assert chosen.validation == min(trial.validation for trial in row.trials)
    runs = row.by_validation.curves
    np.testing.assert_allclose(runs.validation_loss[:, -1].mean(), chosen.validation, rtol=1e-4)
    np.testing.assert_allclose(runs.test_loss[:, -1].mean(), chosen.test, rtol=1e-4)
    assert runs.validation_steps[-1] == row.steps


def flat(train, test) -> curves.Curves:
    """Two runs of four steps; a loss that is not finite is one of a run that diverged."""
    train, test = np.array([train]).T, np.array([test]).T
    losses = np.ones((2, 4)) * np.where(np.isfinite(train), 1, np.nan)
    accuracy, lost = np.ones((2, 1)), ~np.isfinite(train)
    return curves.Curves(losses, [4], train, test, accuracy, lost, [4], test)


def beside_adam(own, adam, monkeypatch):
    """The row of an optimizer whose runs are `own`, where tuned Adam's are `adam`."""
    monkeypatch.setattr(cache, "trained", lambda optimizer, theta, *a: adam if theta != () else own)
    return next(measure(cells=CELLS[:1], grids=GRIDS[:1]))


def test_a_test_split_is_compared_with_the_best_trial_by_it(timed, monkeypatch):
    """Which is another than the best by training loss, and by accuracy again another."""
    points = [
        tuning.Point(
            *("adam", 3, rate, "constant", 0.0, 0.0),
            *([train] * 2, [train] * 2, [test] * 2, [accuracy] * 2, [False] * 2),
        )
        for rate, train, test, accuracy in ((0.1, 1, 4, 0.5), (0.2, 2, 2, 0.6), (0.3, 3, 3, 0.9))
    ]
    by_train, by_test, by_accuracy = ({3: point} for point in points)
    tuned = tuning.Tuned(by_train, by_train, by_test, by_accuracy, points, [])
    monkeypatch.setattr(tuning, "tune", lambda *a, **k: tuned)
    own = flat([1.0, 1.0], [3.0, 5.0])._replace(test_accuracy=np.full((2, 1), 0.8))
    row = beside_adam(own, flat([1.0, 1.0], [1.0, 1.0]), monkeypatch)
    assert row.test_ratio == 4 / 2 and row.points == pytest.approx(100 * (0.8 - 0.9))


def test_a_variant_costs_what_its_optimizer_does(timed):
    """Its steps are not timed for themselves."""
    variant = Entry("slow, told nothing", SLOW.optimizer, variant_of="slow")
    slow, other = list(measure(cells=CELLS[:1], entries=(SLOW, variant), grids=()))[:2]
    assert other.variant_of == "slow" and other.seconds == slow.seconds == pytest.approx(4e-5)


def test_a_diverged_run_is_in_every_number(timed, monkeypatch):
    row = beside_adam(flat([1.0, np.nan], [1.0, np.inf]), flat([1.0, 1.0], [1.0, 1.0]), monkeypatch)
    assert np.isinf([row.train, row.test, row.area, row.ratio, row.test_ratio]).all()
    assert row.diverged == 1 and row.sooner["adam"]["steps"] == 0.5  # √(1 · ¼).


def test_losses_that_have_no_ratio_get_a_sentence(timed, monkeypatch):
    lost = flat([np.nan, np.nan], [np.nan, np.nan])
    row = beside_adam(lost, lost, monkeypatch)
    assert np.isnan(row.ratio) and row.train == np.inf
    assert "no run has a finite training loss" in statistics.without_ratio([row])[0]
    negative = beside_adam(flat([-2.0, 1.0], [1.0, 1.0]), flat([1.0, 1.0], [1.0, 1.0]), monkeypatch)
    assert np.isnan(negative.ratio) and negative.train == -0.5
    assert "negative" in statistics.without_ratio([negative])[0]


def test_progress_reaches_the_whole(measured):
    told = measured.told
    done = [share for share, _ in told]
    assert done == sorted(done) and told[-1] == (1.0, "done")
    assert "two, 3, 6 steps: adam, 6 steps, trial 6" in " ".join(text for _, text in told)


def test_what_was_measured_is_not_measured_again(timed, tmp_path, monkeypatch):
    calls = []
    compiled = curves.compile_evaluation

    def counted(*args, **kwargs):
        run = compiled(*args, **kwargs)
        return lambda *a: (calls.append(args[1].name), run(*a))[1]

    monkeypatch.setattr(curves, "compile_evaluation", counted)

    def stop(share, text):
        if "two" in text and "sgd" in text:
            raise KeyboardInterrupt

    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in measure(tmp_path, progress=stop):
            rows.append(row)
    assert {row.cell for row in rows} == {"one"} and calls
    half = len(calls)
    whole = list(measure(tmp_path))
    assert "quadratic-2" not in calls[half:] and "quadratic-3" in calls[half:]
    count = len(calls)
    monkeypatch.setattr(timing, "pace", None)  # Not called now.
    again = list(measure(tmp_path))
    assert len(calls) == count
    assert str(again) == str(whole) and str(whole[: len(rows)]) == str(rows)


def test_another_theta_is_another_result(tmp_path):
    family = registry.task(dict(name="quadratic", dimension=2, batch_size=3))
    key, adam = jax.random.key(0), baselines.grid("adam")

    def run(rate):
        problems = Problems(key, 2)
        return cache.trained(adam, baselines.setting(rate), family, (), problems, 3, tmp_path)

    first, other, again = run(0.1), run(0.2), run(0.1)
    assert len(list(tmp_path.iterdir())) == 2 and not np.array_equal(first.losses, other.losses)
    np.testing.assert_array_equal(first.losses, again.losses)
    assert again.losses.dtype == np.float32 and again.diverged.dtype == bool
    assert cache.digest(jnp.zeros(2)) != cache.digest(jnp.zeros((2, 1)))


def test_tables_say_what_is_missing(measured, tmp_path):
    rows = measured.rows[:3]
    arguments = dict(notes=["two: a note."], about={"seed": 1}, grids=GRIDS)
    text = report.write(tmp_path, rows, CELLS, HORIZONS, **arguments)
    assert "Not yet measured at 3 steps: two." in text
    assert "Not yet measured at 6 steps: one, two." in text
    table = (tmp_path / "table.md").read_text()
    assert table.count("not yet measured") == 3 and "- two: a note." in table
    spaces = "".join(f"- {grid.told()}\n" for grid in GRIDS)
    assert f"{report.LEGEND}\nThe spaces:\n\n{spaces}" in table
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["seed"] == 1 and len(content["rows"]) == 3
    two = dict(name="two", kind="data", task=CELLS[1].task, rows=None, scored=None)
    assert content["cells"][1] == two | {"horizons": [3, 6]}
    assert len(content["rows"][0]["each"]["train_loss"]) == 2
    assert "losses" not in content["rows"][0]["each"]
    slow, adam = content["rows"][:2]
    assert slow["by_validation"] is None and len(adam["trials"]) == 6
    assert set(adam["trials"][0]) == {"setting", "train", "validation", "test"}
    assert np.shape(adam["by_validation"]["each"]["validation_loss"]) == (2, 3)
    assert (tmp_path / "curves-3.png").read_bytes().startswith(b"\x89PNG")
    nothing = report.write(tmp_path / "n", [], CELLS, (3,))
    assert "Not yet measured at 3 steps: one, two." in nothing


def test_what_was_stored_makes_the_same_tables(measured, tmp_path):
    """The page of a directory has, of the JSON alone, the tables that the measurement wrote."""
    rows = measured.rows
    cells = (*CELLS, Cell("three", TASK, horizons=(7,)))
    more = dict(notes=["two: a note."], grids=GRIDS, about=ABOUT)
    text = report.write(tmp_path / "a", rows, cells, HORIZONS, **more)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "results.json").rename(tmp_path / "b" / "mine.json")
    paths = stored.regenerate(tmp_path / "b")
    assert [path.name for path in paths] == [
        "tables.md",
        "mine-scorecard.png",
        "mine-profile.png",
        "mine-trials.png",
    ]
    page, table = paths[0].read_text(), (tmp_path / "a" / "table.md").read_text()

    def tables(text):
        lines = text.replace(report.LEGEND, "").splitlines()
        return [line for line in lines if line.startswith(("|", "- "))]

    assert tables(page) == tables(table) and "Not yet measured at 7 steps: three." in page
    assert "`python -m l2l.evaluate --optimizer=slow`" in page and "scorecard.png" in text
    read, found, _ = stored.read(tmp_path / "b" / "mine.json")
    assert str(read[0]._replace(curves=None)) == str(rows[0]._replace(curves=None))
    assert [cell.steps(()) for cell in found] == [(3, 6), (3, 6), (7,)]


def test_numbers_come_back_from_json():
    numbers = {"a": [1.5, math.nan, math.inf], "b": (-math.inf, {"c": 0.1})}
    again = stored._numbers(json.loads(json.dumps(report.plain(numbers), allow_nan=False)))
    assert str(again) == str({"a": tuple(numbers["a"]), "b": numbers["b"]})


def test_what_is_no_result_is_told(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        stored.page(tmp_path)
    for content in ("{", "{}", "[]", '{"rows": [{}], "cells": []}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(UserError, match="that this version of l2l wrote"):
            stored.page(tmp_path)


ABOUT = dict(command=["x", "--optimizer=slow"], seeds=2, seed=0, seconds=1.5, versions={"jax": "1"})


def test_columns_that_say_nothing_are_left_out(timed, tmp_path):
    rows = list(measure(cells=CELLS[:1], grids=(), timed=False))
    text = report.write(tmp_path, rows, CELLS[:1], HORIZONS, draw=False)
    header = next(line for line in text.splitlines() if line.startswith("| cell"))
    columns = [part.strip() for part in header.strip("|").split("|")]
    assert columns == ["cell", "kind", "optimizer", "train", "test", "area", "diverged"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite=scorcard"], "did you mean 'scorecard'"),
        (["--suite=quick", "--task=mlp", "--set", "hidden=3"], "leave out --task, --set."),
        (["--suite=quick", "--baseline=adm"], "did you mean 'adam'"),
        (["--suite=models", "--baseline=soap"], "There is no rival in the suite named 'soap'"),
        (["--suite=quick", "--horizons=0"], "are not numbers of steps"),
        (["--suite=quick", "--horizons=2e2"], "are not numbers of steps"),
        (["--suite=quick", "--cells=mpl"], "did you mean 'mlp'"),
        (["--suite=quick", "--cells="], "--cells= names no cell: choose from mlp, mlp 4x wider"),
        (["--suite=scorecard", "--cells=fashion"], "None of these cells can be measured here"),
        (["--vary=dimension="], "--vary=dimension= has no value: write it like dimension=64,128"),
        (["--seed=99999999999999999999999"], "range [0, 4294967295]"),
        (["--seed=-1"], "range [0, 4294967295]"),
        (["--eps_root=-1"], "--eps_root=-1: -1.0 is not a non-negative number"),
        (["--suite=quick", "--budget=2"], "is not a duration"),
        (["--budget=2h", "--cells=mlp"], "--cells and --budget choose among the cells of a suite"),
        (["--from=docs", "--suite=quick"], "leave out"),
    ],
)
def test_bad_input_gets_one_clear_sentence(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(environment, "prepare", lambda: None)  # This process is the tests' own.
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    argv = ["evaluate", *arguments, f"--output={tmp_path}"]
    assert cli.main(argv, sections.settings_of) == 2
    out, said = capsys.readouterr()
    assert message in said and len(said.strip().splitlines()) == 1 and not out


def test_a_suite_is_measured_beside_those_of_its_rivals_that_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "prepare", lambda: None)
    argv = ["evaluate", "--optimizer=sgd(0.1)", "--suite=quick", "--cells=breast cancer"]
    argv += ["--horizons=3", "--seeds=1", "--baseline=prodigy", f"--output={tmp_path}"]
    assert cli.main(argv, sections.settings_of) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["optimizer"] for row in rows] == ["sgd(0.1)", "prodigy, tuned"]


def test_the_code_of_bad_input_is_that_of_the_process():
    command = [sys.executable, "-m", "l2l.evaluate", "--suite=scorcard"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("l2l: ") and not done.stdout
