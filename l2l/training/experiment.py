"""Configuration to objects. What a name in a configuration may be is one visible dict a kind.

A section of a configuration is a dict with a `name`, a key of that kind's dict, and settings: the
keyword arguments of what the dict holds (see `schema.py`).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import optax

from l2l import tasks
from l2l.console import modules
from l2l.console import schema as checks
from l2l.console.errors import UserError
from l2l.core import base
from l2l.core.unroll import Inner
from l2l.estimators import autodiff, first_order, mixture, objective, pes
from l2l.optimizers import baselines, lstm
from l2l.optimizers import by_parameter as partition
from l2l.tasks import called
from l2l.training import curriculum
from l2l.training.meta_step import Meta

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


def by_parameter(parts: Mapping, labels: Sequence) -> base.LearnedOptimizer:
    """`partition.by_parameter` of the optimizers that `parts`, {label: section}, describe."""
    return partition.by_parameter({label: optimizer(part) for label, part in parts.items()}, labels)


OPTIMIZERS = {
    "adam": partition.adam,
    "by_parameter": by_parameter,
    "dm": lstm.dm,
    "learned_adam": baselines.learned_adam,
    "lstm": lstm.lstm,
    "rnnprop": lstm.rnnprop,
}
ESTIMATORS = {
    "first_order": first_order.first_order,
    "pes": pes.pes,
    "truncated": autodiff.truncated,
}
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
LENGTH = 20  # Of a window, unless section `inner` says otherwise.


class Running(NamedTuple):
    """Section `meta`.

    steps:        meta-steps of the whole run.
    num_problems: inner problems, split over the devices.
    group:        meta-steps a call of the compiled program (and between signs of life).
    clip:         the largest norm of one problem's meta-gradient.
    max_bad:      training stops after so many non-finite meta-gradients in a row.
    blend:        the theta at the end is that of the beginning plus so much of the way to the
                  trained one: between them lie optimizers that keep what the first does well on
                  other tasks (as in WiSE-FT; Wortsman et al. 2022).
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
    tasks:        what to compare on: settings that replace some of section `task`, or several such
                  dicts; {} is that section itself. Always without augmentations.
    """

    horizons: Sequence[int] = (500, 1000)
    num_problems: int = 12
    every: int = 500
    tasks: Any = MappingProxyType({})


class Saving(NamedTuple):
    """Section `checkpoint`: every how many meta-steps, and how many of the last are kept."""

    every: int = 200
    keep: int = 3


class Experiment(NamedTuple):
    """What `train.run` runs.

    config:        plain data, as config.json holds it.
    specification: the part of it that rebuilds the optimizer.
    families:      what is trained on: one, or several that make a mixture.
    reads:         for each family, which entry of `data()` is its own.
    start:         an export or released name whose theta training begins with; "" for a fresh one.
    judged:        what the optimizer is compared with Adam on: (name, family) pairs.
    """

    config: dict
    specification: dict
    seed: int
    families: tuple[base.TaskFamily, ...]
    reads: tuple[int, ...]
    start: str
    judged: tuple[tuple[str, base.TaskFamily], ...]
    optimizer: base.LearnedOptimizer
    inners: tuple[Inner, ...]
    meta: Meta
    curriculum: curriculum.Curriculum
    running: Running
    evaluation: Evaluation
    saving: Saving

    def data(self):
        """What the estimator reads: a family's data, or for a mixture a tuple of them."""
        loaded = tuple(
            self.families[self.reads.index(i)].data() for i in range(max(self.reads) + 1)
        )
        return loaded[0] if len(self.families) == 1 else loaded

    def data_of(self, data, index: int):
        """The part of `data()` that belongs to a family."""
        return data if len(self.families) == 1 else data[self.reads[index]]


