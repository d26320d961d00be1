"""The only Python loop: meta-trains an experiment in a directory, from wherever it stands there."""

import fcntl
import functools
import json
import math
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from l2l import base, build, checkpoint, curriculum, meta, outcome
from l2l.progress import clock, progress

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


def run(experiment: build.Experiment, directory) -> int:
    """Trains to the end, or until a signal; goes on where an earlier run in `directory` left off.

    Returns:
      0 when training is done and evaluated; 130 or 143 after SIGINT or SIGTERM, everything saved;
      3 when meta-gradients were not finite `meta.max_bad` times in a row.

    Raises:
      ValueError: the directory holds another configuration, or a second run is at work in it, or
        the devices do not divide the problems.
      OSError: the directory cannot be written.
    """
    directory = Path(directory)
    devices = meta.devices_for(experiment.running.num_problems)
    directory.mkdir(parents=True, exist_ok=True)
    with _lock(directory):
        _claim(directory, experiment.config)
        if (directory / outcome.RESULTS).exists():
            print(f"{directory} holds a finished run. Its result:\n", file=sys.stderr)
            print(outcome.reread(directory))
            return DONE
        with Signals() as signals:
            return _train(experiment, directory, devices, signals)


def _train(experiment, directory, devices, signals) -> int:
    running, plan = experiment.running, experiment.curriculum
    mesh = Mesh(devices, (meta.AXIS,))
    layout = Layout(devices, NamedSharding(mesh, P(meta.AXIS)), NamedSharding(mesh, P()))
    warnings: list[str] = []
    saver = checkpoint.saver(directory / "checkpoints", experiment.saving.keep, warnings.append)
    key = jax.random.key(experiment.seed)
    like = _like(experiment, key)
    found = saver.restore(like, _where(like, layout))
    start = found[1] if found else 0
    out = progress(directory, running.steps, start)
    say = out.say
    for sentence in warnings:
        say(sentence)
    say(_opening(experiment, directory, devices, like, start))
    snapshot = found[0] if found else _fresh(experiment, key, layout)
    state, memory, seconds = snapshot
    data = jax.device_put(experiment.family.data(), layout.same)
    spread = jax.jit(
        functools.partial(meta.spread, devices=devices), out_shardings=_where(state, layout)
    )
    gather = jax.jit(meta.gather, out_shardings=_where(state, layout))
    steps = meta.compile_steps(experiment.meta, running.group, devices)
    compare = outcome.comparison(experiment, data, directory, jax.random.fold_in(key, COMPARE), say)
    validate = functools.lru_cache(
        lambda horizon: curriculum.validation(
            experiment.family, experiment.inner.optimizer, plan.num_problems, horizon
        )
    )
    state = spread(state)
    step, saved, compared = start, start, "not yet compared with Adam"
    seconds = float(seconds)

    def save():
        nonlocal saved
        if saved < step:
            saver.save(step, Snapshot(gather(state), memory, jnp.float32(seconds)))
            saved = step

    try:
        while step < running.steps:
            began = time.monotonic()
            stage, name = plan.stage(memory, step)
            stage = jax.tree.map(lambda x: jax.device_put(np.float32(x), layout.same), stage)
            before = state._replace(stage=stage)
            state, metrics = steps(before, data)
            _wait(metrics)
            seconds += time.monotonic() - began
            step += running.group
            metrics = jax.tree.map(lambda x: np.concatenate(x, 1), jax.device_get(metrics))
            row = _summary(metrics, state, stage, seconds)
            out.log(step, row)
            _report(metrics, before, state, step, experiment, data, say)
            if int(state.bad) >= running.max_bad:
                saver.close()
                say(
                    f"Stopped: the last {int(state.bad)} meta-gradients were not finite "
                    f"(meta.max_bad={running.max_bad}). The checkpoint of meta-step {saved} is "
                    "kept. Try a lower meta learning rate, or a smaller clip or horizon."
                )
                return NOT_FINITE
            if plan.every and _passed(step, running.group, plan.every):
                judge = validate(plan.test(memory))
                theta = jax.device_get(state.theta)
                loss = float(judge(theta, jax.random.fold_in(key, VALIDATE), data))
                out.log(step, {"validation": loss})
                memory, theta, sentence = plan.judge(memory, theta, loss)
                if sentence:
                    say(sentence)
                    state = state._replace(theta=jax.device_put(theta, layout.same))
            every = experiment.evaluation.every
            if every and _passed(step, running.group, every) and step < running.steps:
                numbers, compared = compare(state.theta)
                out.log(step, numbers)
            out.show(step, row["meta_loss"], name, compared)
            # While meta-gradients fail nothing is saved, so that good checkpoints stay.
            if _passed(step, running.group, experiment.saving.every) and not int(state.bad):
                save()
            if signals.got and step < running.steps:
                save()
                saver.close()
                name = signal.Signals(signals.got).name
                say(f"{name}: saved meta-step {step}. The same command goes on from there.")
                return 128 + signals.got
        save()
        saver.close()
        theta = jax.device_get(plan.finish(memory, state.theta))
        say(f"Meta-training took {clock(seconds)}.")
        key = jax.random.fold_in(key, FINAL)
        print(
            outcome.conclude(
                experiment, theta, data, directory, key, seconds, int(state.skipped), say
            )
        )
        return DONE
    finally:
        out.close()


