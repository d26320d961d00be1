"""The result of a run whose theta holds a start: how fast new problems are learned from it."""

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from l2l.evaluation import adaptation, curves, figures, report
from l2l.evaluation.curves import Problems
from l2l.storage import files
from l2l.training.experiment import Experiment

LEGEND = """\
Query loss (on the test split) of new problems after so many inner steps on their support (the
training split): mean over problems and its standard error. *learned*: from the start that theta
holds. *random*: from parameters drawn for each problem. *pretrained*: from those of one network
trained by Adam on {problems} new problems in each of {steps} steps, which are the numbers of
meta-training. The updates of the optimizer are multiplied by a factor for these two, the best of
{factors} on these very problems.
"""
PANELS = 6  # Of the figure of fitted curves, at most.


def comparing(experiment: Experiment, key: jax.Array) -> Callable:
    """Makes (theta) -> (numbers for the log, a phrase): query losses of new problems of the first
    task of section `evaluation`, after the numbers of steps that are its horizons."""
    (_, family), settings = experiment.judged[0], experiment.evaluation

    @functools.cache
    def data():
        return jax.device_put(family.data())

    def compare(theta):
        start = experiment.optimizer.start
        assert start is not None
        found = adaptation.adapt(
            *(experiment.optimizer, theta, start(theta), (family, data())),
            *(Problems(key, settings.num_problems), settings.horizons),
        )
        means = found.loss.mean(0)
        each = zip(found.steps, means, strict=True)
        numbers = {f"comparison/query_loss_{step}": float(loss) for step, loss in each}
        said = f"query loss {means[0]:.3g}, {means[-1]:.3g} after {found.steps[-1]} steps"
        return numbers, said

    return compare


def conclude(experiment: Experiment, theta, directory, key: jax.Array, about: dict) -> str:
    """Measures the start beside a random and a pretrained one on the tasks of section `evaluation`,
    and writes table.md, results.json and figures; returns what a terminal is shown."""
    directory, settings = Path(directory), experiment.evaluation
    sections, stored, paths, steps = [], {}, [], about["meta_steps"]
    for i, (name, family) in enumerate(experiment.judged):
        data, own = jax.device_put(family.data()), jax.random.fold_in(key, i)
        problems = Problems(own, settings.num_problems)
        found = _beside_others(experiment, theta, (family, data), problems, steps)
        several = len(experiment.judged) > 1
        title = f"\n## {name}\n\n" if several else ""
        sections.append(title + report.table(adaptation.rows(found)))
        stored[name] = {k: x._replace(outputs=None) for k, x in found.items()}
        paths += _drawn(directory, f"-{i + 1}" * several, (family, data), problems, found)
    text = "\n".join(sections)
    legend = LEGEND.format(
        problems=experiment.problems(),
        steps=steps,
        factors=", ".join(f"{x:g}" for x in adaptation.FACTORS),
    )
    files.write(directory / "table.md", f"# Adaptation\n\n{legend}\n{text}".encode())
    report.write_json(directory / "results.json", dict(about, adaptation=stored))
    listed = [directory / "table.md", directory / "results.json", *paths]
    return f"{text}\n" + "\n".join(map(str, listed))


def _beside_others(
    experiment, theta, task, problems, meta_steps: int
) -> dict[str, adaptation.Adapted]:
    """{start: what it came to}."""
    optimizer, steps = experiment.optimizer, experiment.evaluation.horizons
    assert optimizer.start is not None
    pretrained = adaptation.pretrain(
        task[0],
        task[1],
        jax.random.fold_in(problems.key, problems.count),
        steps=meta_steps,
        num_problems=experiment.problems(),
    )
    measure = functools.partial(adaptation.adapt, optimizer, theta)
    where = (task, problems, steps)
    return {
        "learned": measure(optimizer.start(theta), *where),
        "random": measure(None, *where, factors=adaptation.FACTORS),
        "pretrained": measure(pretrained, *where, factors=adaptation.FACTORS),
    }


def _drawn(directory, suffix, task, problems, found) -> list[Path]:
    """Draws query losses, and the fits where the task is a regression of one input; the paths."""
    losses = {name: x.loss for name, x in found.items()}
    steps = found["learned"].steps
    paths = [figures.adaptation(losses, steps, directory / f"adaptation{suffix}.png")]
    if found["learned"].outputs is None:
        return paths
    family, data = task
    panels = []
    for i in range(min(PANELS, problems.count)):
        key = jax.random.fold_in(problems.key, i)
        problem = curves.beginning(family, key).problem
        support = family.batch(key, problem, data, "train")
        query = family.batch(None, problem, data, "test")
        if np.shape(query.inputs)[1:] != (1,):
            return paths
        points = [(np.ravel(x.inputs), np.ravel(x.labels)) for x in (support, query)]
        answers = {f"learned, {steps[c]} steps": found["learned"].outputs[i, c] for c in (0, 1, -1)}
        answers[f"pretrained, {steps[-1]} steps"] = found["pretrained"].outputs[i, -1]
        panels.append({"support": points[0], "query": points[1], "answers": answers})
    return [*paths, figures.fits(panels, directory / f"fits{suffix}.png")]
