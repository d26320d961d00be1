"""The only Python loop: meta-trains an experiment in a directory, from wherever it stands there."""

import contextlib
import functools
import math
import signal
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2l.cluster import collectives as cluster
from l2l.console.errors import UserError
from l2l.core import base
from l2l.storage import checkpoint, files
from l2l.training import ahead_of_time as preflight
from l2l.training import curriculum, diagnose
from l2l.training import experiment as build
from l2l.training import finish as outcome
from l2l.training import meta_step as meta
from l2l.training.run_directory import Signals, entered, shared
from l2l.training.run_log import clock, progress, silence

# What `run` returns and the command exits with. Any other code is an error that a user can mend
# (2) or a bug (1).
DONE, NOT_FINITE, INTERRUPTED, TERMINATED = 0, 3, 130, 143
# Folded into the seed's key: what is not training must not share its random numbers.
TRAIN, VALIDATE, COMPARE, FINAL = range(4)


class Snapshot(NamedTuple):
    """What a checkpoint holds. seconds: of training so far."""

    state: base.MetaState
    memory: base.PyTree
    seconds: jax.Array


class Layout(NamedTuple):
    """Where arrays live: `problems` split over the devices, `same` on each of them."""

    devices: list
    problems: NamedSharding
    same: NamedSharding


def run(
    experiment: build.Experiment, directory, devices: Sequence[jax.Device] | None = None
) -> int:
    """Trains to the end, or until a signal; goes on where an earlier run in `directory` left off.

    Args:
      devices: all by default, of all processes. Another run may go on with others: it makes no
        difference.

    Returns:
      0 when training is done and evaluated; 130 or 143 after SIGINT or SIGTERM, everything saved;
      3 when for `meta.max_bad` meta-steps in a row, or in all of a shorter run, some family had no
        meta-gradient that was finite.

    Raises:
      UserError: the directory holds another configuration, or a second run is at work in it, or
        the devices do not divide the problems; or the processes do not see the same files; or
        the directory cannot be written; or a task has a loss of which objective.form="log" cannot
        take the logarithm, and then nothing is exported.
    """
    directory = files.local(directory)
    devices = meta.devices_for(experiment.running.num_problems, devices)
    with contextlib.ExitStack() as held:

        def enter():
            held.enter_context(entered(directory, experiment.config))
            return outcome.finished(directory)

        summary = cluster.together(enter)
        if summary:
            _say(f"{directory} holds a finished run. Its result:\n", sys.stderr)
            _say(summary)
            return DONE
        shared(directory, experiment.config)
        with Signals() as signals:
            return _run(experiment, directory, devices, signals)


def _run(experiment, directory, devices, signals) -> int:
    """Opens what a run needs, trains, and concludes."""
    mesh = Mesh(devices, (meta.AXIS,))
    layout = Layout(devices, NamedSharding(mesh, P(meta.AXIS)), NamedSharding(mesh, P()))
    key = jax.random.key(experiment.seed)
    like = _like(experiment, key)
    sentences: list[str] = []
    saver = checkpoint.saver(directory / "checkpoints", experiment.saving.keep, sentences.append)
    try:
        found = saver.restore(like, _where(like, layout))
        start = found[1] if found else 0
        logs = progress if cluster.first() else silence
        out = logs(directory, experiment.running.steps, start)
        try:
            for sentence in (*sentences, _opening(experiment, directory, devices, like, start)):
                out.say(sentence)
            snapshot = found[0] if found else _fresh(experiment, key, layout)
            data = experiment.data()
            cluster.alike(
                map(np.ascontiguousarray, jax.tree.leaves(data)),
                "The processes read different data: give them the same files.",
            )
            data = _placed(data, layout.same)
            code, snapshot = _train(
                experiment, directory, layout, key, data, snapshot, saver, out, signals
            )
            saver.close()  # All is on the disk before anything is said of it, or evaluated.
            out.say(_ending(code, experiment, snapshot))
            if code == DONE:
                theta = experiment.curriculum.finish(snapshot.memory, snapshot.state.theta)
                theta = _blended(experiment, key, theta)
                key = jax.random.fold_in(key, FINAL)
                out.close()
                result = cluster.together(
                    lambda: outcome.conclude(experiment, theta, directory, key, snapshot)
                )
                _say(result)
            return code
        finally:
            out.close()
    finally:
        saver.close()


