"""From a configuration to everything that a run needs: `Experiment`.

A section of a configuration is a dict with a `name` and settings: the keyword arguments of what the
name stands for in the kind's registry (`tasks.registry`, `optimizers.registry`,
`estimators.registry`, `meta_optimizers`, and `sections.HORIZONS`).
"""

import functools
import inspect
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l.console import schema
from l2l.console.errors import UserError
from l2l.core import base
from l2l.core.unroll import Inner
from l2l.estimators import autodiff, first_order, mixture, objective
from l2l.estimators.registry import ESTIMATORS
from l2l.optimizers import ranges
from l2l.optimizers.registry import optimizer
from l2l.tasks import called
from l2l.tasks import registry as tasks
from l2l.tasks.losses import LOSSES
from l2l.tasks.registry import task
from l2l.training import curriculum
from l2l.training.meta_optimizers import meta_optimizer
from l2l.training.meta_step import Meta
from l2l.training.sections import HORIZONS, LENGTH, SECTIONS, Evaluation, Running, Saving, Theta


class Experiment(NamedTuple):
    """What `run.train` runs.

    config:        plain data, as it was typed; config.json holds the defaults as well.
    specification: the part of it that rebuilds the optimizer.
    families:      what is trained on: one, or several that make a mixture.
    weights:       of the families in a mixture.
    reads:         for each family, which entry of `data()` is its own.
    objective:     the meta-loss, of all families.
    start:         an export or released name whose theta training begins with; "" for a fresh one.
                   A run reads its own copy.
    judged:        what the optimizer is compared with Adam on: (name, family) pairs.
    """

    config: dict
    specification: dict
    seed: int
    families: tuple[base.TaskFamily, ...]
    weights: tuple[float, ...]
    reads: tuple[int, ...]
    objective: objective.Objective
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
        """What the estimator reads: a family's data, or for a mixture a tuple of them, in which
        those that are equal are one object."""
        loaded = []
        for i in range(max(self.reads) + 1):
            new = self.families[self.reads.index(i)].data()
            loaded.append(next((old for old in loaded if _equal(old, new)), new))
        return loaded[0] if len(self.families) == 1 else tuple(loaded)

    def data_of(self, data, index: int):
        """The part of `data()` that belongs to a family."""
        return data if len(self.families) == 1 else data[self.reads[index]]

    def problems(self) -> int:
        """How many inner problems a meta-step has, of all families together."""
        return self.running.num_problems * len(self.families)

    def inner_steps(self, meta_steps: int) -> int:
        """How many inner steps so many meta-steps take, of all runs together."""
        # Evolution strategies train every problem twice, by either sign of the noise.
        runs = 2 if self.config.get("estimator", {}).get("name") == "pes" else 1
        return meta_steps * self.problems() * runs * self.inners[0].length


def build_experiment(config: Mapping) -> Experiment:
    """Builds everything that a configuration (a ConfigDict or dict) describes.

    Raises:
      UserError: a key or name that is unknown (the nearest known one is named), or a value of the
        wrong type or out of range.
    """
    config = dict(schema.plain(config))
    for key in config:
        if key not in SECTIONS:
            raise UserError(schema.unknown("section", key, SECTIONS, "config"))
    whole = {**SECTIONS, **config}
    running = _running(whole["meta"])
    specification = whole["optimizer"]
    built = optimizer(specification)
    imitation = schema.fill("imitation", curriculum.Imitation, whole["imitation"]).checked()
    evaluation = schema.fill("evaluation", Evaluation, whole["evaluation"])
    _check_compared(evaluation)
    families, weights = _mixture(whole)
    judged = _judged(whole, evaluation.tasks)
    learned = _learner(built, whole["theta"], families, judged)
    _check_against(evaluation, specification, learned, judged)
    if not jax.tree.leaves(jax.eval_shape(learned.init, jax.random.key(0))):
        raise UserError(
            f"The optimizer {specification['name']!r} has nothing to learn, as all of its settings "
            "are fixed: set learned=True in its section, or theta.start=True for a start of runs."
        )
    losses = objective.objective(
        **schema.check("objective", objective.objective, whole["objective"])
    )
    estimators, inners = zip(
        *(_estimator(whole, family, learned, losses, imitation) for family in families),
        strict=True,
    )
    reads = _reads(families)
    single = len(families) == 1
    horizons = schema.make(
        "horizon", HORIZONS, whole["horizon"], {"steps": running.steps, "imitation": imitation}
    )
    _check_start(whole["estimator"], learned, horizons.longest, inners[0].length)
    return Experiment(
        config=config,
        specification=specification,
        seed=schema.seed("config", whole["seed"]),
        families=families,
        weights=weights,
        reads=reads,
        objective=losses,
        start=schema.fits("config", "start", whole["start"], str),
        judged=judged,
        optimizer=learned,
        inners=inners,
        meta=Meta(
            estimators[0] if single else mixture.mixture(list(estimators), weights, reads=reads),
            learned,
            meta_optimizer(running.optimizer, running.steps),
            running.num_problems,
            running.clip,
        ),
        curriculum=horizons,
        running=running,
        evaluation=evaluation,
        saving=schema.fill("checkpoint", Saving, whole["checkpoint"]),
    )


