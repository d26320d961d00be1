"""Suites: definitions against closed forms, cells that build, runs that go on after a stop."""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base
from l2l.data import datasets
from l2l.evaluation import baselines, cache, scoring, tuning
from l2l.evaluation import comparison as scorecard
from l2l.evaluation import curves as evaluate
from l2l.evaluation import suites as suite
from l2l.evaluation import timing as speed
from l2l.tasks import registry


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
    np.testing.assert_allclose(speed.speed_up(quick, slow), [steps / smaller])
    np.testing.assert_allclose(speed.speed_up(slow, quick), [smaller / steps])


def test_speed_up_is_symmetric_and_one_for_itself():
    draws = np.random.RandomState(0)
    a, b = (np.exp(-np.linspace(0, 3, 200) + 0.3 * draws.randn(4, 200)) for _ in range(2))
    np.testing.assert_array_equal(speed.speed_up(a, a), np.ones(4))
    np.testing.assert_allclose(speed.speed_up(a, b) * speed.speed_up(b, a), np.ones(4))
    assert not np.array_equal(speed.speed_up(a, b), np.ones(4))


def test_a_run_that_diverges_is_as_slow_as_can_be():
    good, worse, bad = descent(0.5, 10), descent(-0.1, 10), descent(0.5, 10)
    bad[0, 7] = np.nan
    for diverged in (worse, bad * np.where(np.arange(10) < 7, 1, np.nan)):
        np.testing.assert_array_equal(speed.speed_up(diverged, good), [0.1])
        np.testing.assert_array_equal(speed.speed_up(good, diverged), [10.0])
        np.testing.assert_array_equal(speed.speed_up(diverged, diverged), [1.0])


def test_smoothing_is_a_trailing_mean():
    losses = np.random.RandomState(1).rand(2, 100)
    truth = [[row[max(0, t - 4) : t + 1].mean() for t in range(100)] for row in losses]
    np.testing.assert_allclose(speed.smooth(losses), truth)
    losses[0, 50] = np.inf
    assert np.isinf(speed.smooth(losses)[0]).sum() == 5


def test_ratios_count_what_is_not_finite_or_too_small():
    got = speed.ratios([np.nan, 1.0, np.inf, 0.0, 0.0], [1.0, np.inf, np.nan, 1e-9, 2.0])
    np.testing.assert_array_equal(got, [np.inf, 0, 1, 1, 1e-8 / 2])


def test_the_interval_is_students():
    # Logarithms −1, 0, 1: mean 0, deviation 1, t(0.975, 2) = 4.3027, so exp(± 4.3027 / √3).
    middle, low, high = speed.interval(np.exp([-1.0, 0.0, 1.0]))
    np.testing.assert_allclose(
        (middle, low, high), np.exp(np.array([0, -1, 1]) * 4.302653 / 3**0.5), rtol=1e-5
    )
    assert np.isinf(speed.interval([1.0, np.inf])[0]) and np.isnan(speed.interval([2.0])[1])


def test_seconds_of_a_step():
    family, data = suite.load("logistic")
    field = {
        "one": (base.fixed(optax.sgd(0.1)), ()),
        "adam": (baselines.grid("adam"), baselines.setting(1e-3)),
    }
    took = speed.step_seconds(jax.random.key(0), field, family, data, steps=2, rounds=3)
    assert set(took) == set(field) and all(0 < x < 1 for x in took.values())


# --- the table of cells ----------------------------------------------------------------------


@pytest.mark.parametrize("name", suite.CELLS)
def test_every_cell_takes_a_step(name):
    dataset = suite.dataset_of(name)
    if dataset in datasets.SPECS and not datasets.present(dataset):
        pytest.skip(f"{dataset} is not present below {datasets.data_dir()}")
    assert suite.CELLS[name].kind in suite.KINDS and suite.CELLS[name].cost > 0
    family, data = suite.load(name)

    @jax.jit
    def step(key, data):
        problem = family.sample(key)
        params = family.init(key, problem)
        batch = family.batch(key, problem, data, "train")
        loss, gradient = jax.value_and_grad(family.loss)(params, problem, batch)
        return loss, optax.tree.norm(gradient)

    loss, norm = step(jax.random.key(0), data)
    assert np.isfinite(loss) and norm > 0


def test_the_names_in_suites_are_cells():
    for one in suite.SUITES.values():
        assert set(one.cells) <= set(suite.CELLS) and one.seeds >= 5
        assert all(baselines.kind(kind) for kind in one.grids)
    assert {suite.CELLS[name].kind for name in suite.SUITES["scorecard"].cells} == set(suite.KINDS)
    needs_nothing = [suite.dataset_of(name) for name in suite.SUITES["quick"].cells]
    assert set(needs_nothing) <= {"digits", "breast_cancer"}


