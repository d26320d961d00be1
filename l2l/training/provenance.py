"""What a run was made of besides its configuration: versions, data, and what its tasks compute.

A task is the user's code and data are the user's files; both may change before a run that was
stopped goes on. provenance.json lists what the run had, and from which meta-step on.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from l2l.console import errors
from l2l.core import base
from l2l.evaluation import cache
from l2l.storage import files
from l2l.training.experiment import Experiment
from l2l.training.run_directory import PROVENANCE
from l2l.version import __version__


def record(experiment: Experiment, data, directory, step: int) -> str | None:
    """Notes in provenance.json what the run has from meta-step `step` on, if it had something else
    before or nothing was noted; returns a sentence on what is no longer the same, None where all
    is.

    Args:
      data: what the families read (`Experiment.data`), as arrays that this process has whole.
    """
    path = Path(directory) / PROVENANCE
    now = {"meta_step": step, **_made_of(experiment, data)}
    earlier = [row for row in _read(path) if row["meta_step"] < step]
    changed = _changed(earlier[-1], now) if earlier else []
    if changed or not earlier:
        content = json.dumps([*earlier, now], indent=2)
        files.write(path, content.encode() + b"\n")
    if not changed:
        return None
    return (
        f"Not as before meta-step {step}: {'; '.join(changed)}. The run goes on all the same: if "
        "that was not meant, stop it and bring back what there was, or start again in another "
        "--workdir."
    )


def _made_of(experiment: Experiment, data) -> dict[str, Any]:
    parts = [experiment.data_of(data, i) for i in range(len(experiment.families))]
    families = [*zip(experiment.families, parts, strict=True)]
    return {
        "versions": {"l2l": __version__, "jax": jax.__version__},
        "tasks": [{"name": f.name, "program": _program(f, own)} for f, own in families],
        "data": cache.digest(base.raw(data)),
    }


def _changed(before: dict, now: dict) -> list[str]:
    """What is no longer as it was, in words."""
    changed = [
        f"{name} is {now['versions'][name]}, and was {version}"
        for name, version in before["versions"].items()
        if now["versions"][name] != version
    ]
    # Another JAX may write the same program in other words.
    if before["versions"]["jax"] == now["versions"]["jax"]:
        tasks = zip(before["tasks"], now["tasks"], strict=False)
        changed += [f"task {b['name']} computes something else" for a, b in tasks if a != b]
    return changed + ["the data are others"] * (before["data"] != now["data"])


def _program(family: base.TaskFamily, data) -> str | None:
    """A digest of what a family computes, from the key of a problem to its losses; None where it
    cannot be traced, which training itself has to say."""

    def losses(key, data):
        problem = family.sample(key)
        params = family.init(key, problem)
        batches = [family.batch(key, problem, data, split) for split in ("train", "validation")]
        return params, [family.loss(params, problem, batch) for batch in batches]

    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), data)
    try:
        made = jax.make_jaxpr(losses)(jax.random.key(0), like)
    except Exception:
        return None
    # Functions within are named by their addresses, which are others in every process.
    text = re.sub(r"0x[0-9a-f]+", "", str(made))
    return cache.digest([np.frombuffer(text.encode(), np.uint8), *base.raw(list(made.consts))])


def _read(path: Path) -> list[dict]:
    """The rows of the file; none where there is none or it is damaged, as it decides nothing."""
    with errors.naming(path):
        content = path.read_bytes() if path.exists() else b"[]"
    try:
        return [{"meta_step": int(row["meta_step"]), **_known(row)} for row in json.loads(content)]
    except (AttributeError, KeyError, TypeError, ValueError):
        return []


def _known(row: dict) -> dict[str, Any]:
    versions = {name: str(row["versions"][name]) for name in ("l2l", "jax")}
    tasks = [{key: task[key] for key in ("name", "program")} for task in row["tasks"]]
    return {"versions": versions, "tasks": tasks, "data": row["data"]}
