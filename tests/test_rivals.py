"""What a learned optimizer is set beside: random trials of baselines, its untrained twin, itself
told other things, and transformations of anybody's."""

import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base
from l2l.evaluation import comparison, entries, report, stored, trials, tuning, untrained
from l2l.evaluation.cells import Cell
from l2l.evaluation.comparison import Entry, Trial
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid
from l2l.optimizers import lstm
from l2l.optimizers.adam import learned_adam

# --- random trials ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(1, 8))
def test_the_expected_best_is_the_mean_over_all_subsets(count):
    losses = np.random.RandomState(0).rand(7).round(1)  # Some of them equal.
    brute = np.mean([min(subset) for subset in itertools.combinations(losses, count)])
    assert trials.best_of(losses, count) == pytest.approx(brute)


def test_trials_that_failed_count_where_they_are_the_best():
    # Of {1, 2, ∞} the pairs are led by 1, 1 and 2; a single trial may be the infinite one.
    assert trials.best_of([math.inf, 1.0, 2.0], 2) == pytest.approx(4 / 3)
    assert trials.best_of([math.inf, 1.0, 2.0], 1) == math.inf
    for count in (0, 4):
        with pytest.raises(ValueError, match="no subset"):
            trials.best_of([1.0, 2.0, 3.0], count)


def row(optimizer, train, validation, tried=(), cell="a", start=8.0, **more):
    curves = SimpleNamespace(validation_loss=np.array([[9.0, validation]]))
    setting = "adam()" if tried else None
    tried = tuple(Trial(str(i), *pair, 0.0) for i, pair in enumerate(tried))
    own = dict(variant_of=None, multiplier=None, by_validation=None, steps=4) | more
    return SimpleNamespace(
        **own, optimizer=optimizer, train=train, curves=curves, setting=setting, trials=tried,
        cell=cell, start=start,
    )  # fmt: skip


def test_how_many_trials_match_is_the_closed_form():
    # Training losses 1, 2, 3, and one that blew up and counts as 8, the loss at the start. The best
    # of one is 14/4; of two (1·3 + 2·2 + 3·1)/6 = 10/6; of three (1·3 + 2·1)/4 = 5/4; of four 1.
    tried = [(2.0, 0.5), (math.inf, math.inf), (1.0, 4.0), (3.0, 4.0)]
    twin = row("mine, untrained", 1.0, 1.0, variant_of="mine", multiplier=1.0)
    rows = [row("mine", 1.25, 0.1), twin, row("adam, tuned", 1.0, 0.5, tried)]
    train, validation = trials.matches(rows)
    assert (train.optimizer, train.baseline, train.loss) == ("mine", "adam", "train")
    np.testing.assert_allclose(train.ratios, np.array([14 / 4, 10 / 6, 5 / 4, 1]) / 1.25)
    assert train.needed == 3 and validation.needed == math.inf
    np.testing.assert_allclose(validation.ratios[0], (0.5 + 4 + 4 + 8) / 4 / 0.1)
    first, second = trials.summary([train, validation])
    assert first["trials to match"] == 3 and second["trials to match"] == "> 4"
    assert (first["matched by 1"], first["never matched"], second["never matched"]) == (0, 0, 1)
    assert first["best of 1"] == pytest.approx(14 / 5) and first["best of 4"] == 0.8
    assert "best of 5" not in first


def test_a_trial_that_failed_kept_the_start_of_its_own_runs():
    """Which is not that of an optimizer that begins with parameters it has learned."""
    rows = [row("mine", 2.0, 1.0, start=0.5), row("adam, tuned", 3, 3, [(math.inf, 3.0)])]
    np.testing.assert_allclose(trials.matches(rows)[0].ratios, [8.0 / 2.0])


def test_trials_over_cells_are_geometric_means_and_medians():
    rows = []
    for cell, own in (("a", 1.0), ("b", 2.0), ("c", 8.0)):
        rows += [
            row("mine", own, 1.0, cell=cell),
            row("adam, tuned", 2, 2, [(2, 2)] * 3, cell=cell),
        ]
    found = trials.matches(rows)
    summary = trials.summary(found)[0]
    assert summary["best of 1"] == pytest.approx((2 * 1 * 0.25) ** (1 / 3))
    assert summary["matched by 1"] == pytest.approx(2 / 3) and summary["trials to match"] == 1
    curve = trials.curve(found, "mine", "adam", "train")
    np.testing.assert_allclose(curve, [0.5 ** (1 / 3)] * 3)


