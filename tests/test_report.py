"""Tables, figures and JSON, with the numbers that go wrong."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from l2l.evaluation import figures, report, statistics


def test_a_table_is_aligned_markdown():
    rows = [{"name": "adam", "loss": 0.123456}, {"name": "b", "loss": math.nan, "note": "new"}]
    assert report.table(rows) == (
        "| name |  loss | note |\n"
        "| ---- | ----: | ---- |\n"
        "| adam | 0.123 | –    |\n"
        "| b    |     – | new  |\n"
    )


def test_json_of_arrays_and_of_numbers_json_lacks(tmp_path):
    content = {"a": np.asarray([1.0, math.nan, math.inf]), 3: (np.int32(2), True, None)}
    path = report.write_json(tmp_path / "x.json", content)
    assert json.loads(path.read_text()) == {"a": [1.0, None, "inf"], "3": [2, True, None]}


def test_json_of_single_precision_has_no_more_digits_than_it():
    numbers = np.random.RandomState(0).rand(100).astype(np.float32)
    written = report.plain(numbers)
    np.testing.assert_array_equal(np.asarray(written, np.float32), numbers)
    assert report.plain(np.float32(0.1)) == 0.1 and max(len(str(x)) for x in written) <= 13


def test_spread_averages_within_bins_and_ranks_infinities():
    losses = np.tile(np.arange(1.0, 1001.0), (5, 1))
    losses[4] = np.inf
    steps, low, middle, high = figures.spread(losses)
    assert steps[0] == 1 and steps[-1] == 1000 and len(steps) <= figures.POINTS
    assert low[0] == middle[0] == 1.0 and np.isnan(high).all()
    # The last bin: steps 956 to 1000, say; its mean lies in it.
    assert steps[-2] < middle[-1] < 1000 and np.isfinite(middle).all()


def test_a_figure_is_drawn_even_of_diverged_runs(tmp_path):
    fine = np.exp(-np.arange(50) / 10)[None] * np.asarray([[1.0], [2.0]])
    lost = np.full((2, 50), np.nan)
    panels = {f"panel {i}": {"fine": fine, "lost": lost, "short": fine[:, :1]} for i in range(4)}
    path = figures.curves(panels, tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="at least one panel"):
        figures.curves({}, path)


@pytest.mark.parametrize("level, scale", [(-5.0, "linear"), (0.0, "linear"), (1.0, "log")])
def test_the_scale_of_losses_is_one_they_have(level, scale):
    from matplotlib.figure import Figure

    axis = Figure().subplots()
    figures._scale(axis, np.asarray([level, level, np.nan]))
    assert axis.get_yscale() == scale


def test_figures_of_losses_without_a_logarithm(tmp_path):
    below = np.linspace(1.0, -3.0, 50)[None]
    nothing = np.full((2, 50), np.nan)
    panels = {"below": {"a": below}, "zero": {"a": 0 * below}, "nothing": {"a": nothing}}
    path = figures.curves(panels, tmp_path / "curves.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_what_has_no_ratio_is_not_drawn_as_if_it_were_better(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot

    def spy(self, x, y, *arguments, **settings):
        drawn.append(x)
        return plot(self, x, y, *arguments, **settings)

    monkeypatch.setattr(Axes, "plot", spy)
    nan = (math.nan,) * 3
    point = {"cell": "a", "kind": "k", "steps": 1, "ratio": nan, "sooner": (2.0, 1.0, 4.0)}
    figures.scorecard([point], tmp_path / "s.png", "title", "adam")
    assert drawn == [2.0, [1.0, 4.0]]


def test_a_scorecard_names_the_baseline_that_its_ratios_are_over(tmp_path, monkeypatch):
    """The first of a row, which need not be Adam."""
    drawn, speed = [], {"steps": 2.0, "interval": (1.0, 3.0), "time": 1.0}
    own = {"optimizer": "mine", "setting": None, "variant_of": None, "kind": "", "steps": 5}
    own |= {"ratio": 0.5, "interval": (0.4, 0.6), "sooner": {"soap": speed, "adam": speed}}
    monkeypatch.setattr(figures, "_written", lambda canvas, path: drawn.append(canvas))
    monkeypatch.setattr(figures.untrained, "with_best_rates", lambda rows: (rows, {}))
    monkeypatch.setattr(figures.aggregate, "score", lambda rows: [])
    monkeypatch.setattr(figures.trials, "matches", lambda rows: [])
    figures.comparisons(tmp_path, [SimpleNamespace(cell=cell, **own) for cell in "ab"])
    (canvas,) = drawn
    assert canvas.axes[0].get_xlabel() == "final training loss / tuned soap's"
    assert canvas.get_suptitle() == "mine beside tuned soap"


def test_the_geometric_mean():
    assert statistics.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert statistics.geometric_mean([1.0, math.inf]) == math.inf
    assert statistics.geometric_mean([0.0, 1.0]) == 0.0
    assert math.isnan(statistics.geometric_mean([]))
    assert math.isnan(statistics.geometric_mean([1.0, -1.0]))
    assert math.isnan(statistics.geometric_mean([1.0, math.nan]))
