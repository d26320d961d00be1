"""Measurements kept in a directory, and found again by their program, data and inputs.

A changed optimizer, family or version of JAX is another program, so that nothing stale is found.
"""

import base64
import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from l2l.evaluation import curves
from l2l.evaluation.curves import Curves, Problems
from l2l.storage import files


def kept(directory: str | os.PathLike | None, inputs, compute: Callable[[], dict]) -> dict:
    """compute(), or what it gave before for the same inputs (plain data); None keeps nothing. A
    damaged file is computed anew, which its digest tells: flipped digits are JSON too."""
    if directory is None:
        return compute()
    name = _checksum(json.dumps(inputs))[:32]
    path = Path(directory) / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):
        written, text = path.read_text().split("\n")
        if written == _checksum(text):
            return json.loads(text)
    result = compute()
    files.folder(path.parent, "--output")
    text = json.dumps(result)
    files.write(path, f"{_checksum(text)}\n{text}".encode())
    return result


def program(optimizer, family, theta, checkpoints, key, data, validated=()) -> str:
    """A digest of the whole computation of one run to the last of `checkpoints`, measured as
    `curves.one_run` says: optimizer, family and measurements, and the version of JAX that compiles
    it."""

    def run(theta, key, data):
        start = curves.beginning(family, key)
        return curves.one_run(optimizer, theta, family, start, data, checkpoints, validated)

    text = jax.jit(run).lower(theta, key, data).as_text()
    return _checksum(f"{jax.__version__}\n{text}")


def digest(tree) -> str:
    """A digest of the arrays of a pytree, like a data set or a theta."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        array = np.ascontiguousarray(leaf)
        found.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    return found.hexdigest()


def trained(
    optimizer, theta, family, data, problems: Problems, num_steps: int, directory
) -> Curves:
    """What `evaluate` gives of a `LearnedOptimizer` and its theta, kept in a directory, if any."""
    key, count = problems

    def compute():
        run = curves.compiled(optimizer, family, count, num_steps)
        return {name: _packed(x) for name, x in run(theta, key, data)._asdict().items()}

    inputs = ()
    if directory is not None:
        validated = curves.validation_steps(num_steps)
        name = program(optimizer, family, theta, (num_steps,), key, data, validated)
        own = np.asarray(jax.random.key_data(key)).tolist()
        inputs = ("curves", name, digest(data), digest(theta), count, own)
    found = kept(directory, inputs, compute)
    return Curves(**{name: _unpacked(x) for name, x in found.items()})


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _packed(array) -> list:
    array = np.asarray(array)
    return [str(array.dtype), list(array.shape), base64.b64encode(array.tobytes()).decode()]


def _unpacked(packed) -> np.ndarray:
    dtype, shape, content = packed
    return np.frombuffer(base64.b64decode(content), dtype).reshape(shape)