def _train(experiment, directory, layout, key, data, snapshot, saver, out, signals):
    """The loop: (exit code, the last snapshot)."""
    running, plan = experiment.running, experiment.curriculum
    state, memory, seconds = snapshot
    where = meta.split_of(layout.same, layout.problems)
    spread = functools.partial(meta.spread, num_devices=len(layout.devices))
    state = jax.jit(spread, out_shardings=where)(state)
    gather = jax.jit(meta.gather, out_shardings=where)
    steps = meta.compile_steps(experiment.meta, running.group, layout.devices)
    compare = outcome.comparison(experiment, directory, jax.random.fold_in(key, COMPARE), out.say)
    validate = _validation(experiment, key, data, layout)
    explain = _explanation(experiment, data, layout, gather)
    step, seconds, compared = int(state.step), float(seconds), "not yet compared with Adam"
    saved = step

    def save():
        nonlocal saved
        if saved < step:
            # Of a number that every process measures for itself, process 0's.
            rest = (memory, np.float32(cluster.told(seconds)))
            saver.save(step, Snapshot(gather(state), *cluster.place(rest, layout.same)))
            saved = step

    steps, sentence = preflight.prepare(steps, state, data)
    out.say(sentence + preflight.remaining(seconds, step, running.steps))
    out.start(step)
    while step < running.steps:
        passed = functools.partial(_passed, step, step + running.group)
        began = time.monotonic()
        stage, name = plan.stage(memory, step)
        stage = cluster.place(jax.tree.map(np.float32, stage), layout.same)
        before = state._replace(stage=stage)
        state, metrics = steps(before, data)
        cluster.wait(metrics)
        seconds += time.monotonic() - began
        step += running.group
        metrics = jax.device_get(metrics)
        row = _summary(metrics, state, stage, seconds)
        out.log(step, row)
        _refuse(metrics, experiment, step)
        for sentence in _left_out(metrics, state, step):
            out.say(sentence)
        if sentence := explain(metrics, before, state):
            out.say(sentence)
        if int(state.bad) >= min(running.max_bad, running.steps):
            return NOT_FINITE, Snapshot(state, memory, seconds)
        if passed(plan.every):
            theta = jax.device_get(state.theta)
            loss, numbers = validate(plan.test(memory), theta)
            memory, theta, sentence = plan.judge(memory, theta, loss)
            out.log(step, numbers)
            if not math.isfinite(loss):
                out.say(f"The validation loss is {loss}, which counts as no improvement.")
            if sentence:
                out.say(sentence)
                state = state._replace(theta=cluster.place(theta, layout.same))
        # While meta-gradients fail nothing is saved, so that good checkpoints stay.
        if (passed(experiment.saving.every) and not int(state.bad)) or step >= running.steps:
            save()
        if got := cluster.stopped(signals.got, step // running.group):
            save()
            return 128 + got, Snapshot(state, memory, seconds)
        if passed(experiment.evaluation.every) and step < running.steps:
            theta = jax.device_get(state.theta)
            numbers, compared = cluster.together(lambda: compare(theta))
            out.log(step, numbers)
        out.show(step, row["meta_loss"], name, compared)
    return DONE, Snapshot(state, memory, seconds)


def _ending(code, experiment, snapshot) -> str:
    step, spent = int(snapshot.state.step), clock(snapshot.seconds)
    if code == DONE:
        state, running = snapshot.state, experiment.running
        total = step * running.num_problems * len(experiment.families)
        return (
            f"Meta-training took {spent}; {int(state.skipped)} meta-steps were skipped, and "
            f"{int(state.dropped)} of {total} meta-gradients left out as not finite."
        )
    if code == NOT_FINITE:
        several = len(experiment.families) > 1
        return (
            f"Stopped at meta-step {step}: the last {int(snapshot.state.bad)} meta-gradients "
            f"{'of some family ' * several}were not finite (meta.max_bad="
            f"{experiment.running.max_bad}). The last good checkpoint is kept. If the task's own "
            "loss is not finite, mend that; else try a lower meta learning rate, shorter horizons "
            "or a smaller meta.clip."
        )
    name = signal.Signals(code - 128).name
    return f"{name}: saved meta-step {step}. The same command goes on from there."


def _like(experiment, key) -> Snapshot:
    """The shapes of a snapshot."""
    theta = jax.eval_shape(experiment.optimizer.init, key)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), theta)
    memory = experiment.curriculum.start(zeros)
    stage = _stage(experiment.curriculum, memory)
    state = jax.eval_shape(lambda k, s: meta.meta_init(k, experiment.meta, s), key, stage)
    memory = jax.eval_shape(lambda: memory)
    return Snapshot(state, memory, jax.ShapeDtypeStruct((), jnp.float32))


