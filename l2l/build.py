"""Configuration to objects. What a name in a configuration may be is one visible dict a kind.

A section of a configuration is a dict with a `name`, a key of that kind's dict, and settings: the
keyword arguments of what the dict holds. They are checked against its signature, so that a misspelt
key or a wrong type stops before anything is computed.
"""

import difflib
import importlib
import importlib.util
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import optax

from l2l import base, curriculum, tasks
from l2l.estimators import first_order, objective
from l2l.meta import Meta
from l2l.optimizers import lstm
from l2l.unroll import Inner

TASKS = {
    "autoencoder": tasks.autoencoder,
    "cifar": tasks.cifar,
    "conv": tasks.conv,
    "gru": tasks.gru,
    "logistic": tasks.logistic,
    "mlp": tasks.mlp,
    "mnist": tasks.mnist,
    "quadratic": tasks.quadratic,
    "regression": tasks.regression,
    "simple": tasks.simple,
    "simple_multi": tasks.simple_multi,
    "transformer": tasks.transformer,
}
AUGMENTATIONS = {"convex": tasks.convex, "noise": tasks.noise, "rescale": tasks.rescale}
OPTIMIZERS = {"dm": lstm.dm, "lstm": lstm.lstm, "rnnprop": lstm.rnnprop}
ESTIMATORS = {"first_order": first_order.first_order}
HORIZONS = {"log_uniform": curriculum.log_uniform, "stages": curriculum.stages}
META_OPTIMIZERS = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "add_decayed_weights": optax.add_decayed_weights,
    "clip": optax.clip,
    "clip_by_global_norm": optax.clip_by_global_norm,
    "lion": optax.lion,
    "rmsprop": optax.rmsprop,
    "scale": optax.scale,
    "scale_by_adam": optax.scale_by_adam,
    "scale_by_learning_rate": optax.scale_by_learning_rate,
    "scale_by_schedule": optax.scale_by_schedule,
    "sgd": optax.sgd,
}
SCHEDULES = {
    "constant_schedule": optax.constant_schedule,
    "cosine_decay_schedule": optax.cosine_decay_schedule,
    "exponential_decay": optax.exponential_decay,
    "linear_schedule": optax.linear_schedule,
    "warmup_cosine_decay_schedule": optax.warmup_cosine_decay_schedule,
}


class Running(NamedTuple):
    """Section `meta`.

    steps:        meta-steps of the whole run.
    num_problems: inner problems, split over the devices.
    group:        meta-steps a call of the compiled program (and between signs of life).
    clip:         the largest norm of one problem's meta-gradient.
    max_bad:      training stops after so many non-finite meta-gradients in a row.
    optimizer:    of the meta-optimizer: one section, or several that are chained.
    """

    steps: int = 2000
    num_problems: int = 16
    group: int = 50
    clip: float = 1.0
    max_bad: int = 20
    optimizer: Any = types.MappingProxyType({"name": "adam", "learning_rate": 1e-3})


class Evaluation(NamedTuple):
    """Section `evaluation`: the comparison with tuned Adam, at the end and on the way.

    horizons:     of the final comparison, in inner steps.
    num_problems: unseen problems of the final comparison (seeds), for each horizon.
    every:        meta-steps between comparisons on the way; 0 for none. They take the shortest
                  horizon and a quarter of the problems.
    """

    horizons: Sequence[int] = (500, 1000)
    num_problems: int = 12
    every: int = 500


class Saving(NamedTuple):
    """Section `checkpoint`: every how many meta-steps, and how many of the last are kept."""

    every: int = 200
    keep: int = 3


class Experiment(NamedTuple):
    """What `train.run` runs. `config` is plain data (what config.json holds); `specification` is
    the part of it that rebuilds the optimizer."""

    config: dict
    specification: dict
    seed: int
    family: base.TaskFamily
    inner: Inner
    meta: Meta
    curriculum: curriculum.Curriculum
    running: Running
    evaluation: Evaluation
    saving: Saving


