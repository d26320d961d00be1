"""What a run comes to: the comparison with tuned Adam on the way and at the end, and its files."""

import json
from pathlib import Path

import jax

from l2l import checkpoint

RESULTS = "results.json"


def comparison(experiment, data, directory, key, say):
    def compare(theta):
        return {}, "not yet compared with Adam"

    return compare


def conclude(experiment, theta, data, directory, key, seconds, skipped, say) -> str:
    """Exports theta, evaluates it and writes table, figure and JSON; returns what to print."""
    directory = Path(directory)
    path = checkpoint.export(
        directory / checkpoint.EXPORT,
        experiment.specification,
        theta,
        dict(
            config=experiment.config,
            seed=experiment.seed,
            meta_steps=experiment.running.steps,
            training=dict(seconds=round(seconds, 1), devices=jax.device_count()),
        ),
    )
    checkpoint.write(directory / RESULTS, json.dumps({"export": str(path)}).encode())
    return reread(directory)


def reread(directory) -> str:
    return (Path(directory) / RESULTS).read_text()