# --- the untrained twin ----------------------------------------------------------------------


def test_the_best_rate_is_one_for_all_cells():
    """Of × 0.1, 1 and 3: in "a" 3 is best by far, in "b" 0.1 by little, so that 3 it is."""
    losses = {"a": {0.1: 1.2, 1.0: 1.0, 3.0: 0.25}, "b": {0.1: 0.9, 1.0: 1.0, 3.0: 2.0}}
    twins = [
        row("x", 0.0, loss, cell=cell, variant_of="mine", multiplier=m)
        for cell, by in losses.items()
        for m, loss in by.items()
    ]
    for twin in twins:
        twin._replace = lambda optimizer, twin=twin: SimpleNamespace(
            **{**vars(twin), "optimizer": optimizer}
        )
    other = row("adam", 1.0, 1.0)
    kept, notes = untrained.with_best_rates([other, *twins])
    assert kept[0] is other and [r.multiplier for r in kept[1:3]] == [1.0, 1.0]
    assert [(r.optimizer, r.multiplier) for r in kept[3:]] == [
        ("mine, untrained, best rate", 3.0)
    ] * 2
    assert "× 0.1, 1, 3 the best for all is × 3." in notes[0]
    # Only where all were measured: of "b" the last is still to come.
    kept, _ = untrained.with_best_rates(twins[:5])
    assert kept[-1].multiplier == 3.0
    assert untrained.with_best_rates([other]) == ([other], [])


def walk(optimizer, num_steps=None, count=3):
    """The positions of a descent on Σ x⁴."""
    x = jnp.asarray([1.0, -0.5])
    state, path = optimizer.init(x), []
    for _ in range(count):
        updates, state = optimizer.update(4 * x**3, state, x, num_steps=num_steps)
        x = optax.apply_updates(x, updates)
        path.append(x)
    return jnp.stack(path)


def test_a_twin_has_the_first_theta_and_a_multiple_of_its_rate():
    optimizer = learned_adam(learning_rate=0.02)
    trained = {**optimizer.init(jax.random.key(0)), "log_learning_rate": jnp.float32(0)}
    twins = entries.variants(Entry("mine", optimizer, trained), told=(1.0,))
    assert [twin.multiplier for twin in twins] == list(entries.MULTIPLIERS)
    assert [twin.name for twin in twins] == [
        *("mine, untrained × 0.3", "mine, untrained", "mine, untrained × 3")
    ]
    for twin in twins:
        bound, theta = twin.at(10)
        truth = optax.adam(0.02 * twin.multiplier, eps_root=1e-8)
        # Its decays are sigmoids of theta, rounded.
        own = walk(bound.bind(theta))
        np.testing.assert_allclose(own, walk(with_extras(truth)), rtol=1e-4, atol=1e-5)
    assert entries.variants(Entry("adam", optax.adam(0.1)), told=(0.0,)) == []


with_extras = optax.with_extra_args_support


def listening():
    """An optimizer that moves by the number of steps that it is told."""

    def update(updates, state, params=None, *, num_steps=0, **extra_args):
        return jax.tree.map(lambda g: jnp.full_like(g, num_steps), updates), state

    transform = optax.GradientTransformationExtraArgs(lambda params: (), update)
    return base.LearnedOptimizer(lambda key: (), lambda theta: transform)


@pytest.mark.parametrize("name, heard", [("right", 200), ("third", 67), ("nothing", 0)])
def test_what_an_optimizer_is_told(name, heard):
    share = entries.TOLD[name]
    entry = Entry("mine", listening(), ())
    told = [e for e in (entry, *entries.variants(entry, (share,), ())) if e.told == share]
    assert [e.name for e in told] == ["mine" if name == "right" else f"mine, told {name}"]
    optimizer, theta = told[0].at(200)
    x = jnp.zeros(2)
    moved, _ = optimizer.bind(theta).update(x, (), x, num_steps=jnp.int32(200))
    np.testing.assert_array_equal(moved, [heard, heard])


def test_a_learned_optimizer_runs_without_being_told_its_length():
    optimizer = lstm.lstm(hidden_size=2)
    entry = Entry("mine", optimizer, optimizer.init(jax.random.key(0)))
    (told,) = entries.variants(entry, told=(0.0,), multipliers=())
    assert jnp.isfinite(walk(told.at(3)[0].bind(entry.theta), jnp.int32(3))).all()


# --- transformations of anybody's ------------------------------------------------------------

