"""The families of problems by name, and a family from a section `task` of a configuration."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from l2l import tasks
from l2l.console import schema
from l2l.console.errors import UserError
from l2l.core import base

TASKS = {
    "autoencoder": tasks.autoencoder,
    "cifar": tasks.cifar,
    "conv": tasks.conv,
    "gru": tasks.gru,
    "logistic": tasks.logistic,
    "mixer": tasks.mixer,
    "mlp": tasks.mlp,
    "mnist": tasks.mnist,
    "quadratic": tasks.quadratic,
    "regression": tasks.regression,
    "residual": tasks.residual,
    "row_lstm": tasks.row_lstm,
    "simple": tasks.simple,
    "simple_multi": tasks.simple_multi,
    "transformer": tasks.transformer,
}
AUGMENTATIONS = {"convex": tasks.convex, "noise": tasks.noise, "rescale": tasks.rescale}


def task(settings: Mapping, augmentations: Sequence[Mapping] = ()) -> base.TaskFamily:
    """A family from its section, wrapped by augmentations from the inside out."""
    family = schema.make("task", {**TASKS, **_own(settings.get("name", ""))}, settings)
    for augmentation in schema.several(augmentations):
        family = schema.make("augmentation", AUGMENTATIONS, augmentation, {"family": family})
    return family


def setting_of(name: str, key: str):
    """The default of a task's setting; of what has none, the task's name."""
    parameters = inspect.signature(TASKS[name]).parameters if name in TASKS else {}
    return parameters[key].default if key in parameters else name


def _own(name: str) -> dict[str, Callable]:
    """The user's own factory: name="path/to/file.py:factory" or "package.module:factory"."""
    if not isinstance(name, str) or ":" not in name:
        return {}
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return {name: getattr(module, attribute)}
    except (ImportError, AttributeError, OSError) as error:
        raise UserError(
            f"The task {name!r} could not be imported ({error}): write "
            "path/to/file.py:function or package.module:function."
        ) from error