# With what stands for a section that is left out.
SECTIONS: Mapping[str, Any] = MappingProxyType(
    {
        "seed": 0,
        "start": "",
        "task": {"name": "mlp"},
        "augmentations": (),
        "optimizer": {"name": "lstm"},
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


def experiment(config: Mapping) -> Experiment:
    """Builds everything that a configuration (a ConfigDict or dict) describes.

    Raises:
      UserError: a key or name that is not known (with the nearest that is), or a value of the
        wrong type or out of range.
    """
    config = checks.plain(config)
    for key in config:
        if key not in SECTIONS:
            raise UserError(checks.unknown("section", key, SECTIONS, "config"))
    whole = {**SECTIONS, **config}
    running = checks.fill("meta", Running, whole["meta"])
    # Every call of the compiled program takes the same number of meta-steps.
    running = running._replace(group=math.gcd(running.steps, running.group))
    if not 0.0 < running.blend <= 1.0:
        raise UserError(
            f"meta.blend={running.blend} is no part of the way from the first theta to the trained "
            "one: use a number above 0 and at most 1."
        )
    specification = whole["optimizer"]
    learned = optimizer(specification)
    imitation = checks.fill("imitation", curriculum.Imitation, whole["imitation"])
    evaluation = checks.fill("evaluation", Evaluation, whole["evaluation"])
    families, weights, sources = _mixture(whole)
    estimators, inners = zip(
        *(_estimator(whole, family, learned, imitation) for family in families), strict=True
    )
    reads = tuple(list(dict.fromkeys(sources)).index(source) for source in sources)
    single = len(families) == 1
    horizons = whole["horizon"]
    return Experiment(
        config=config,
        specification=specification,
        seed=checks.fits("config", "seed", whole["seed"], int),
        families=families,
        reads=reads,
        start=checks.fits("config", "start", whole["start"], str),
        judged=_judged(whole, evaluation.tasks),
        optimizer=learned,
        inners=inners,
        meta=Meta(
            estimators[0] if single else mixture.mixture(list(estimators), weights, reads=reads),
            learned,
            meta_optimizer(running.optimizer, running.steps),
            running.num_problems,
            running.clip,
        ),
        curriculum=make(
            "horizon", HORIZONS, horizons, {"steps": running.steps, "imitation": imitation}
        ),
        running=running,
        evaluation=evaluation,
        saving=checks.fill("checkpoint", Saving, whole["checkpoint"]),
    )


def _mixture(config):
    """(families, weights, what each reads) of section `task`: one family, or a tuple of them."""
    sections = config["task"]
    sections = (sections,) if isinstance(sections, Mapping) else sections
    if not sections:
        raise UserError("task=() leaves nothing to train on: name at least one family.")
    families, weights, sources = [], [], []
    for section in sections:
        section = dict(section)
        weights.append(checks.fits("task", "weight", section.pop("weight", 1.0), float))
        own = section.pop("augmentations", ())
        families.append(task(section, (*_several(own), *_several(config["augmentations"]))))
        sources.append(section.get("dataset", setting_of(section.get("name"), "dataset")))
    return tuple(families), weights, sources


def _judged(config, changes) -> tuple[tuple[str, base.TaskFamily], ...]:
    """The plain families of section `task`, each with each of the changes of settings."""
    sections = config["task"]
    out = []
    for section in _several(sections):
        plain = {k: v for k, v in section.items() if k not in ("weight", "augmentations")}
        for change in _several(changes):
            family = task({**plain, **change})
            values = " ".join(
                "-".join(map(str, v if isinstance(v, tuple | list) else [v]))
                for k, v in change.items()
                if sum(change[k] != other.get(k) for other in _several(changes))
            )
            out.append((" ".join(filter(None, (family.name, values))), family))
    return tuple(out)


def setting_of(name: str, key: str):
    """The default of a task's setting; of what has none, the task's name."""
    parameters = inspect.signature(TASKS[name]).parameters if name in TASKS else {}
    return parameters[key].default if key in parameters else name


def _estimator(config, family, learned, imitation) -> tuple[base.MetaGradient, Inner]:
    settings = {"length": LENGTH, **config["inner"]}
    hidden = ("family", "optimizer")  # The program's, not the user's.
    inner = Inner(family, learned, **checks.check("inner", Inner, settings, hidden))
    losses = objective.objective(
        **checks.check("objective", objective.objective, config["objective"])
    )
    section = config["estimator"]
    factory, _ = _factory("estimator", ESTIMATORS, section)
    if learned.rule is None and factory is first_order.first_order:
        raise UserError(
            "Estimator 'first_order' works coordinate by coordinate, which this optimizer does "
            "not: choose 'truncated' or 'pes'."
        )
    given = {"inner": inner, "objective": losses, "teacher": None}
    if imitation.weight or imitation.final:
        if "teacher" not in inspect.signature(factory).parameters:
            raise UserError(
                f"Estimator {section['name']!r} cannot imitate Adam: "
                "set imitation.weight and imitation.final to 0."
            )
        given["teacher"] = first_order.Teacher(learning_rate=imitation.learning_rate)
    return make("estimator", ESTIMATORS, section, given), inner


def task(settings: Mapping, augmentations: Sequence[Mapping] = ()) -> base.TaskFamily:
    """A family from its section, wrapped by augmentations from the inside out. Errors in it say
    which of its functions was called with what (`tasks.called`)."""
    family = make("task", {**TASKS, **_own(settings)}, settings)
    if not isinstance(family, base.TaskFamily):
        raise UserError(
            f"The task {settings['name']!r} returned {str(family)[:100]}: let it return an "
            "l2l.TaskFamily of its functions sample, init, batch and loss."
        )
    family = called.named(family, settings["name"])
    for augmentation in _several(augmentations):
        family = make("augmentation", AUGMENTATIONS, augmentation, {"family": family})
    return family


def _several(sections) -> tuple:
    return (sections,) if isinstance(sections, Mapping) else tuple(sections)


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


def make(kind: str, table: Mapping[str, Callable], settings: Mapping, given: Mapping = {}):
    """table[settings["name"]] called with the other settings and with those of what is `given` by
    the program that it takes."""
    factory, rest = _factory(kind, table, settings)
    name, known = settings["name"], inspect.signature(factory).parameters
    own = {key: value for key, value in given.items() if key in known}
    arguments = {**own, **checks.check(f"{kind} {name!r}", factory, rest, given)}
    lacking = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and key not in arguments
    ]
    if lacking:
        raise UserError(f"The {kind} {name!r} needs {', '.join(lacking)}: add it to its section.")
    return factory(**arguments)


def _factory(kind: str, table: Mapping[str, Callable], settings: Mapping):
    """(table[settings["name"]], the other settings)."""
    if not isinstance(settings, Mapping) or "name" not in settings:
        raise UserError(
            f"The {kind} {settings!r} has no name: write dict(name=…, …) with one of "
            f"{', '.join(sorted(table))}."
        )
    settings = dict(settings)
    name = settings.pop("name")
    if name not in table:
        raise UserError(checks.unknown(kind, name, table))
    return table[name], settings


def _own(settings: Mapping) -> dict[str, Callable]:
    """The user's own factory: name="path/to/file.py:factory" or "package.module:factory"."""
    name = settings.get("name") if hasattr(settings, "get") else None
    if not isinstance(name, str) or ":" not in name:
        return {}
    place, _, attribute = name.rpartition(":")
    return {name: modules.attribute(place, attribute, "task")}


def _has(settings: Mapping, key: str) -> bool:
    factory = SCHEDULES.get(settings.get("name"))
    return factory is not None and key in inspect.signature(factory).parameters


def settings_of(path: tuple[str, ...], config: Mapping) -> Mapping[str, Any] | None:
    """{key: its default, or None} of what may stand in a section of a configuration: ("meta",) or
    ("optimizer", "parts", "net"), () for the configuration itself. None where that depends on what
    is not known here."""
    if not path:
        return SECTIONS
    if record := _RECORDS.get(path[0]) if len(path) == 1 else None:
        return _settings(record, ("family", "optimizer") if record is Inner else ())
    section: Any = config
    for key in path:
        section = section.get(key) if hasattr(section, "get") else None
    if not hasattr(section, "get"):
        return None
    table = dict(_table(path) or {})
    if path == ("task",):
        table |= _own(section)
    factory = table.get(section.get("name"))
    if factory is None:
        return None
    mixture_own = {"weight": 1.0, "augmentations": ()} if path == ("task",) else {}
    hidden = ("steps", "imitation", "inner", "objective", "teacher", "family")
    return {"name": section["name"], **_settings(factory, hidden), **mixture_own}


_RECORDS = {
    "checkpoint": Saving,
    "evaluation": Evaluation,
    "imitation": curriculum.Imitation,
    "inner": Inner,
    "meta": Running,
    "objective": objective.objective,
}
_NAMED = {
    "augmentations": AUGMENTATIONS,
    "estimator": ESTIMATORS,
    "horizon": HORIZONS,
    "optimizer": OPTIMIZERS,
    "task": TASKS,
}


def _table(path: tuple[str, ...]) -> Mapping[str, Callable] | None:
    """What the names of a section are the keys of."""
    if path[:2] == ("meta", "optimizer"):
        return META_OPTIMIZERS if len(path) == 2 else SCHEDULES
    if path[:2] == ("optimizer", "parts"):
        return OPTIMIZERS
    return _NAMED.get(path[0]) if len(path) == 1 else None


def _settings(factory: Callable, hidden: Sequence[str] = ()) -> dict[str, Any]:
    known = {"length": LENGTH} if factory is Inner else {}
    for key, parameter in inspect.signature(factory).parameters.items():
        if key not in hidden and parameter.kind is not parameter.VAR_KEYWORD:
            default = parameter.default
            known.setdefault(key, None if default is parameter.empty else default)
    return known
