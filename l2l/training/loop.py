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
      3 when meta-gradients were not finite `meta.max_bad` times in a row.

    Raises:
      UserError: the directory holds another configuration, or a second run is at work in it, or
        the devices do not divide the problems; or the processes do not see the same files; or
        the directory cannot be written.
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
            data = cluster.place(data, layout.same)
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
    validate = functools.lru_cache(
        lambda horizon: curriculum.validation(
            experiment.families[0], experiment.optimizer, plan.num_problems, horizon
        )
    )
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
        _report(metrics, lambda: gather(before), state, step, experiment, data, layout, out.say)
        if int(state.bad) >= running.max_bad:
            return NOT_FINITE, Snapshot(state, memory, seconds)
        if passed(plan.every):
            theta = jax.device_get(state.theta)
            judge, unseen = validate(plan.test(memory)), jax.random.fold_in(key, VALIDATE)
            own = cluster.whole(experiment.data_of(data, 0), layout.same)
            # One process's word: hosts of other hardware may differ in the last bit.
            loss = cluster.together(lambda: float(judge(theta, unseen, own)))
            memory, theta, sentence = plan.judge(memory, theta, loss)
            out.log(step, {"validation": loss})
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
        return f"Meta-training took {spent}; {int(snapshot.state.skipped)} meta-steps were skipped."
    if code == NOT_FINITE:
        return (
            f"Stopped at meta-step {step}: the last {int(snapshot.state.bad)} meta-gradients were "
            f"not finite (meta.max_bad={experiment.running.max_bad}). The last good checkpoint is "
            "kept. Try a lower meta learning rate, shorter horizons or a smaller meta.clip."
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
        x = x[np.isfinite(x)] if x.dtype.kind == "f" else x
        return float(x.mean()) if x.size else math.nan

    row = {name: mean(x) for name, x in metrics.items() if name != "finite"}
    row |= {"stage/" + name: float(x) for name, x in stage._asdict().items()}
    return row | {"skipped": int(state.skipped), "bad": int(state.bad), "seconds": seconds}


def _opening(experiment, directory, devices, like, start) -> str:
    kind = f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}"
    names = " + ".join(family.name for family in experiment.families)
    doing = f"Going on from meta-step {start}" if start else "Starting"
    return (
        f"{doing} in {directory}: {names}, {experiment.specification['name']} with "
        f"{base.count(like.state.theta)} weights, {experiment.running.num_problems} problems on "
        f"{kind}. Compiling the meta-step."
    )


def _report(metrics, before, state, step, experiment, data, layout, say) -> None:
    """Says which meta-steps were skipped and, of the first of a row, where it began. `before`
    gives the state before the group, in the layout of checkpoints."""
    fine = metrics["finite"]  # [group, num_problems]
    skipped = np.flatnonzero(~fine.all(1))
    for i in skipped[:3]:
        problems = ", ".join(map(str, np.flatnonzero(~fine[i])[:8]))
        say(
            f"Meta-step {step - len(fine) + i + 1} skipped: the meta-gradient of problem "
            f"{problems} is not finite ({int(state.skipped)} skipped so far)."
        )
    if len(skipped) and int(state.bad) <= len(fine):
        before, data = cluster.whole((before(), data), layout.same)  # All take part in that.
        if not cluster.first():
            return
        several = len(experiment.families) > 1
        say(
            diagnose.explain(
                experiment.meta,
                experiment.inners,
                before,
                data,
                int(skipped[0]) + 1,
                order=experiment.config.get("estimator", {}).get("order", "first"),
                reads=experiment.reads if several else None,
            )
        )