SECTIONS = (
    "seed",
    "task",
    "augmentations",
    "optimizer",
    "objective",
    "inner",
    "estimator",
    "horizon",
    "imitation",
    "meta",
    "evaluation",
    "checkpoint",
)


def experiment(config: Mapping) -> Experiment:
    """Builds everything that a configuration (a ConfigDict or dict) describes.

    Raises:
      ValueError: a key or name that is not known (with the nearest that is), or a value of the
        wrong type or out of range.
    """
    config = plain(config)
    for key in config:
        if key not in SECTIONS:
            raise ValueError(unknown("section", key, SECTIONS, "config"))
    running = fill("meta", Running, config.get("meta", {}))
    if min(running.steps, running.num_problems, running.group, running.max_bad) < 1:
        raise ValueError("meta.steps, num_problems, group and max_bad must all be 1 or more.")
    # Every call of the compiled program takes the same number of meta-steps.
    running = running._replace(group=math.gcd(running.steps, running.group))
    family = task(config.get("task", {"name": "mlp"}), config.get("augmentations", ()))
    specification = config.get("optimizer", {"name": "lstm"})
    learned = optimizer(specification)
    settings = {"length": 20, **config.get("inner", {})}
    hidden = ("family", "optimizer")  # The program's, not the user's.
    inner = Inner(family, learned, **check("inner", Inner, settings, hidden))
    imitation = fill("imitation", curriculum.Imitation, config.get("imitation", {}))
    given = dict(inner=inner, objective=call("objective", objective.objective, config))
    if imitation.weight:
        given["teacher"] = first_order.Teacher(learning_rate=imitation.learning_rate)
    estimator = make(
        "estimator", ESTIMATORS, config.get("estimator", {"name": "first_order"}), **given
    )
    plan = make(
        "horizon",
        HORIZONS,
        config.get("horizon", {"name": "log_uniform"}),
        steps=running.steps,
        imitation=imitation,
    )
    return Experiment(
        config=config,
        specification=specification,
        seed=fits("config", "seed", config.get("seed", 0), int),
        family=family,
        inner=inner,
        meta=Meta(
            estimator,
            learned,
            meta_optimizer(running.optimizer, running.steps),
            running.num_problems,
            running.clip,
        ),
        curriculum=plan,
        running=running,
        evaluation=fill("evaluation", Evaluation, config.get("evaluation", {})),
        saving=fill("checkpoint", Saving, config.get("checkpoint", {})),
    )


def task(settings: Mapping, augmentations: Sequence[Mapping] = ()) -> base.TaskFamily:
    """A family from its section, wrapped by augmentations from the inside out."""
    name = settings.get("name", "")
    family = make("task", {**TASKS, **_own(name)}, settings)
    if isinstance(augmentations, Mapping):
        augmentations = (augmentations,)
    for augmentation in augmentations:
        family = make("augmentation", AUGMENTATIONS, augmentation, family=family)
    return family


def optimizer(settings: Mapping) -> base.LearnedOptimizer:
    """An optimizer from its section. Only names in `OPTIMIZERS`: exports go through here."""
    return make("optimizer", OPTIMIZERS, settings)


def meta_optimizer(settings, steps: int) -> optax.GradientTransformation:
    """One optax transformation from a section, or a chain from several. Schedules that need to know
    how long they last are told `steps` unless they say otherwise."""
    if not isinstance(settings, Mapping):
        return optax.chain(*(meta_optimizer(one, steps) for one in settings))

    def resolve(value):
        if not isinstance(value, Mapping):
            return value
        length = next((k for k in ("decay_steps", "transition_steps") if _has(value, k)), None)
        return make("schedule", SCHEDULES, {**({length: steps} if length else {}), **value})

    settings = {key: resolve(value) for key, value in settings.items()}
    return make("meta-optimizer", META_OPTIMIZERS, settings)