def _fresh(experiment, key, layout) -> Snapshot:
    theta = experiment.optimizer.init(key)  # Only its shapes matter to the first stage.
    stage = _stage(experiment.curriculum, experiment.curriculum.start(theta))
    state = meta.meta_init(jax.random.fold_in(key, TRAIN), experiment.meta, stage)
    state = state._replace(theta=_first_theta(experiment, key))
    memory = experiment.curriculum.start(jax.device_get(state.theta))
    # Placed as the compiled program leaves it, which otherwise would be compiled twice.
    state = cluster.place(state, _where(state, layout))
    return Snapshot(state, memory, jnp.float32(0))


def _first_theta(experiment, key):
    """What training begins with."""
    if experiment.start:
        return outcome.earlier(experiment)[0]
    return meta.first_theta(jax.random.fold_in(key, TRAIN), experiment.optimizer)


def _blended(experiment, key, theta):
    """What training ends with: `meta.blend` of the way from where it began."""
    part, theta = experiment.running.blend, jax.device_get(theta)
    if part == 1.0:
        return theta
    first = jax.device_get(_first_theta(experiment, key))
    return jax.tree.map(lambda x, y: x + np.asarray(part, x.dtype) * (y - x), first, theta)


def _stage(plan, memory) -> base.Stage:
    return jax.tree.map(jnp.float32, plan.stage(memory, 0)[0])


def _where(tree, layout):
    """The shardings of a `Snapshot` or `MetaState`: inner problems split, all else everywhere."""
    parts = meta.split_of(layout.same, layout.problems)
    if isinstance(tree, Snapshot):
        parts = Snapshot(parts, layout.same, layout.same)
    return jax.tree.broadcast(parts, tree)


