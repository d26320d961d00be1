"""From cells to one number, against closed forms on rows made by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from l2l.evaluation import aggregate, report

STEPS = np.arange(10, 210, 10)


def runs(losses, steps=STEPS):
    """Of one problem, or of several [n, v]."""
    return SimpleNamespace(
        validation_steps=steps,
        validation_loss=np.broadcast_to(losses, (len(np.atleast_2d(losses)), len(steps))),
    )


def row(optimizer, losses, *, cell="a", kind="data", ratio=1.0, train=1.0, seconds=1.0, best=None):
    """A row; `best` are the validation losses of a baseline's setting that is best by them."""
    chosen = None if best is None else SimpleNamespace(curves=runs(best))
    return SimpleNamespace(
        **dict(cell=cell, kind=kind, steps=200, optimizer=optimizer, train=train, ratio=ratio),
        **dict(seconds=seconds, curves=runs(losses), by_validation=chosen),
    )


def scored(*rows):
    return {one.optimizer: one for one in aggregate.score(rows)}


def test_steps_to_the_target_are_the_closed_form():
    # Losses exp(−rate t). The reference ends at exp(−0.01 · 200) = exp(−2). At twice the rate
    # that is reached at t = 100; at half of it never, and the reference has its end, exp(−1), at
    # t = 100 too, where it itself took 200.
    fast, slow, adam = (
        np.exp(-rate * STEPS) * (1 + e) for rate, e in ((0.02, -1e-9), (0.005, 0), (0.01, 0))
    )
    found = scored(
        row("fast", fast, seconds=4.0),
        row("slow", slow, seconds=0.5),
        # The setting that is best by training loss, which does not count here, is a bad one.
        row("adam, tuned", np.ones(20), best=adam, seconds=1.0),
    )
    assert (found["fast"].cost, found["fast"].sooner) == (100, 2)
    assert (found["fast"].time, found["fast"].quicker) == (400, 0.5)
    assert (found["slow"].cost, found["slow"].sooner) == (math.inf, 0.5)
    assert found["slow"].quicker == 1
    assert found["adam, tuned"][4:] == (200, 200, 1, 1, 1, 1, 1)
    assert found["fast"].validation == pytest.approx(math.exp(-2), rel=1e-6)
    assert found["slow"].validation == pytest.approx(math.exp(1))


def test_what_was_not_timed_has_no_time():
    adam = np.exp(-0.01 * STEPS)
    rows = (
        row("own", adam, seconds=math.nan),
        row("adam, tuned", adam, best=adam, seconds=math.nan),
    )
    scores = aggregate.score(rows)
    assert [(s.sooner, s.cost) for s in scores] == [(1, 200)] * 2
    assert np.isnan([(s.quicker, s.time) for s in scores]).all()
    lines = report.over_cells(scores).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| optimizer"))
    names, _, *shown = ([x.strip() for x in line.split("|")] for line in lines[start : start + 4])
    assert [x[names.index("target in time")] for x in shown] == ["–", "–"]


def test_a_reference_that_overfits_is_even_with_itself():
    # Its end is reached on the way down already, at step 50, and an optimizer is not quicker for
    # that: it is there at 100.
    dip = np.concatenate([np.linspace(2, 1, 5), np.linspace(0.5, 1, 15)])
    late = np.concatenate([np.full(9, 2.0), np.full(11, 0.9)])
    found = scored(row("late", late), row("adam, tuned", dip, best=dip))
    assert found["adam, tuned"].sooner == 1 and found["adam, tuned"].cost == 50
    assert found["late"].sooner == 0.5 and found["late"].cost == 100


def test_means_over_problems_and_runs_that_diverge():
    adam = np.stack([np.linspace(2, 1, 20), np.linspace(4, 1, 20)])
    lost = np.ones((2, 20))
    lost[1, 3:] = np.nan
    found = scored(row("lost", lost), row("adam, tuned", adam, best=adam))
    # The mean of Adam's ends is 1, which the other has at the first measurement.
    assert found["lost"].cost == 10 and found["lost"].validation == math.inf
    lost[:] = np.nan
    found = scored(row("lost", lost), row("adam, tuned", adam, best=adam))
    # All 200 steps for what Adam has at the first measurement, a finite loss.
    assert (found["lost"].cost, found["lost"].sooner) == (math.inf, 1 / 20)
    found = scored(row("fine", adam), row("adam, tuned", lost, best=lost))
    assert (found["fine"].cost, found["fine"].sooner) == (10, 20)
    assert (found["adam, tuned"].cost, found["adam, tuned"].sooner) == (math.inf, 1)


@pytest.mark.parametrize("train, expected", [(2e-4, 0.1), (5e-5, 0.5)])
def test_a_training_loss_next_to_nothing_is_judged_by_the_validation_loss(train, expected):
    adam = np.full(20, 2.0)
    for own, other in ((train, 1.0), (1.0, train)):
        rows = (
            row("own", np.full(20, 1.0), ratio=0.1, train=own),
            row("adam, tuned", adam, best=adam, train=other),
        )
        one = scored(*rows)["own"]
        assert (one.train, one.validation, one.judged) == (0.1, 0.5, expected)