def _running(section) -> Running:
    running = schema.fill("meta", Running, section)
    # Every call of the compiled program takes the same number of meta-steps.
    running = running._replace(group=math.gcd(running.steps, running.group))
    if not 0.0 < running.blend <= 1.0:
        raise UserError(
            f"meta.blend={running.blend} is not a share of the way from the first theta to the "
            "trained one: use a number above 0 and at most 1."
        )
    if not running.clip > 0.0:
        raise UserError(
            f"meta.clip={running.clip} is no length that a meta-gradient can be cut to: use a "
            "number above 0, or inf to leave them as long as they are."
        )
    return running


def _check_compared(evaluation: Evaluation) -> None:
    if not evaluation.horizons:
        raise UserError(
            "evaluation.horizons=() leaves the comparison without a length: name one number of "
            "inner steps or more. The optimizer is saved before the comparison, which Ctrl-C ends."
        )


def _check_against(evaluation: Evaluation, specification: Mapping, learned, judged) -> None:
    against = evaluation.against
    if against not in ("adam", "random_search"):
        raise UserError(schema.unknown("rival", against, ("adam", "random_search"), "evaluation"))
    if against == "adam":
        return
    if specification["name"] != "learned_adamw":
        raise UserError(
            "evaluation.against='random_search' draws settings of the optimizer 'learned_adamw', "
            f"but this one is {specification['name']!r}: choose the former, or against='adam'."
        )
    if learned.start is not None:
        return  # A start is compared with other starts.
    if learned.loss is not None:
        raise UserError(
            "evaluation.against='random_search' draws settings of AdamW alone, but theta.loss is "
            "learned too: leave it out, or choose against='adam'."
        )
    if len(judged) > 1 or len(evaluation.horizons) != 1:
        names, steps = ", ".join(name for name, _ in judged), evaluation.horizons
        raise UserError(
            "evaluation.against='random_search' compares on one task at one horizon, but the tasks "
            f"are {names} and evaluation.horizons={steps}: choose one of each, or against='adam'."
        )


def _learner(learned, section, families, judged) -> base.LearnedOptimizer:
    """The optimizer, and with it what else theta holds of an inner run."""
    held = schema.fill("theta", Theta, section)
    if not held.start and not held.loss:
        return learned
    key = jax.random.key(0)
    shapes = [jax.eval_shape(lambda k, f=f: f.init(k, f.sample(k)), key) for f in families]
    odd = next((i for i, other in enumerate(shapes) if not _alike(other, shapes[0])), None)
    if odd is not None:
        raise UserError(
            f"Tasks {families[0].name} and {families[odd].name} have different parameters, but "
            "theta.start and theta.loss fit one network only: train on tasks that share it."
        )

    loss = schema.make("loss", LOSSES, held.loss) if held.loss else None
    if loss is not None and loss.check is not None:
        for family in families:
            loss.check(family)

    def held_for(params):
        """Shapes of what theta holds beside its optimizer, for a model of these."""
        return (
            params if held.start else (),
            jax.eval_shape(loss.init, key, params) if loss else (),
        )

    for name, family in judged:
        own = jax.eval_shape(lambda k, f=family: f.init(k, f.sample(k)), key)
        if not _alike(held_for(own), held_for(shapes[0])):
            raise UserError(
                f"evaluation.tasks: {name} has other parameters than {families[0].name}, for which "
                "theta.start and theta.loss are learned: compare on tasks that share its network."
            )

    def start(key):
        problem_key, own = jax.random.split(key)
        return families[0].init(own, families[0].sample(problem_key))

    return base.learner(learned, start=start if held.start else None, loss=loss, params=shapes[0])


def _check_start(estimator, learned, longest: int | None, length: int) -> None:
    """UserError for a start alone where some windows have no derivative with respect to it:
    those that do not begin a run."""
    like = jax.eval_shape(learned.init, jax.random.key(0))
    if learned.start is None or jax.tree.leaves(like._replace(start=())):
        return
    factory, _ = schema.factory_of("estimator", ESTIMATORS, estimator)
    # Rounded as horizons are. An exact half counts as less: `longest` itself is hardly ever drawn.
    windows = 1 if longest is None else math.ceil(longest / length - 0.5)
    if factory is autodiff.truncated and windows > 1:
        raise UserError(
            "theta holds the start of runs and nothing else, but of the up to "
            f"{windows} windows of a run (section `horizon`: {longest} steps; "
            f"inner.length={length}) only the first has a truncated meta-gradient: set "
            "inner.length to the steps of a run, or choose the estimator 'pes' or 'reptile'."
        )


