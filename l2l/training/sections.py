"""The sections of a configuration: what may stand in each, and the defaults of what is left out."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from l2l.console import schema
from l2l.console.errors import UserError
from l2l.core.unroll import Inner
from l2l.estimators import objective
from l2l.estimators.registry import ESTIMATORS
from l2l.optimizers.registry import OPTIMIZERS
from l2l.tasks import registry as tasks
from l2l.tasks.losses import LOSSES
from l2l.training import curriculum
from l2l.training.meta_optimizers import META_OPTIMIZERS, SCHEDULES

HORIZONS = {"log_uniform": curriculum.log_uniform, "stages": curriculum.stages}
LENGTH = 20  # Of a window, unless section `inner` says otherwise.


class Running(NamedTuple):
    """Section `meta`.

    steps:        meta-steps of the whole run.
    num_problems: inner problems, split over the devices.
    group:        meta-steps in one call of the compiled program (and between lines of progress).
    clip:         the largest norm of one problem's meta-gradient, once that is multiplied by the
                  weight of its task; inf for none.
    max_bad:      training stops after so many meta-steps in a row in which a family has no finite
                  meta-gradient.
    blend:        how far the result lies from the first theta to the trained one, 1 for all the
                  way: between them are optimizers that keep what the first does well on other
                  tasks (as in WiSE-FT; Wortsman et al. 2022).
    optimizer:    of the meta-optimizer: one section, or several that are chained.
    """

    steps: int = 2000
    num_problems: int = 16
    group: int = 50
    clip: float = 1.0
    max_bad: int = 20
    blend: float = 1.0
    optimizer: Any = MappingProxyType({"name": "adam", "learning_rate": 1e-3})


class Evaluation(NamedTuple):
    """Section `evaluation`: the comparison with tuned Adam, at the end and on the way.

    horizons:     of the final comparison, in inner steps.
    num_problems: unseen problems of the final comparison (seeds), for each horizon.
    every:        meta-steps between comparisons on the way; 0 for none. They take the shortest
                  horizon and the first of the tasks.
    against:      "adam", tuned over a grid; or "random_search" over the settings of AdamW, in as
                  many inner steps as meta-training takes (for the optimizer `learned_adamw`), on
                  one task at one horizon. Where theta holds a start: always against other starts.
    tasks:        what to compare on: settings that replace some of section `task`, or several such
                  dicts; {} is that section itself. Always without augmentations.
    """

    horizons: Sequence[int] = (500, 1000)
    num_problems: int = 12
    every: int = 500
    against: str = "adam"
    tasks: Any = MappingProxyType({})


class Theta(NamedTuple):
    """Section `theta`: what theta holds of an inner run besides the weights of its optimizer.

    start: the parameters that every run begins with (as in MAML; Finn et al. 2017). Meta-training
           begins with those that the task draws.
    loss:  settings of the loss that inner training minimises: a section of its own, or {}. The
           meta-loss is that of the task, on validation batches.
    """

    start: bool = False
    loss: Any = MappingProxyType({})


class Saving(NamedTuple):
    """Section `checkpoint`: the meta-steps between saves, and how many of the latest are kept."""

    every: int = 200
    keep: int = 3


# Each with what stands for it where it is left out.
SECTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "seed": 0,
        "start": "",
        "task": {"name": "mlp"},
        "augmentations": (),
        "optimizer": {"name": "lstm"},
        "theta": {},
        "objective": {},
        "inner": {},
        "estimator": {"name": "first_order"},
        "horizon": {"name": "log_uniform"},
        "imitation": {},
        "meta": {},
        "evaluation": {},
        "checkpoint": {},
    }
)


def settings_of(path: tuple[str, ...], config: Mapping) -> Mapping[str, Any] | None:
    """{key: its default, or None} of what may stand in a section of a configuration: ("meta",) or
    ("optimizer", "parts", "net"), () for the configuration itself. None where that depends on what
    is not known here."""
    if not path:
        return SECTIONS
    if path == ("inner",):
        return {**schema.settings_of(Inner, ("family", "optimizer")), "length": LENGTH}
    if len(path) == 1 and path[0] in _RECORDS:
        return schema.settings_of(_RECORDS[path[0]])
    section: Any = config
    for key in path:
        section = section.get(key) if hasattr(section, "get") else None
    if not hasattr(section, "get"):
        return None
    if path == ("task",):
        return tasks.settings_of(section)
    factory = (_table(path) or {}).get(section.get("name"))
    if factory is None:
        return None
    given = ("steps", "imitation", "inner", "objective", "teacher", "family")  # By the program.
    return {"name": section["name"], **schema.settings_of(factory, given)}


def filled(config: Mapping) -> dict:
    """A configuration with the defaults of what it leaves out, in all of its sections. A section
    whose name is not known stays as it is, and defaults that are not plain data are left out."""
    return _filled((), {**SECTIONS, **config})


def _filled(path: tuple[str, ...], section) -> Any:
    if isinstance(section, list | tuple):
        # Of a mixture, or a chain; numbers stay as they are.
        return [_filled(path, one) for one in section]
    if not isinstance(section, Mapping):
        return section
    whole: Any = section
    for key in reversed(path):
        whole = {key: whole}
    try:
        known = settings_of(path, whole) or {}
    except Exception:  # A file of the user's from which the task can no longer be imported.
        known = {}
    # None also stands for what has no default.
    known = {key: value for key, value in known.items() if value is not None and _is_plain(value)}
    return {key: _filled((*path, key), value) for key, value in {**known, **section}.items()}


def _is_plain(value) -> bool:
    try:
        schema.plain(value)
    except UserError:
        return False
    return True


_RECORDS = {
    "checkpoint": Saving,
    "evaluation": Evaluation,
    "imitation": curriculum.Imitation,
    "meta": Running,
    "objective": objective.objective,
    "theta": Theta,
}
_NAMED = {
    "augmentations": tasks.AUGMENTATIONS,
    "estimator": ESTIMATORS,
    "horizon": HORIZONS,
    "optimizer": OPTIMIZERS,
}


def _table(path: tuple[str, ...]) -> Mapping[str, Callable] | None:
    """What the names of a section are the keys of."""
    if path[:2] == ("meta", "optimizer"):
        return META_OPTIMIZERS if len(path) == 2 else SCHEDULES
    if path[:2] == ("optimizer", "parts"):
        return OPTIMIZERS
    if path == ("task", "augmentations"):
        return tasks.AUGMENTATIONS
    if path == ("theta", "loss"):
        return LOSSES
    return _NAMED.get(path[0]) if len(path) == 1 else None
