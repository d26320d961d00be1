"""Figures: loss curves, and the scorecard of ratios and speed-ups cell by cell."""

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from l2l.console.errors import UserError
from l2l.evaluation import aggregate, trials, untrained
from l2l.storage import files

if TYPE_CHECKING:  # Tables need no JAX.
    from l2l.evaluation.comparison import Row

# Okabe and Ito (2008), without yellow, which is faint on white: told apart by the colour-blind.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "D", "^")
# Points a curve is drawn with: batch losses are averaged within steps of a logarithmic axis.
POINTS = 150


def curves(panels: Mapping[str, Mapping[str, np.ndarray]], path: str | os.PathLike) -> Path:
    """Draws loss curves, one panel a title, and writes them as PNG. Steps are on a log axis, and so
    are losses, save where some are negative or none is positive.

    Args:
      panels: {title: {optimizer: losses [num_problems, num_steps]}}. Lines are medians over
        problems, bands reach from the first to the ninth decile; what is not finite is left out.
      path: of the file; its directory must exist.

    Raises:
      UserError: no panels.
    """
    if not panels:
        raise UserError("There are no curves to draw: give at least one panel.")
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    canvas, axes = _panels(len(panels))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        drawn = []
        for name, losses in lines.items():
            style = _style(names.index(name))
            steps, low, middle, high = spread(losses)
            axis.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
            axis.plot(steps, middle, label=name, linewidth=1.6, **style)
            drawn += [low, middle, high]
        axis.set(title=title, xlabel="step", ylabel="training loss")
        _scale(axis, np.concatenate(drawn))
        axis.grid(True, which="major", alpha=0.3)
    axes[0].legend(fontsize="small")
    return _written(canvas, path)


def adaptation(losses: Mapping[str, np.ndarray], steps, path: str | os.PathLike) -> Path:
    """Draws query losses against inner steps, a line for each start: medians over problems, and
    bands from the first to the ninth decile. Writes them as PNG.

    Args:
      losses: {start: [num_problems, c]}, after `steps` [c].
    """
    canvas, (axis,) = _panels(1)
    for color, (name, values) in zip(PALETTE, losses.items(), strict=False):
        values = np.where(np.isfinite(values), values, np.inf)
        low, middle, high = np.quantile(values, (0.1, 0.5, 0.9), axis=0, method="nearest")
        axis.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
        axis.plot(steps, middle, marker="o", markersize=3.5, label=name, color=color)
    axis.set(xlabel="inner steps", ylabel="query loss", yscale="log")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize="small")
    return _written(canvas, path)


def fits(panels: Sequence[Mapping], path: str | os.PathLike) -> Path:
    """Draws what regressions of one input answer, one panel a problem, and writes them as PNG.

    Args:
      panels: dicts of "support" (inputs, labels), "query" (inputs in order, labels), and "answers",
        {name: those on the query}.
    """
    canvas, axes = _panels(len(panels))
    for axis, panel in zip(axes, panels, strict=False):
        inputs, labels = panel["query"]
        axis.plot(inputs, labels, color="0.6", linewidth=2.5, label="truth")
        for i, (name, answers) in enumerate(panel["answers"].items()):
            line = LINES[i % len(LINES)]
            axis.plot(inputs, answers, line, color=PALETTE[i], linewidth=1.3, label=name)
        axis.plot(*panel["support"], "k^", markersize=4.5, label="support")
        axis.set(xlabel="x")
        axis.grid(True, alpha=0.3)
    axes[0].legend(fontsize="x-small")
    return _written(canvas, path)


