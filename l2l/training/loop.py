"""Meta-training, a group of meta-steps at a time: `start` an experiment, then `advance` it.

    loop = start(build_experiment(config))
    while loop.step < loop.experiment.running.steps:
        group = loop.advance()
        print(loop.step, group.metrics["meta_loss"].mean())
    theta = loop.theta

`run.py` adds what a run in a directory has: logs, checkpoints, signals, comparisons.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from l2l.cluster import collectives
from l2l.core import base
from l2l.training import ahead_of_time, finish, meta_step
from l2l.training.experiment import Experiment

# Folded into the seed's key: what is not training must not share its random numbers.
TRAIN, VALIDATE, COMPARE, FINAL = range(4)


class Snapshot(NamedTuple):
    """What a checkpoint holds. memory: of the curriculum. seconds: of training so far."""

    state: base.MetaState
    memory: base.PyTree
    seconds: jax.Array | float


class Layout(NamedTuple):
    """Where arrays live: `problems` split over the devices, `same` on each of them."""

    devices: list
    problems: NamedSharding
    same: NamedSharding

    def of(self, tree):
        """The shardings of a `Snapshot` or `MetaState`: inner problems split, all else the same."""
        parts: Any = meta_step.split_of(self.same, self.problems)
        if isinstance(tree, Snapshot):
            same: Any = self.same
            parts = Snapshot(parts, same, same)
        return jax.tree.broadcast(parts, tree)


class Group(NamedTuple):
    """The result of one call of the compiled meta-steps.

    metrics: {name: NumPy array [meta-steps of the group, num_problems]}.
    before:  the `MetaState` that it began with, as the devices hold it.
    stage:   of the curriculum, and `name`, what to call it.
    """

    metrics: dict[str, np.ndarray]
    before: base.MetaState
    stage: base.Stage
    name: str


class Loop:
    """Meta-training in progress.

    step:    meta-steps taken.
    state:   the `MetaState`, as the devices hold it; `gather` gives it as checkpoints do.
    memory:  the curriculum's.
    seconds: of training so far, those of earlier runs that this one goes on from included.
    """

    def __init__(self, experiment: Experiment, layout: Layout, data, snapshot: Snapshot):
        self.experiment, self.layout, self.data = experiment, layout, data
        self.memory, self.seconds = snapshot.memory, float(snapshot.seconds)
        # Its file is read now: at the end that may hold another, or be gone.
        blends = experiment.running.blend < 1.0
        self._first = jax.device_get(_first_theta(experiment)) if blends else None
        where = meta_step.split_of(layout.same, layout.problems)
        spread = partial(meta_step.spread, num_devices=len(layout.devices))
        self.state = jax.jit(spread, out_shardings=where)(snapshot.state)
        self.gather = jax.jit(meta_step.gather, out_shardings=where)
        self.step = int(self.state.step)
        group = experiment.running.group
        self._steps = meta_step.compile_steps(experiment.meta, group, layout.devices)

    @property
    def key(self) -> jax.Array:
        """The key that all random numbers of the run come from."""
        return jax.random.key(self.experiment.seed)

    @property
    def theta(self):
        """What has been learned so far, on the host."""
        return jax.device_get(self.state.theta)

    @theta.setter
    def theta(self, theta):
        self.state = self.state._replace(theta=collectives.place(theta, self.layout.same))

    def compile(self) -> str:
        """Compiles the meta-steps before the first one; returns a sentence on what they take."""
        self._steps, sentence = ahead_of_time.prepare(self._steps, self.state, self.data)
        steps = self.experiment.running.steps
        return sentence + ahead_of_time.remaining(self.seconds, self.step, steps)

    def advance(self) -> Group:
        """Takes a group of meta-steps."""
        began = time.monotonic()
        stage, name = self.experiment.curriculum.stage(self.memory, self.step)
        stage = collectives.place(jax.tree.map(np.float32, stage), self.layout.same)
        before = self.state._replace(stage=stage)
        state, metrics = self._steps(before, self.data)
        collectives.wait(metrics)
        metrics = jax.device_get(metrics)
        # Only now, and all at once: where the group failed, the loop is as it was before.
        self.state = state
        self.seconds += time.monotonic() - began
        self.step += self.experiment.running.group
        return Group(metrics, before, stage, name)

    def passed(self, every: int) -> bool:
        """Whether the last group took a meta-step whose number is a multiple of `every`; never for
        0."""
        before = self.step - self.experiment.running.group
        return every > 0 and self.step // every > before // every

    def snapshot(self) -> Snapshot:
        """For a checkpoint."""
        # Every process measures the time for itself: process 0's is saved.
        rest = (self.memory, np.float32(collectives.broadcast(self.seconds)))
        return Snapshot(self.gather(self.state), *collectives.place(rest, self.layout.same))

    def result(self):
        """The theta that the training gives: the curriculum's choice, and of the way there from the
        first theta the part that `meta.blend` says."""
        theta = jax.device_get(self.experiment.curriculum.finish(self.memory, self.state.theta))
        part = self.experiment.running.blend
        if part == 1.0:
            return theta
        return jax.tree.map(
            lambda x, y: x + np.asarray(part, x.dtype) * (y - x), self._first, theta
        )


def start(
    experiment: Experiment, devices: Sequence | None = None, snapshot: Snapshot | None = None
) -> Loop:
    """Loads the data, and places them and the state on the devices.

    Args:
      devices: all by default, of all processes.
      snapshot: to resume from; by default training begins afresh.

    Raises:
      UserError: the devices do not divide the problems, the processes read different data, or a
        window is longer than the runs that training is to begin with.
    """
    layout = layout_of(experiment, devices)
    snapshot = _fresh(experiment, layout) if snapshot is None else snapshot
    data = experiment.data()
    collectives.alike(
        map(np.ascontiguousarray, jax.tree.leaves(data)),
        "The processes read different data: give them the same files.",
    )
    return Loop(experiment, layout, placed(data, layout.same), snapshot)


def layout_of(experiment: Experiment, devices: Sequence | None = None) -> Layout:
    """Problems split over the devices, by default all of all processes."""
    devices = meta_step.devices_for(experiment.running.num_problems, devices)
    mesh = Mesh(devices, (meta_step.AXIS,))
    problems = NamedSharding(mesh, PartitionSpec(meta_step.AXIS))
    return Layout(devices, problems, NamedSharding(mesh, PartitionSpec()))


def shapes(experiment: Experiment) -> Snapshot:
    """What a snapshot of the experiment looks like: `jax.ShapeDtypeStruct`s."""
    key = jax.random.key(experiment.seed)
    theta = jax.eval_shape(experiment.optimizer.init, key)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), theta)
    memory = experiment.curriculum.start(zeros)
    stage = _first_stage(experiment, memory)
    state = jax.eval_shape(lambda k, s: meta_step.meta_init(k, experiment.meta, s), key, stage)
    memory = jax.eval_shape(lambda: memory)
    seconds: Any = jax.ShapeDtypeStruct((), jnp.float32)
    return Snapshot(state, memory, seconds)


def placed(data, same):
    """`collectives.place` of data in which arrays may stand several times: each is placed once."""
    leaves, tree = jax.tree.flatten(data)
    different = {id(leaf): leaf for leaf in leaves}
    there = collectives.place(list(different.values()), same)
    by_leaf = dict(zip(different, there, strict=True))
    return jax.tree.unflatten(tree, [by_leaf[id(leaf)] for leaf in leaves])


def _fresh(experiment: Experiment, layout: Layout) -> Snapshot:
    key, plan = jax.random.key(experiment.seed), experiment.curriculum
    for inner in experiment.inners:
        plan.check(inner.length)
    theta = experiment.optimizer.init(key)  # Only its shapes matter to the first stage.
    stage = _first_stage(experiment, plan.start(theta))
    state = meta_step.meta_init(jax.random.fold_in(key, TRAIN), experiment.meta, stage)
    state = state._replace(theta=_first_theta(experiment))
    memory = plan.start(jax.device_get(state.theta))
    # Placed as the compiled program leaves it, which otherwise would be compiled twice.
    return Snapshot(collectives.place(state, layout.of(state)), memory, 0.0)


def _first_theta(experiment: Experiment):
    """What training begins with."""
    if experiment.start:
        return finish.earlier(experiment)[0]
    key = jax.random.fold_in(jax.random.key(experiment.seed), TRAIN)
    return meta_step.first_theta(key, experiment.optimizer)


def _first_stage(experiment: Experiment, memory) -> base.Stage:
    return jax.tree.map(jnp.float32, experiment.curriculum.stage(memory, 0)[0])