def test_rows_without_a_baseline_have_no_score():
    assert aggregate.score([row("own", np.ones(20))]) == []
    adam = row("adam, tuned", np.ones(20), best=np.ones(20), cell="b")
    assert [s.cell for s in aggregate.score([row("own", np.ones(20)), adam])] == ["b"]


def test_the_interquartile_mean_leaves_a_quarter_out_at_either_end():
    # Logarithms to base 2: 0 … 7, of which 2 … 5 count.
    values = {str(k): [2.0**k] for k in (7, 0, 3, 1, 5, 2, 6, 4)}
    middle, low, high = aggregate.interquartile(values)
    assert middle == pytest.approx(2 ** np.mean([2, 3, 4, 5]))
    assert low < middle < high
    # Neither a cell without a number nor what the outer ones are changes it.
    values |= {"0": [0.0], "7": [math.inf], "none": [math.nan]}
    assert aggregate.interquartile(values)[0] == pytest.approx(middle)
    # Horizons of a cell are one number of it: √(2 · 8) = 4.
    assert aggregate.interquartile({"a": [2.0, 8.0], "b": [4.0]}) == pytest.approx((4, 4, 4))
    assert aggregate.interquartile({"a": [3.0]})[0] == pytest.approx(3)
    assert np.isnan(aggregate.interquartile({"a": [3.0]})[1:]).all()
    assert np.isnan(aggregate.interquartile({})).all()


def test_the_interval_is_about_that_of_the_trimmed_mean():
    logs = np.random.RandomState(0).standard_normal(200)
    middle, low, high = aggregate.interquartile({str(i): [math.exp(x)] for i, x in enumerate(logs)})
    assert math.log(middle) == pytest.approx(stats.trim_mean(logs, 0.25))
    # Tukey and McLaughlin's standard error of a trimmed mean, from the Winsorised deviation.
    error = stats.mstats.trimmed_stde(logs, limits=(0.25, 0.25))
    assert math.log(high / low) / 2 == pytest.approx(1.96 * error, rel=0.15)


def test_families_of_the_training_are_apart_from_unseen_ones():
    half, whole = np.full(20, 1.0), np.full(20, 2.0)
    rows = [
        *(
            row("own", half, cell="a", kind="trained-on family", ratio=0.5),
            row("adam, tuned", whole, best=whole, cell="a", kind="trained-on family"),
        ),
        *(
            row("own", 2 * whole, cell="b", ratio=3.0),
            row("adam, tuned", whole, best=whole, cell="b"),
        ),
    ]
    table = {(r["optimizer"], r["cells"]): r for r in aggregate.overall(aggregate.score(rows))}
    assert table["own", "trained on"]["validation"][0] == pytest.approx(0.5)
    assert table["own", "unseen"]["validation"][0] == pytest.approx(2)
    assert table["own", "all"]["validation"][0] == pytest.approx(1)
    assert table["own", "all"]["train"][0] == pytest.approx(1.5**0.5)
    assert [table["own", g]["reached"] for g in ("trained on", "unseen", "all")] == [1, 0, 0.5]
    assert [table["own", g]["n"] for g in ("trained on", "unseen", "all")] == [1, 1, 2]
    alone = aggregate.overall(aggregate.score(rows[2:]))
    assert [r["cells"] for r in alone] == ["all", "all"]


def test_the_profile_is_that_of_dolan_and_more():
    # Steps to the target, by cell: own 50, 100, never; adam 100, 100, 200. Over the cheapest:
    # own 1, 1, ∞; adam 2, 1, 1.
    def down(at):
        return np.where(at <= STEPS, 1.0, 2.0)

    adam = {"a": 100, "b": 100, "c": 200}
    own = {"a": 50, "b": 100, "c": 1000}
    rows = [
        r
        for cell in adam
        for r in (
            row("own", down(own[cell]), cell=cell, seconds=3.0),
            row("adam, tuned", down(adam[cell]), best=down(adam[cell]), cell=cell),
        )
    ]
    scores = aggregate.score(rows)
    factors = (1, 1.5, 2, math.inf)
    assert aggregate.profile(scores, "cost", factors) == {
        "own": pytest.approx([2 / 3] * 4),
        "adam, tuned": pytest.approx([2 / 3, 2 / 3, 1, 1]),
    }
    # In time own takes 150, 300 and never, so 1.5 and 3 times as long as Adam.
    assert aggregate.profile(scores, "time", (1, 1.5, 3)) == {
        "own": pytest.approx([0, 1 / 3, 2 / 3]),
        "adam, tuned": pytest.approx([1, 1, 1]),
    }