def _passed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never for 0."""
    return every > 0 and after // every > before // every


def _say(text: str, stream=None) -> None:
    """Prints what a user has asked for: once, however many processes there are."""
    if cluster.first():
        print(text, file=stream)


def _summary(metrics, state, stage, seconds) -> dict:
    """One row of the log: means over the group and the problems, finite ones where some are not."""

    def mean(x):
        x = base.single(x)
        x = x[np.isfinite(x)] if x.dtype.kind == "f" else x
        return float(x.mean()) if x.size else math.nan

    hidden = ("finite", "lowest")
    row = {name: mean(x) for name, x in metrics.items() if name.partition("/")[0] not in hidden}
    row |= {"stage/" + name: float(x) for name, x in stage._asdict().items()}
    counts = {name: int(getattr(state, name)) for name in ("skipped", "bad", "dropped")}
    return row | counts | {"seconds": seconds}


def _opening(experiment, directory, devices, like, start) -> str:
    kind = f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}"
    names = " + ".join(family.name for family in experiment.families)
    doing = f"Going on from meta-step {start}" if start else "Starting"
    return (
        f"{doing} in {directory}: {names}, {experiment.specification['name']} with "
        f"{base.count(like.state.theta)} weights, {experiment.running.num_problems} problems on "
        f"{kind}. Compiling the meta-step."
    )


def _placed(data, same):
    """`cluster.place` of data in which some arrays may stand several times: each is placed once."""
    leaves, tree = jax.tree.flatten(data)
    different = {id(leaf): leaf for leaf in leaves}
    placed = dict(zip(different, cluster.place(list(different.values()), same), strict=True))
    return jax.tree.unflatten(tree, [placed[id(leaf)] for leaf in leaves])


def _validation(experiment, key, data, layout):
    """Makes (horizon, theta) -> (the validation loss, numbers for the log): the mean over families
    by the weights of the mixture, each on problems of its own. Compiled once a horizon."""
    families, weights = experiment.families, np.asarray(experiment.weights)
    several = len(families) > 1
    key = jax.random.fold_in(key, VALIDATE)

    @functools.cache
    def judges(horizon):
        settings = (experiment.curriculum.num_problems, horizon, experiment.objective.form)
        return [curriculum.validation(f, experiment.optimizer, *settings) for f in families]

    def validate(horizon, theta):
        own = [
            cluster.whole(experiment.data_of(data, j), layout.same) for j in range(len(families))
        ]

        def measure():
            keys = [jax.random.fold_in(key, j) for j in range(len(families))] if several else [key]
            losses = [float(f(theta, *x)) for f, *x in zip(judges(horizon), keys, own, strict=True)]
            each = {f"validation/{j}": x for j, x in enumerate(losses)} if several else {}
            loss = float(np.average(losses, weights=weights))
            return loss, {"validation": loss, **each}

        # One process's word: hosts of other hardware may differ in the last bit.
        with jax.default_device(layout.devices[0].platform):
            return cluster.together(measure)

    return validate


def _refuse(metrics, experiment, step) -> None:
    """UserError where a loss is outside what the form of the meta-loss can take."""
    for j, family in enumerate(experiment.families):
        lowest = metrics["lowest" if len(experiment.families) == 1 else f"lowest/{j}"]
        if not (lowest < experiment.objective.least(lowest.dtype)).any():
            continue
        sentence = (
            f"The loss of task {family.name} has come down to {float(lowest.min()):.6g} by "
            f'meta-step {step}, and objective.form="log" takes the logarithm of losses: set '
            'objective.form to "plain" or "last", or give the task a loss that is positive, as by '
            "adding a constant to it."
        )
        raise UserError(sentence) if cluster.first() else cluster.Elsewhere(sentence)


def _left_out(metrics, state, step) -> list[str]:
    """Sentences on the meta-steps of a group in which problems were left out, or all of them."""
    fine, losses = metrics["finite"], np.isfinite(metrics["meta_loss"])  # [group, problems]
    first, total = step - len(fine) + 1, fine.shape[1]
    sentences = []
    for i in np.flatnonzero(~fine.any(1))[:3]:
        cause = _cause(fine[i], losses[i])
        sentences.append(
            f"Meta-step {first + i} skipped: of all {total} problems the {cause} "
            f"({int(state.skipped)} skipped so far)."
        )
    some = fine.any(1)
    if missing := int((~fine[some]).sum()):
        cause = _cause(fine[some], losses[some])
        sentences.append(
            f"Meta-steps {first} to {step}: {missing} of {fine[some].size} meta-gradients left "
            f"out, as the {cause} ({int(state.dropped)} left out so far)."
        )
    return sentences


def _cause(fine, losses) -> str:
    """Whether what is not finite is the meta-losses already, or only their gradients."""
    by_loss = int((~fine & ~losses).sum())
    if not by_loss:
        return "meta-gradient is not finite"
    if by_loss == int((~fine).sum()):
        return "losses are not finite"
    return f"losses ({by_loss} times) or the meta-gradient are not finite"


def _explanation(experiment, data, layout, gather):
    """Makes (metrics, state before the group, state after it) -> a sentence on where a number that
    is not finite began, or None: for the first such group of a run, and the first of each row in
    which no problem was fine. All of them share their compiled programs."""
    explained = False

    @functools.cache
    def explain():
        several = len(experiment.families) > 1
        return diagnose.explainer(
            experiment.meta,
            experiment.inners,
            order=experiment.config.get("estimator", {}).get("order", "first"),
            objective=experiment.objective,
            reads=experiment.reads if several else None,
        )

    def explanation(metrics, before, state):
        nonlocal explained
        fine = metrics["finite"]
        left_out, skipped = np.flatnonzero(~fine.all(1)), np.flatnonzero(~fine.any(1))
        new_row = len(skipped) and int(state.bad) <= len(fine)
        if not len(left_out) or (explained and not new_row):
            return None
        explained = True
        # All take part in that.
        whole = cluster.whole((gather(before), data), layout.same)
        return explain()(*whole, int(left_out[0]) + 1) if cluster.first() else None

    return explanation
