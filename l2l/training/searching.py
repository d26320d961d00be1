"""How learned settings of AdamW compare with those of random search in as many inner steps."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from l2l.evaluation import random_search, report, statistics
from l2l.evaluation.curves import Problems
from l2l.storage import files
from l2l.training.experiment import Experiment

LEGEND = """\
Loss over the whole validation and test split at the end of {steps} steps, on {problems} new runs,
the same for both: mean and standard error. *learned*: the settings that meta-training found in
{taken} inner steps. *random search*: the best of {count} draws by the validation loss of its own
run, in as many inner steps altogether.
"""


def conclude(experiment: Experiment, theta, directory, key: jax.Array, about: dict) -> str:
    """Searches at random in as many inner steps as meta-training took (the last run is made whole),
    measures both on new runs and writes table.md and results.json; returns what a terminal is
    shown."""
    directory, settings = Path(directory), experiment.evaluation
    ((_, family),), (steps,) = experiment.judged, settings.horizons
    # Not by runs: those of meta-training may be of other lengths, and be cut into windows.
    taken = experiment.inner_steps(about["meta_steps"])
    count = math.ceil(taken / steps)
    data = jax.device_put(family.data())
    run = random_search.compile_runs(experiment.optimizer, family, steps)
    drawn = random_search.draws(key, experiment.specification.get("knots", 0), count)
    found, losses = random_search.best(run, drawn, jax.random.fold_in(key, 1), data)
    new = Problems(jax.random.fold_in(key, 2), settings.num_problems).keys()
    rows, ended = [], {}
    for name, own in (("learned", theta), ("random search", found)):
        ended[name] = run(_repeated(own, settings.num_problems), new, data)
        shown = {"settings": name, **_described(own)}
        for measure, values in ended[name]._asdict().items():
            if not np.isnan(values).all():
                error = statistics.standard_error(values)
                shown[measure] = f"{values.mean():.4g} ± {error:.1g}"
        rows.append(shown)
    text = report.table(rows)
    legend = LEGEND.format(steps=steps, problems=settings.num_problems, taken=taken, count=count)
    files.write(directory / "table.md", f"# Settings\n\n{legend}\n{text}".encode())
    content = {"rows": rows, "each": ended, "search": losses, "found": found, "learned": theta}
    report.write_json(directory / "results.json", dict(about, **content))
    return f"{text}\n{directory / 'table.md'}\n{directory / 'results.json'}"


def _repeated(theta, count: int):
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *jnp.shape(x))), theta)


def _described(theta) -> dict:
    """Theta as people write such settings: its schedule as factors on the rate."""
    shown: dict = {
        "rate": float(np.exp(theta["log_learning_rate"])),
        "decay": float(np.exp(theta["log_weight_decay"])),
    }
    if "schedule" in theta:
        shown["schedule"] = " ".join(f"{np.exp(x):.2g}" for x in theta["schedule"])
    return shown