def _like(experiment, key) -> Snapshot:
    """The shapes of a snapshot."""
    theta = jax.eval_shape(experiment.inner.optimizer.init, key)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), theta)
    memory = experiment.curriculum.start(zeros)
    stage = _stage(experiment.curriculum, memory)
    state = jax.eval_shape(lambda k, s: meta.meta_init(k, experiment.meta, s), key, stage)
    memory = jax.eval_shape(lambda: memory)
    return Snapshot(state, memory, jax.ShapeDtypeStruct((), jnp.float32))


def _fresh(experiment, key, layout) -> Snapshot:
    theta = experiment.inner.optimizer.init(key)  # Only its shapes matter to the first stage.
    stage = _stage(experiment.curriculum, experiment.curriculum.start(theta))
    state = meta.meta_init(jax.random.fold_in(key, TRAIN), experiment.meta, stage)
    memory = experiment.curriculum.start(jax.device_get(state.theta))
    # Placed as the compiled program leaves it, which otherwise would be compiled twice.
    state = jax.device_put(state, _where(state, layout))
    return Snapshot(state, memory, jnp.float32(0))


def _stage(plan, memory) -> base.Stage:
    return jax.tree.map(jnp.float32, plan.stage(memory, 0)[0])


def _where(tree, layout):
    """The shardings of a `Snapshot` or `MetaState`: inner problems split, all else on each device."""
    if isinstance(tree, Snapshot):
        rest = jax.tree.map(lambda _: layout.same, tree)
        return rest._replace(state=_where(tree.state, layout))
    rest = jax.tree.map(lambda _: layout.same, tree)
    return rest._replace(estimator=jax.tree.map(lambda _: layout.problems, tree.estimator))


def _passed(step: int, group: int, every: int) -> bool:
    """Whether the group of meta-steps that ends at `step` held a multiple of `every`."""
    return every > 0 and step // every > (step - group) // every


def _wait(tree) -> None:
    """Waits for arrays without holding up signals, which Python delivers between its own steps."""
    for x in jax.tree.leaves(tree):
        while not x.is_ready():
            time.sleep(0.002)


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
    doing = f"Going on from meta-step {start}" if start else "Starting"
    return (
        f"{doing} in {directory}: {experiment.family.name}, {experiment.specification['name']} with "
        f"{base.count(like.state.theta)} weights, {experiment.running.num_problems} problems on "
        f"{kind}. Compiling the meta-step; the first line of progress follows."
    )


def _report(metrics, before, state, step, experiment, data, say) -> None:
    """Says which meta-steps were skipped, and where the non-finite numbers began."""
    fine = metrics["finite"]  # [group, num_problems]
    for i in np.flatnonzero(~fine.all(1))[:3]:
        problems = ", ".join(map(str, np.flatnonzero(~fine[i])[:8]))
        say(
            f"Meta-step {step - len(fine) + i + 1} skipped: the meta-gradient of problem {problems} "
            f"is not finite ({int(state.skipped)} skipped so far)."
        )


def _claim(directory: Path, config: dict) -> None:
    """Makes the directory this configuration's, or refuses to."""
    path = directory / "config.json"
    mine = json.loads(json.dumps(config))
    if not path.exists():
        checkpoint.write(path, json.dumps(mine, indent=2).encode() + b"\n")
        return
    try:
        theirs = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(
            f"{path} is damaged ({error}): restore it, or choose another directory."
        ) from error
    if different := _differences(theirs, mine):
        raise ValueError(
            f"{directory} holds a run of another configuration ({'; '.join(different[:8])}). "
            "Choose another --workdir, or remove that directory."
        )


def _differences(theirs, mine, path="") -> list[str]:
    if isinstance(theirs, dict) and isinstance(mine, dict):
        out = []
        for key in sorted({*theirs, *mine}):
            out += _differences(theirs.get(key), mine.get(key), f"{path}.{key}" if path else key)
        return out
    return [] if theirs == mine else [f"{path} is {theirs} there, {mine} here"]


class _lock:
    """Holds a directory for one run; the system lets go of it when the process ends, however."""

    def __init__(self, directory):
        self.directory = directory

    def __enter__(self):
        self.file = open(self.directory / "lock", "a+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.file.close()
            raise ValueError(
                f"Another run is at work in {self.directory}: wait for it, or choose another "
                "--workdir."
            ) from error

    def __exit__(self, *_):
        self.file.close()


class Signals:
    """Notes SIGINT and SIGTERM in `got`; a second one has its usual effect."""

    def __init__(self):
        self.got = 0
        self.before = {}

    def _note(self, number, frame):
        self.got = number
        self._restore(signal.SIG_DFL)

    def _restore(self, handler=None):
        for number, before in self.before.items():
            signal.signal(number, before if handler is None else handler)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows it only there.
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        self._restore()