def make(kind: str, table: Mapping[str, Callable], settings: Mapping, **given):
    """table[settings["name"]] called with the other settings and what is `given` by the program."""
    settings = dict(settings)
    if "name" not in settings:
        raise ValueError(f"The {kind} has no name: add name= one of {', '.join(sorted(table))}.")
    name = settings.pop("name")
    if name not in table:
        raise ValueError(unknown(kind, name, table))
    factory = table[name]
    known = inspect.signature(factory).parameters
    for key in set(given) - set(known):
        raise ValueError(f"The {kind} {name!r} knows no {key}: leave that section out.")
    return factory(**given, **check(f"{kind} {name!r}", factory, settings, hidden=given))


def call(section: str, factory: Callable, config: Mapping):
    """A factory without a name, called with a section of the configuration."""
    return factory(**check(section, factory, config.get(section, {})))


def fill(section: str, record: type, settings: Mapping):
    """A NamedTuple from a section of the configuration."""
    return record(**check(section, record, settings))


def check(where: str, factory: Callable, settings: Mapping, hidden=()) -> dict:
    """The settings, if each is a parameter of `factory` and of its annotated type.

    Lists become tuples and, where a float is wanted, ints become floats.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"{where} is {settings!r}, where settings are expected: dict(key=value).")
    parameters = inspect.signature(factory).parameters
    hints = _hints(factory)
    valid = [key for key in parameters if key not in hidden]
    out = {}
    for key, value in settings.items():
        if key not in valid:
            raise ValueError(unknown("setting", key, valid, where))
        out[key] = fits(where, key, value, hints.get(key, Any))
    return out


def fits(where: str, key: str, value, hint):
    """The value in the type of `hint`; ValueError where it is of another."""
    if _is(value, hint):
        return tuple(value) if isinstance(value, list) else value
    if isinstance(value, int) and not isinstance(value, bool) and _is(float(value), hint):
        return float(value)
    wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else None
    raise ValueError(
        f"{key}={value!r} in {where} is a {type(value).__name__}: "
        f"a {wanted or str(hint).replace('typing.', '').replace('collections.abc.', '')} is needed."
    )


def unknown(kind: str, name, valid, where: str = "") -> str:
    """The sentence about a name that is not known: the nearest that is, and all of them."""
    valid = sorted(map(str, valid))
    near = difflib.get_close_matches(str(name), valid, 1, 0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    place = f" in {where}" if where else ""
    return f"Unknown {kind} {name!r}{place}. {hint}There is {', '.join(valid) or 'none'}."


def plain(config):
    """A configuration as dicts, tuples, strings and numbers alone."""
    if hasattr(config, "to_dict"):
        config = config.to_dict()
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return tuple(plain(value) for value in config)
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise ValueError(f"{config!r} in a configuration is no text, number, tuple or dict.")


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
        raise ValueError(
            f"The task {name!r} could not be imported ({error}): write "
            "path/to/file.py:function or package.module:function."
        ) from error


def _has(settings: Mapping, key: str) -> bool:
    factory = SCHEDULES.get(settings.get("name"))
    return factory is not None and key in inspect.signature(factory).parameters


def _hints(factory) -> dict:
    try:
        return typing.get_type_hints(factory)
    except (NameError, TypeError):  # Annotations of other libraries need not resolve.
        return {}


def _is(value, hint) -> bool:
    """Whether a plain value fits an annotation; annotations beyond plain data fit everything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, one) for one in arguments)
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        return (
            isinstance(value, list | tuple)
            and len(value) == len(arguments)
            and all(map(_is_close, value, arguments))
        )
    if origin in (tuple, list, Sequence):
        return isinstance(value, list | tuple) and all(_is_close(x, arguments[0]) for x in value)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        return isinstance(value, hint) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if hint in (None, type(None)):
        return value is None
    return True


def _is_close(value, hint) -> bool:
    return _is(value, hint) or (type(value) is int and _is(float(value), hint))