def _alike(one, other) -> bool:
    (a, tree), (b, same_tree) = jax.tree.flatten(one), jax.tree.flatten(other)
    kinds = [[(x.shape, x.dtype) for x in leaves] for leaves in (a, b)]
    return tree == same_tree and kinds[0] == kinds[1]


def _mixture(config):
    """(families, weights) of section `task`: one family, or a tuple of them."""
    sections = schema.several(config["task"])
    if not sections:
        raise UserError("task=() leaves nothing to train on: name at least one family.")
    families, weights = [], []
    for section in sections:
        section = schema.named("task", tasks.TASKS, section)
        weights.append(schema.fits("task", "weight", section.pop("weight", 1.0), float))
        ranges.positive("task.weight", weights[-1])
        own = section.pop("augmentations", ())
        families.append(
            task(section, (*schema.several(own), *schema.several(config["augmentations"])))
        )
    return tuple(families), tuple(weights)


def _reads(families) -> tuple[int, ...]:
    """For each family the place of its data among those that differ. Two families read the same
    where their `data` is one function, or `functools.partial` of one with the same arguments;
    what else two functions return is not known before it is loaded (`Experiment.data`)."""

    def source(family):
        data = called.own(family.data)
        if isinstance(data, functools.partial):
            return data.func, data.args, tuple(sorted(data.keywords.items()))
        return data

    different = []
    for family in families:
        if source(family) not in different:
            different.append(source(family))
    return tuple(different.index(source(family)) for family in families)


def _equal(one, other) -> bool:
    """Whether two pytrees of arrays are alike in structure, dtypes, shapes and numbers."""
    (a, tree), (b, same_tree) = jax.tree.flatten(one), jax.tree.flatten(other)
    return tree == same_tree and all(
        x is y or (x.dtype == y.dtype and np.array_equal(x, y))
        for x, y in zip(map(_array, a), map(_array, b), strict=True)
    )


def _array(x):
    if not hasattr(x, "dtype"):
        return np.asarray(x)
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def _judged(config, changes) -> tuple[tuple[str, base.TaskFamily], ...]:
    """The families of section `task` without augmentations, each with each of the changes of
    settings, by names that differ."""
    changes = schema.several(changes)
    if not changes:
        raise UserError(
            "evaluation.tasks=() leaves nothing to compare on: write settings that replace some of "
            "section task, like dict(hidden=(64,)), or {} for the task as it is."
        )
    for change in changes:
        if not isinstance(change, Mapping):
            raise UserError(
                f"evaluation.tasks={change!r} is no change of section task: write settings that "
                "replace some of it, like dict(hidden=(64,)), or {} for the task as it is."
            )
    plain = map(tasks.alone, schema.several(config["task"]))
    return tuple(tasks.distinct([{**one, **change} for one in plain for change in changes]))


def _estimator(config, family, learned, losses, imitation) -> tuple[base.MetaGradient, Inner]:
    settings = {"length": LENGTH, **config["inner"]}
    hidden = ("family", "optimizer")  # The program's, not the user's.
    inner = Inner(family, learned, **schema.check("inner", Inner, settings, hidden))
    if not 0.0 <= inner.hide_horizon_probability <= 1.0:
        raise UserError(
            f"inner.hide_horizon_probability={inner.hide_horizon_probability} is not a "
            "probability: use a number from 0 to 1."
        )
    section = config["estimator"]
    factory, _ = schema.factory_of("estimator", ESTIMATORS, section)
    if learned.rule is None and factory is first_order.first_order:
        raise UserError(
            "Estimator 'first_order' works coordinate by coordinate, which this optimizer cannot, "
            "nor can any whose theta holds a start or a loss: choose 'truncated' or 'pes'."
        )
    if learned.loss is not None and losses.on != "validation":
        raise UserError(
            f"objective.on={losses.on!r} judges theta.loss by the very loss that it sets: set "
            'objective.on to "validation".'
        )
    exact = section["name"] == "pes" or section.get("order") == "exact"
    if learned.loss is not None and not exact:
        raise UserError(
            "theta.loss acts through the gradients of inner training, which a first-order "
            'estimator holds constant: choose dict(name="truncated", order="exact") or "pes".'
        )
    given = {"inner": inner, "objective": losses, "teacher": None}
    if imitation.weight or imitation.final:
        if "teacher" not in inspect.signature(factory).parameters:
            raise UserError(
                f"Estimator {section['name']!r} cannot imitate Adam: "
                "set imitation.weight and imitation.final to 0."
            )
        given["teacher"] = first_order.Teacher(learning_rate=imitation.learning_rate)
    return schema.make("estimator", ESTIMATORS, section, given), inner