FILE = """
import optax
calls = []
def plain(learning_rate=0.1):
    return optax.sgd(learning_rate)
def told(num_steps, scale=1.0):
    calls.append(num_steps)
    return optax.sgd(scale / num_steps)
def needs(learning_rate):
    return optax.sgd(learning_rate)
def wrong():
    return 3
def broken():
    raise RuntimeError("theirs")
made = optax.sgd(0.5)
number = 3
"""


@pytest.fixture
def place(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    "typed, rate",
    [
        ("plain", 0.1),
        ("plain(0.2)", 0.2),
        ("told", 1 / 50),
        ("told(scale=2)", 2 / 50),
        ("needs(learning_rate=0.3)", 0.3),
        ("made", 0.5),
    ],
)
def test_a_function_of_anybody_is_an_optimizer(place, typed, rate):
    entry = entries.read(f"{place}:{typed}")
    optimizer, theta = entry.at(50)
    assert entry.name == f"{place}:{typed}" and theta == ()
    np.testing.assert_allclose(
        walk(optimizer.bind(theta)), walk(with_extras(optax.sgd(rate))), rtol=1e-6
    )


def test_an_installed_function_is_an_optimizer():
    optimizer, theta = entries.read("optax.contrib:ademamix(1e-2)").at(9)
    truth = with_extras(optax.contrib.ademamix(1e-2))
    np.testing.assert_allclose(walk(optimizer.bind(theta)), walk(truth), rtol=1e-6)


@pytest.mark.parametrize(
    "typed, sentence",
    [
        ("nobody_has.this:one", "could not be imported .*nobody_has.* package.module:function"),
        ("optax:adamm", "no adamm there: did you mean adam?"),
        ("{}:neds", "no neds there: did you mean needs?"),
        (
            "{}:needs",
            "cannot be called with no arguments .*learning_rate.*needs\\(learning_rate=1e-3\\)",
        ),
        ("{}:plain(speed=3)", "cannot be called with \\(speed=3\\)"),
        ("{}:number", "is 3, which is not a function"),
        ("{}:wrong", "returned int, not an optax transformation"),
        ("nowhere.py:one", "nowhere.py could not be imported: no such file"),
    ],
)
def test_what_is_no_optimizer_gets_one_sentence(place, typed, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        entries.read(typed.format(place)).at(9)
    assert "\n" not in str(error.value)


def test_a_bug_of_theirs_keeps_its_traceback(place):
    with pytest.raises(RuntimeError, match="theirs"):
        entries.read(f"{place}:broken").at(9)


# --- all of it -------------------------------------------------------------------------------


def test_tables_and_figures_of_all_of_it(tmp_path, place):
    cells = [
        Cell(name, dict(name="quadratic", dimension=size, batch_size=3), "data")
        for name, size in (("one", 2), ("two", 3))
    ]
    optimizer = learned_adam(learning_rate=0.02)
    mine = Entry("mine", optimizer, optimizer.init(jax.random.key(1)))
    field = [mine, *entries.variants(mine, (0.0,), (1.0, 3.0)), entries.read(f"{place}:told")]
    grid = Grid("adam", (1e-2, 1e-1, 3), extensions=0)
    problems = Problems(jax.random.key(0), 2)
    rows = list(comparison.measure(field, cells, (4,), problems, grids=(grid,)))
    names = ["mine", "mine, told nothing", "mine, untrained", "mine, untrained × 3"]
    names += [f"{place}:told", "adam, tuned"]
    assert [r.optimizer for r in rows] == names * 2
    # This one heeds neither its length nor its weights, which are those it began with.
    assert rows[0].train == rows[1].train and rows[2].train == pytest.approx(rows[0].train)
    text = report.write(tmp_path / "out", rows, cells, (4,), about=ABOUT)
    assert "## Trials to match" in text and "mine, untrained, best rate" in text
    assert "untrained × 3" not in text
    for name in ("trials.png", "trials-2.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    again, _, _ = stored.read(tmp_path / "out" / "results.json")
    assert [(r.optimizer, r.variant_of, r.multiplier, r.told) for r in again] == [
        (r.optimizer, r.variant_of, r.multiplier, r.told) for r in rows
    ]
    page, _ = stored.page(tmp_path / "out")
    assert text.split("## Trials to match")[1].split("\n\n")[1] in page
    assert tuning.TRIALS == 30


ABOUT = dict(command=["x"], seeds=2, seed=0, seconds=1.0, versions={})