def _canvas(width: float, height: float):
    """A figure of that many inches."""
    # Imported here: matplotlib takes a second, which tables do not need. No display is touched.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def _style(i: int) -> dict:
    """The colour and the line of the i-th optimizer."""
    return {
        "color": PALETTE[i % len(PALETTE)],
        "linestyle": LINES[i // len(PALETTE) % len(LINES)],
    }


def _panels(count: int):
    """(a canvas, the axes of `count` panels)."""
    columns = min(3, count)
    rows = math.ceil(count / columns)
    canvas = _canvas(4.6 * columns, 3.6 * rows)
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return canvas, axes[:count]


def _written(canvas, path) -> Path:
    image = io.BytesIO()
    canvas.savefig(image, format="png", dpi=150)
    files.write(path, image.getvalue())
    return Path(path)


def _scale(axis, losses) -> None:
    """Sets the scales of the axes of a panel; where no loss is finite, there are none to set."""
    finite = losses[np.isfinite(losses)]
    if not finite.size:
        middle = dict(ha="center", va="center", transform=axis.transAxes)
        axis.text(0.5, 0.5, "no finite loss", **middle)
        axis.set(xticks=[], yticks=[])
        return
    axis.set_xscale("log")
    if finite.min() >= 0 and finite.max() > 0:
        axis.set_yscale("log")


def scorecard(
    points: Sequence[Mapping], path: str | os.PathLike, title: str, reference: str
) -> Path:
    """Draws ratios of losses and speed-ups, side by side on log axes, a line a cell, and writes
    them as PNG. Left of 1 on the one side and right of 1 on the other is better.

    Args:
      points: dicts of "cell", "kind" (its colour), "steps" (its marker), and "ratio" and "sooner",
        both (value, low, high). An infinity or a zero is drawn at the edge as an arrow, and NaN,
        which is neither better nor worse, not at all.
      path: of the file; its directory must exist.
      reference: the kind of tuned baseline that both numbers are relative to.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, NullFormatter

    kinds = list(dict.fromkeys(point["kind"] for point in points))
    cells = [c for k in kinds for c in dict.fromkeys(p["cell"] for p in points if p["kind"] == k)]
    horizons = sorted({point["steps"] for point in points})
    canvas = _canvas(9, 1.6 + 0.3 * len(cells))
    axes = canvas.subplots(1, 2, sharey=True)
    labels = (f"final training loss / tuned {reference}'s", "times fewer steps to the same loss")
    for axis, key, label in zip(axes, ("ratio", "sooner"), labels, strict=True):
        fine = [x for p in points for x in p[key] if math.isfinite(x) and x > 0] or [1.0]
        low, high = min(0.5, *fine) / 1.3, max(2.0, *fine) * 1.3
        for point in points:
            middle, *ends = point[key]
            if math.isnan(middle):
                continue
            step = horizons.index(point["steps"])
            y = cells.index(point["cell"]) + 0.22 * (step - (len(horizons) - 1) / 2)
            color = PALETTE[kinds.index(point["kind"]) % len(PALETTE)]
            marker = MARKERS[step % len(MARKERS)]
            if not (math.isfinite(middle) and middle > 0):
                edge, marker = (high, ">") if middle > 0 else (low, "<")
                middle = edge
            axis.plot(middle, y, marker, color=color, markersize=4.5, clip_on=False)
            if all(map(math.isfinite, ends)):
                axis.plot(ends, [y, y], color=color, linewidth=1.1)
        axis.axvline(1, color="0.4", linewidth=0.8)
        axis.set(xscale="log", xlim=(low, high), xlabel=label)
        if high / low < 1e3:  # Few decades: matplotlib would label every digit, or none.
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e2 else (1,)))
            axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(True, axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(cells)), cells, fontsize="small")
    axes[0].set_ylim(len(cells) - 0.4, -0.6)
    handles = [
        Line2D([], [], color=PALETTE[i % len(PALETTE)], marker="o", label=kind)
        for i, kind in enumerate(kinds)
    ] + [
        Line2D([], [], color="0.3", linestyle="", marker=MARKERS[i % len(MARKERS)], label=f"{h:,}")
        for i, h in enumerate(horizons)
    ]
    canvas.legend(handles=handles, loc="outside lower center", ncols=5, fontsize="small")
    canvas.suptitle(title, fontsize="medium")
    return _written(canvas, path)


def profiles(scores: Sequence[aggregate.Score], path: str | os.PathLike) -> Path:
    """Draws performance profiles in steps and, where steps were timed, in seconds
    (`aggregate.profile`), and writes them as PNG. Higher and further left is better.

    Args:
      path: of the file; its directory must exist.
    """
    timed = not all(math.isnan(score.time) for score in scores)
    measures = (("cost", "steps"), ("time", "seconds"))[: 1 + timed]
    canvas = _canvas(4.6 * len(measures), 3.8)
    axes = canvas.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    factors = np.geomspace(1, 16, 400)
    for axis, (of, unit) in zip(axes, measures, strict=True):
        for i, (name, shares) in enumerate(aggregate.profile(scores, of, factors.tolist()).items()):
            style = dict(color=PALETTE[i % len(PALETTE)], linewidth=1.6)
            axis.step(factors, shares, where="post", label=name, ls=LINES[i % len(LINES)], **style)
        axis.set(xscale="log", xlim=(1, 16), ylim=(-0.02, 1.02))
        axis.set(xlabel=f"times the fewest {unit} to the validation target")
        axis.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axis.grid(True, which="major", alpha=0.3)
    axes[0].set_ylabel("share of cells")
    axes[0].legend(fontsize="small")
    return _written(canvas, path)


def to_match(found: Sequence[trials.Match], optimizer: str, path: str | os.PathLike) -> Path:
    """Draws how good the best of so many random trials of each baseline is beside an optimizer's
    one run, by training and by validation loss, and writes it as PNG. Where a line comes down to 1,
    so many trials match it. Thin: the cells and horizons of the first baseline.

    Args:
      path: of the file; its directory must exist.
    """
    own = [match for match in found if match.optimizer == optimizer]
    names = list(dict.fromkeys(match.baseline for match in own))
    canvas = _canvas(9.2, 3.8)
    axes = canvas.subplots(1, len(trials.LOSSES))
    for axis, loss in zip(axes, trials.LOSSES, strict=True):
        for match in own:
            if (match.baseline, match.loss) == (names[0], loss):
                tried = np.arange(1, len(match.ratios) + 1)
                axis.plot(tried, match.ratios, color=PALETTE[0], alpha=0.25, linewidth=0.7)
        for i, name in enumerate(names):
            ratios = trials.curve(found, optimizer, name, loss)
            tried = np.arange(1, len(ratios) + 1)
            axis.plot(tried, ratios, label=name, linewidth=1.8, **_style(i))
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set(xlabel="random trials, of which the best counts")
        drawn = [y for line in axis.lines[:-1] for y in np.asarray(line.get_ydata(), float)]
        if any(math.isfinite(y) and y > 0 for y in drawn):  # Negative losses have no ratios.
            axis.set(xscale="log", yscale="log")
        axis.set_ylabel(f"final {loss} loss / {optimizer}'s")
        axis.grid(True, which="major", alpha=0.3)
    axes[0].legend(fontsize="small")
    return _written(canvas, path)


def all_of(directory: Path, rows: Sequence["Row"]) -> list[Path]:
    """Draws curves-….png, one for each horizon, and for several cells with a baseline one scorecard
    for each optimizer and the performance profiles; the paths."""
    paths = comparisons(directory, rows)
    rows, _ = untrained.with_best_rates(rows)
    for steps in sorted({row.steps for row in rows}):
        panels: dict[str, dict] = {}
        for row in rows:
            if row.steps == steps:
                panels.setdefault(row.cell, {})[row.optimizer] = row.curves.losses
        paths.append(curves(panels, directory / f"curves-{steps}.png"))
    return paths


def clear(directory: Path) -> None:
    """Removes what `all_of` drew in a directory, whatever it was of."""
    for path in directory.glob("*.png"):
        if re.fullmatch(r"(curves-\d+|scorecard(-\d+)?|profile|trials(-\d+)?)\.png", path.name):
            path.unlink(missing_ok=True)


def comparisons(
    directory: Path, rows: Sequence["Row"], prefix: str = "", *, draw: bool = True
) -> list[Path]:
    """Draws what `results.json` has enough for: of several cells with a baseline one scorecard for
    each optimizer and the performance profiles, and with a baseline the trials that match each
    optimizer; the paths. Untrained twins are in the profiles alone.

    Args:
      prefix: of the names of the files.
      draw: False for the paths alone.
    """
    paths = []
    rows, _ = untrained.with_best_rates(rows)
    names = dict.fromkeys(r.optimizer for r in rows if r.setting is None and r.variant_of is None)
    several = len({row.cell for row in rows}) > 1
    for i, name in enumerate(names):
        points, reference = _points([row for row in rows if row.optimizer == name])
        if not several or reference is None:
            continue
        path = directory / f"{prefix}scorecard{f'-{i + 1}' if i else ''}.png"
        title = f"{name} beside tuned {reference}"
        paths.append(scorecard(points, path, title, reference) if draw else path)
    scores = aggregate.score(rows) if several else []
    if scores:
        path = directory / f"{prefix}profile.png"
        paths.append(profiles(scores, path) if draw else path)
    found = [match for match in trials.matches(rows) if match.optimizer in names]
    for i, name in enumerate(dict.fromkeys(match.optimizer for match in found)):
        path = directory / f"{prefix}trials{f'-{i + 1}' if i else ''}.png"
        paths.append(to_match(found, name, path) if draw else path)
    return paths


def _points(own: Sequence["Row"]) -> tuple[list[dict], str | None]:
    """(what `scorecard` draws of an optimizer, the kind of baseline that it is beside); nothing
    where there is none."""
    reference = next(iter(own[0].sooner), None)
    if reference is None:
        return [], None
    points = []
    for row in own:
        sooner = row.sooner[reference]
        where = {"cell": row.cell, "kind": row.kind or "all", "steps": row.steps}
        ratio, speed = (row.ratio, *row.interval), (sooner["steps"], *sooner["interval"])
        points.append(where | {"ratio": ratio, "sooner": speed})
    return points, reference


def spread(losses) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """[num_problems, num_steps] to (steps, first decile, median, ninth decile) over problems, each
    [at most POINTS]; steps count from 1 and are the last of those averaged."""
    losses = np.asarray(losses, float)
    ends = np.unique(np.geomspace(1, losses.shape[1], POINTS).round().astype(int))
    starts = np.concatenate([[0], ends[:-1]])
    means = np.add.reduceat(losses, starts, axis=1) / (ends - starts)
    means[~np.isfinite(means)] = np.inf
    # Quantiles by rank: halfway between a number and an infinity there is none.
    low, middle, high = np.quantile(means, (0.1, 0.5, 0.9), axis=0, method="nearest")

    def fine(x):
        return np.where(np.isfinite(x), x, np.nan)

    return ends, fine(low), fine(middle), fine(high)
