"""A run: meta-trains an experiment in a directory, starting from whatever is already there."""

import contextlib
import signal
import sys
from collections.abc import Sequence

import jax

from l2l.cluster import collectives
from l2l.console.progress import clock
from l2l.core import base
from l2l.storage import checkpoint, exports, files
from l2l.training import callbacks, finish, provenance
from l2l.training.callbacks import DONE, NOT_FINITE, Callback
from l2l.training.experiment import Experiment
from l2l.training.loop import COMPARE, FINAL, Loop, Snapshot, layout_of, shapes, start
from l2l.training.run_directory import Signals, entered, shared
from l2l.training.run_log import RunLog, Silence


def train(
    experiment: Experiment,
    directory,
    devices: Sequence | None = None,
    extra: Sequence[Callback] = (),
) -> int:
    """Trains to the end, or until a signal; resumes where an earlier run in `directory` left off.

    Args:
      devices: by default all those of all processes. A run may be resumed with other devices: it
        makes no difference.
      extra: callbacks of your own: (loop, group) -> None, or an exit code that ends the run. They
        are called after every group of meta-steps, once it is logged. 0 concludes the run early:
        what was trained until then is evaluated and exported, as it is at the end, with the number
        of its meta-steps. The same call then only shows that result; once summary.txt is removed,
        it trains on. Any other code up to 255 stops the run, and the next call goes on. In either
        case a checkpoint is saved first, and also where a callback raises in a run of one process.

    Returns:
      0 when training is done and evaluated; 130 or 143 after SIGINT or SIGTERM, everything saved;
      3 when for `meta.max_bad` meta-steps in a row, or in all of a shorter run, some family had no
        meta-gradient that was finite; what a callback of `extra` ended it with.

    Raises:
      UserError: the directory holds another configuration, or a second run is at work in it, or
        the devices do not divide the problems; or a callback of `extra` returns what is neither
        None nor an exit code; or the processes do not see the same files; or
        the directory cannot be written; or a task has a loss of which objective.form="log" cannot
        take the logarithm, and then nothing is exported; or what it would learn cannot be exported,
        which is said before training, or if only its end can tell, with all checkpoints kept.
    """
    directory = files.local(directory)
    layout_of(experiment, devices)  # What is wrong with them is said before anything is made.
    with contextlib.ExitStack() as held:

        def enter():
            held.enter_context(entered(directory, experiment.config))
            if summary := finish.finished(directory):
                return summary
            finish.keep_start(experiment, directory)
            return None

        summary = collectives.together(enter)
        if summary:
            _say(f"{directory} holds a finished run. Its result:\n", sys.stderr)
            _say(summary)
            return DONE
        shared(directory, experiment.config)
        experiment = finish.with_own_start(experiment, directory)
        with Signals() as signals:
            return _run(experiment, directory, devices, signals, extra)


def _run(experiment: Experiment, directory, devices, signals, extra) -> int:
    """Opens what a run needs, trains, and concludes."""
    layout, like = layout_of(experiment, devices), shapes(experiment)
    exports.exportable(experiment.specification, like.state.theta)
    sentences: list[str] = []
    saver = checkpoint.Saver(directory / "checkpoints", experiment.saving.keep, sentences.append)
    with contextlib.closing(saver):
        found = saver.restore(like, layout.of(like))
        snapshot, begun = found if found else (None, 0)
        logs = RunLog if collectives.first() else Silence
        with contextlib.closing(logs(directory, experiment.running.steps, begun)) as log:
            for sentence in (*sentences, _opening(experiment, directory, layout, like, begun)):
                log.say(sentence)
            loop = start(experiment, devices, snapshot)
            data = collectives.whole(loop.data, loop.layout.same)
            if changed := collectives.together(
                lambda: provenance.record(experiment, data, directory, begun)
            ):
                log.say(changed)
            compare = finish.comparing(
                experiment, directory, jax.random.fold_in(loop.key, COMPARE), log.say
            )
            save = callbacks.Save(saver, signals, begun)
            comparisons = callbacks.Compare(log, compare, save)
            after = (
                callbacks.Watch(log),
                callbacks.Validate(log),
                callbacks.Called(extra, save),
                save,
                comparisons,
            )
            comparisons.catch_up(loop)
            log.say(loop.compile())
            log.start(loop.step)
            code = advance(loop, after, save)
            saver.close()  # All is on the disk before anything is said of it, or evaluated.
            if save.ending is not None:
                log.say(_ended_by_callback(code, loop))
            if save.ending in (None, DONE):
                log.say(_ending(code, loop))
        if code == DONE:
            signals.release()  # What there is to save is saved: nobody has to wait for the table.
            _say(_conclusion(loop, directory))
        return code


def advance(loop: Loop, after: Sequence[Callback], save: callbacks.Save) -> int:
    """Trains to the end, or until a callback ends it: the exit code."""
    while loop.step < loop.experiment.running.steps:
        with save.rescuing(loop):
            group = loop.advance()
        for callback in after:
            code = callback(loop, group)
            if code is not None:
                return code
    return DONE


def _conclusion(loop: Loop, directory) -> str:
    theta, key = loop.result(), jax.random.fold_in(loop.key, FINAL)
    snapshot = Snapshot(loop.state, loop.memory, loop.seconds)
    return collectives.together(
        lambda: finish.conclude(loop.experiment, theta, directory, key, snapshot)
    )


def _opening(experiment: Experiment, directory, layout, like: Snapshot, begun: int) -> str:
    devices = layout.devices
    kind = f"{len(devices)} {devices[0].platform} device{'s' if len(devices) > 1 else ''}"
    names = " + ".join(family.name for family in experiment.families)
    doing = f"Going on from meta-step {begun}" if begun else "Starting"
    return (
        f"{doing} in {directory}: {names}, {experiment.specification['name']} with "
        f"{base.count(like.state.theta)} weights, {experiment.running.num_problems} problems on "
        f"{kind}. Compiling the meta-step."
    )


def _ending(code: int, loop: Loop) -> str:
    experiment, state, spent = loop.experiment, loop.state, clock(loop.seconds)
    if code == DONE:
        total = loop.step * experiment.problems()
        return (
            f"Meta-training took {spent}; {int(state.skipped)} meta-steps were skipped, and "
            f"{int(state.dropped)} of {total} meta-gradients left out as not finite."
        )
    if code == NOT_FINITE:
        several = len(experiment.families) > 1
        return (
            f"Stopped at meta-step {loop.step}: the last {int(state.bad)} meta-gradients "
            f"{'of some family ' * several}were not finite (meta.max_bad="
            f"{experiment.running.max_bad}). The last good checkpoint is kept. If the task's own "
            "loss is not finite, mend that; else try a lower meta learning rate, shorter horizons "
            "or a smaller meta.clip."
        )
    name = signal.Signals(code - 128).name
    return f"{name}: saved meta-step {loop.step}. The same command goes on from there."


def _ended_by_callback(code: int, loop: Loop) -> str:
    where = f"meta-step {loop.step} of {loop.experiment.running.steps}"
    if code == DONE:
        return f"A callback ended meta-training at {where}, which is saved and concluded."
    return f"A callback ended the run with code {code}: saved {where}. The same command goes on."


def _say(text: str, stream=None) -> None:
    """Prints what a user has asked for: once, however many processes there are."""
    if collectives.first():
        print(text, file=stream)