def test_new_activations_are_in_no_default_mixture():
    from l2l.tasks import supervised

    assert not {"silu", "sin"} & set(supervised.DIVERSE)


def test_absent_data_are_told_and_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    cells, notes = suite.available(("mlp", "adult", "fashion", "mnist", "regression"))
    assert cells == ("mlp", "breast cancer", "regression")
    assert "adult: skipped: adult is not present below" in notes[0]
    assert "breast cancer in its place" in notes[0] and len(notes) == 3


def test_short_horizons_come_first_and_cheap_cells_before_dear_ones():
    order = suite.plan(("conv", "logistic"), (10_000, 1_000, 200))
    assert order == [
        ((200, 1_000), "logistic"),
        ((200, 1_000), "conv"),
        ((10_000,), "logistic"),
        ((10_000,), "conv"),
    ]
    assert suite.plan(("conv",), (20_000,)) == [((20_000,), "conv")]
    costs = [suite.estimate(part, suite.find("scorecard"), 6, 1) for part in order]
    assert costs[2] > costs[0] and costs[3] > costs[2] > 0


@pytest.mark.parametrize(
    "seconds, text", [(5, "5 seconds"), (600, "10 minutes"), (36_000, "10 hours")]
)
def test_durations(seconds, text):
    assert suite.duration(seconds) == text


# --- measuring -------------------------------------------------------------------------------

TINY = suite.Suite(("one", "two"), (3, 6), 2, {"adam": (0.0,), "sgd": (0.0,)})
PARTS = [((3, 6), "one"), ((3, 6), "two")]


@pytest.fixture
def tiny_suite(monkeypatch):
    """Two cells of quadratics, grids of three rates."""
    tune = tuning.tune
    task = dict(name="quadratic", dimension=2, batch_size=3)
    cells = {name: suite.Item("data", task, 1.0, 1.0) for name in TINY.cells}
    cells["two"] = cells["two"]._replace(task=task | {"dimension": 3})
    for name, item in cells.items():
        monkeypatch.setitem(suite.CELLS, name, item)
    few = dict(rates=(1e-2, 1e-1, 3), extensions=0)
    monkeypatch.setattr(tuning, "tune", functools.partial(tune, **few))
    monkeypatch.setattr(
        speed, "step_seconds", lambda key, field, *a: dict.fromkeys(field, 2e-5) | {"slow": 4e-5}
    )


def measure(directory=None, **more):
    entries = [scorecard.Entry("slow", optax.sgd(1e-3))]
    return suite.measure(jax.random.key(0), entries, TINY, PARTS, 2, cache_dir=directory, **more)


def live() -> int:
    """Compiled programs of this process."""
    return len(jax.local_devices()[0].client.live_executables())


def test_a_baseline_beside_itself_is_even(tiny_suite):
    evaluate.forget()
    before, results, compiled = live(), [], []
    for result in measure():
        results.append(result)
        compiled.append(live() - before)
    # Programs go with their cell: a process has room for some hundreds.
    assert compiled[0] >= 2 and compiled[-1] <= 1.5 * compiled[0] and live() == before
    assert [(r.cell, r.steps) for r in results] == [("one", 3), ("one", 6), ("two", 3), ("two", 6)]
    for result in results:
        slow, adam, sgd = scoring.rows(result)
        assert [row["optimizer"] for row in (slow, adam, sgd)] == [
            "slow",
            "adam, tuned",
            "sgd, tuned",
        ]
        assert adam["ratio"] == 1 and adam["sooner"]["adam"]["steps"] == 1
        assert adam["sooner"]["adam"]["time"] == 1 and sgd["sooner"]["sgd"]["steps"] == 1
        assert slow["ratio"] > 1 and slow["sooner"]["adam"]["steps"] < 1
        np.testing.assert_allclose(
            slow["sooner"]["adam"]["time"], slow["sooner"]["adam"]["steps"] / 2
        )
        assert baselines.parse(adam["setting"]) and slow["setting"] is None
        assert adam["test ratio"] == pytest.approx(1) and slow["runs"] == 2
    summary = scoring.summarise([row for result in results for row in scoring.rows(result)])
    assert [(row["optimizer"], row["steps"]) for row in summary[:3]] == [
        ("slow", 3),
        ("slow", 6),
        ("slow", "all"),
    ]
    adam = next(
        row for row in summary if row["optimizer"] == "adam, tuned" and row["steps"] == "all"
    )
    assert adam["steps/adam"] == adam["train no worse"] == 1 and adam["diverged"] == "0/8"
    assert summary[2]["cells"] == 4 and summary[2]["train no worse"] == 0


