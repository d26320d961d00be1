"""The families of problems by name, and a family from a section `task` of a configuration."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from l2l import tasks
from l2l.console import modules, schema
from l2l.console.errors import UserError
from l2l.core import base
from l2l.tasks import called

TASKS = {
    "autoencoder": tasks.autoencoder,
    "char_lstm": tasks.char_lstm,
    "cifar": tasks.cifar,
    "conv": tasks.conv,
    "few_shot": tasks.few_shot,
    "gru": tasks.gru,
    "logistic": tasks.logistic,
    "mixer": tasks.mixer,
    "mlp": tasks.mlp,
    "mnist": tasks.mnist,
    "nanogpt": tasks.nanogpt,
    "quadratic": tasks.quadratic,
    "regression": tasks.regression,
    "residual": tasks.residual,
    "resnet": tasks.resnet,
    "row_lstm": tasks.row_lstm,
    "simple": tasks.simple,
    "simple_multi": tasks.simple_multi,
    "sinusoid": tasks.sinusoid,
    "transformer": tasks.transformer,
    "vae": tasks.vae,
    "vit": tasks.vit,
}
# What a section has for a mixture of tasks, beside the settings of its own: with its defaults.
MIXTURE = {"weight": 1.0, "augmentations": ()}
AUGMENTATIONS = {"convex": tasks.convex, "noise": tasks.noise, "rescale": tasks.rescale}


def task(settings: Mapping, augmentations: Sequence[Mapping] = ()) -> base.TaskFamily:
    """A family from its section, wrapped by augmentations from the inside out. Errors in it say
    which of its functions was called with what (`called.py`)."""
    family = schema.make("task", {**TASKS, **_own(settings)}, settings)
    if not isinstance(family, base.TaskFamily):
        raise UserError(
            f"The task {settings['name']!r} returned {str(family)[:100]}: let it return an "
            "l2l.TaskFamily of its functions sample, init, batch and loss."
        )
    family = called.named(family, settings["name"])
    for augmentation in schema.several(augmentations):
        family = schema.make("augmentation", AUGMENTATIONS, augmentation, {"family": family})
    return family


def setting_of(name: str, key: str):
    """The default of a task's setting; of what has none, the task's name."""
    parameters = inspect.signature(TASKS[name]).parameters if name in TASKS else {}
    return parameters[key].default if key in parameters else name


def settings_of(section: Mapping) -> dict[str, Any] | None:
    """{key: its default, or None} of what may stand in a section `task`, those of a mixture too;
    None where its name is not known."""
    factory = {**TASKS, **_own(section)}.get(section.get("name", ""))
    if factory is None:
        return None
    return {"name": section["name"], **schema.settings_of(factory), **MIXTURE}


def alone(section: Mapping) -> dict[str, Any]:
    """A section without what it has for a mixture: the plain task."""
    return {key: value for key, value in section.items() if key not in MIXTURE}


def _own(section: Mapping) -> dict[str, Callable]:
    """The user's own factory: name="path/to/file.py:factory" or "package.module:factory"."""
    name = section.get("name") if hasattr(section, "get") else None
    if not isinstance(name, str) or ":" not in name:
        return {}
    place, _, attribute = name.rpartition(":")
    return {name: modules.attribute(place, attribute, "task")}


def distinct(sections: Sequence[Mapping]) -> list[tuple[str, base.TaskFamily]]:
    """(a name, the family) of each section `task`, by names that differ. A section that comes again
    with all of its settings is left out; families of one name are called by the settings in which
    they differ too, like "quadratic-2 stddev=0.01".

    Args:
      sections: as of `alone`.
    """
    found: list[tuple[base.TaskFamily, dict[str, str]]] = []
    for section in sections:
        own = _whole(section)
        if all(own != other for _, other in found):
            found.append((task(section), own))
    named = []
    for family, own in found:
        same = [other for namesake, other in found if namesake.name == family.name]
        keys = [k for k in own if any(other.get(k) != own[k] for other in same)]
        named.append((" ".join([family.name, *(f"{k}={own[k]}" for k in keys)]), family))
    return named


def _whole(section: Mapping) -> dict[str, str]:
    """All settings of a section as text, those too that it leaves to their defaults."""
    settings = {**(settings_of(section) or {}), **section}
    return {
        key: "-".join(map(str, value if isinstance(value, tuple | list) else [value]))
        for key, value in settings.items()
    }