def test_a_diverged_run_is_in_every_number():
    losses = np.ones((2, 4))
    fine = evaluate.Curves(losses, [4], *3 * (np.ones((2, 1)),), np.zeros((2, 1), bool))
    bad = fine._replace(
        losses=losses * np.array([[1.0], [np.nan]]),
        train_loss=np.array([[1.0], [np.nan]]),
        test_loss=np.array([[1.0], [np.inf]]),
        diverged=np.array([[False], [True]]),
    )
    field = {
        "bad": suite.Contender(bad, 1.0, None),
        "adam, tuned": suite.Contender(fine, 1.0, "adam"),
    }
    row, _ = scoring.rows(suite.Result("one", "data", 4, field, {"adam": 1.0}, []))
    assert np.isinf([row["train"], row["test"], row["area"], row["ratio"], row["test ratio"]]).all()
    assert row["diverged"] == 1 and row["sooner"]["adam"]["steps"] == 0.5  # √(1 · ¼).


def test_progress_reaches_the_estimate(tiny_suite):
    told = []
    list(measure(progress=lambda *a: told.append(a)))
    done = [a[0] for a in told]
    assert done == sorted(done) and told[-1][0] == told[-1][1]
    assert "two, 3, 6 steps: adam cosine" in " ".join(a[2] for a in told)


def test_what_was_measured_is_not_measured_again(tiny_suite, tmp_path, monkeypatch):
    calls = []
    compiled = evaluate.compile_evaluation

    def counted(*args, **kwargs):
        run = compiled(*args, **kwargs)
        return lambda *a: (calls.append(args[1].name), run(*a))[1]

    monkeypatch.setattr(evaluate, "compile_evaluation", counted)

    def stop(done, total, text):
        if "two" in text and "sgd" in text:
            raise KeyboardInterrupt

    results = []
    with pytest.raises(KeyboardInterrupt):
        for result in measure(tmp_path, progress=stop):
            results.append(result)
    assert {r.cell for r in results} == {"one"} and calls
    half = len(calls)
    whole = list(measure(tmp_path))
    assert "quadratic-2" not in calls[half:] and "quadratic-3" in calls[half:]
    count = len(calls)
    monkeypatch.setattr(speed, "step_seconds", None)  # Not called now.
    again = list(measure(tmp_path))
    assert len(calls) == count
    shown = [str(list(map(scoring.rows, part))) for part in (again, whole, whole[:2], results)]
    assert shown[0] == shown[1] and shown[2] == shown[3]


def test_another_theta_is_another_result(tmp_path):
    family = registry.task(dict(name="quadratic", dimension=2, batch_size=3))
    key, adam = jax.random.key(0), baselines.grid("adam")

    def run(rate):
        return cache.curves(key, adam, baselines.setting(rate), family, (), 2, 3, tmp_path)

    first, other, again = run(0.1), run(0.2), run(0.1)
    assert len(list(tmp_path.iterdir())) == 2 and not np.array_equal(first.losses, other.losses)
    np.testing.assert_array_equal(first.losses, again.losses)
    assert again.losses.dtype == np.float32 and again.diverged.dtype == bool
    assert cache.digest(jnp.zeros(2)) != cache.digest(jnp.zeros((2, 1)))


def test_tables_say_what_is_missing(tiny_suite, tmp_path):
    results = [next(measure())]
    arguments = (tmp_path, results, TINY, TINY.cells, (3, 6), ["two: a note."], {"seed": 1})
    text = scoring.write(*arguments)
    assert "Not yet measured at 3 steps: two." in text
    assert "Not yet measured at 6 steps: one, two." in text
    table = (tmp_path / "table.md").read_text()
    assert table.count("not yet measured") == 3 and "- two: a note." in table
    assert "geometric mean" in table  # The legend.
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["seed"] == 1 and len(content["rows"]) == 3
    assert content["tasks"]["one"]["task"]["dimension"] == 2
    for name in ("scorecard.png", "curves-3.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    nothing = scoring.write(tmp_path / "n", [], TINY, TINY.cells, (3,), [], {})
    assert "Not yet measured at 3 steps: one, two." in nothing


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--suite=scorcard"], "did you mean 'scorecard'"),
        (["--suite=quick", "--task=mlp", "--set", "hidden=3"], "leave out --task, --set."),
        (["--suite=quick", "--baseline=none"], "leave out --baseline."),
        (["--suite=quick", "--horizons=0"], "are no steps"),
        (["--suite=quick", "--horizons=2e2"], "are no steps"),
    ],
)
def test_bad_input_gets_one_clear_sentence(tmp_path, arguments, message):
    command = [sys.executable, "-m", "l2l.evaluate", *arguments, f"--output={tmp_path}"]
    env = dict(os.environ, JAX_PLATFORMS="cpu")
    out = subprocess.run(command, env=env, capture_output=True, text=True)
    assert out.returncode == 2 and message in out.stderr
    assert len(out.stderr.strip().splitlines()) == 1 and not out.stdout
