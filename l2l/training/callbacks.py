"""What a run does after every group of meta-steps: refuse, log, explain, validate, call the user's
own callbacks, save, compare.

A callback is called with the loop and its last group; what it returns other than None ends the run,
as its exit code.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from l2l.cluster import collectives
from l2l.console.errors import UserError
from l2l.core import base
from l2l.training import curriculum, diagnose, meta_step
from l2l.training.loop import VALIDATE, Group, Loop

Callback = Callable[[Loop, Group], int | None]
# What a run ends with. Any other code is an error that a user can mend (2) or a bug (1).
DONE, NOT_FINITE, INTERRUPTED, TERMINATED = 0, 3, 130, 143


class Watch:
    """Refuses losses that the meta-loss cannot take, logs the group, and counts the problems left
    out as not finite; ends a run in which all of them are, and says where that began."""

    def __init__(self, log):
        self.log = log
        # The group, and the step in it, since which some family has no finite meta-gradient.
        self.since: tuple[Group, int] | None = None

    def __call__(self, loop: Loop, group: Group) -> int | None:
        # Before a row is logged: a directory without any is free for a mended configuration.
        refuse(loop, group)
        self.log.log(loop.step, summary(loop, group))
        for sentence in left_out(loop, group):
            self.log.say(sentence)
        bad, steps = int(loop.state.bad), len(group.metrics["finite"])
        if not bad:
            self.since = None
        elif self.since is None or bad <= steps:
            self.since = group, max(steps - bad, 0)
        running = loop.experiment.running
        if bad < min(running.max_bad, running.steps):
            return None
        # Only now: what it compiles takes as long as many meta-steps.
        if self.since and (sentence := beginning(loop, *self.since)):
            self.log.say(sentence)
        return NOT_FINITE


def beginning(loop: Loop, group: Group, index: int) -> str | None:
    """Where the numbers that are not finite began in meta-step `index` of the group, in a family
    without any others if there is one; None if all problems of that step are fine."""
    fine = _by_family(loop, group.metrics["finite"])[index]
    none = ~fine.any(1, keepdims=True)
    fine = np.where(none.any(), fine | ~none, fine).ravel()
    if fine.all():
        return None
    # A collective: every process must call it, though only the first explains.
    whole = collectives.whole((loop.gather(group.before), loop.data), loop.layout.same)
    return _explainer(loop.experiment)(*whole, index + 1, fine) if collectives.first() else None


def _explainer(experiment) -> Callable:
    return diagnose.explainer(
        experiment.meta,
        experiment.inners,
        order=experiment.config.get("estimator", {}).get("order", "first"),
        objective=experiment.objective,
        reads=experiment.reads if len(experiment.families) > 1 else None,
    )


class Validate:
    """Measures the validation loss when the curriculum asks for it, which then judges theta."""

    def __init__(self, log):
        self.log = log
        self.judges: dict[int, list[Callable]] = {}  # By horizon: each is compiled once.

    def __call__(self, loop: Loop, group: Group) -> None:
        del group
        plan = loop.experiment.curriculum
        if not loop.passed(plan.every):
            return
        theta = loop.theta
        loss, numbers = self.measure(loop, plan.test(loop.memory), theta)
        loop.memory, theta, sentence = plan.judge(loop.memory, theta, loss)
        self.log.log(loop.step, numbers)
        if not math.isfinite(loss):
            self.log.say(f"The validation loss is {loss}, which counts as no improvement.")
        if sentence:
            self.log.say(sentence)
            loop.theta = theta

    def measure(self, loop: Loop, horizon: int, theta) -> tuple[float, dict[str, float]]:
        """(the validation loss, numbers for the log): the mean over families by the weights of the
        mixture, each on problems of its own."""
        experiment, same = loop.experiment, loop.layout.same
        count = len(experiment.families)
        key = jax.random.fold_in(loop.key, VALIDATE)
        keys = [jax.random.fold_in(key, j) for j in range(count)] if count > 1 else [key]
        own = [collectives.whole(experiment.data_of(loop.data, j), same) for j in range(count)]

        def losses():
            if horizon not in self.judges:
                self.judges[horizon] = _judges(experiment, horizon)
            judges = zip(self.judges[horizon], keys, own, strict=True)
            found = [float(f(theta, *x)) for f, *x in judges]
            each = {f"validation/{j}": x for j, x in enumerate(found)} if count > 1 else {}
            loss = float(np.average(found, weights=np.asarray(experiment.weights)))
            return loss, {"validation": loss, **each}

        # One process's word: hosts of other hardware may differ in the last bit.
        with jax.default_device(loop.layout.devices[0].platform):
            return collectives.together(losses)


def _judges(experiment, horizon: int) -> list[Callable]:
    """The validation losses of the families."""
    settings = (experiment.curriculum.num_problems, horizon, experiment.objective)
    validation = curriculum.validation
    return [validation(f, experiment.optimizer, *settings) for f in experiment.families]


class Save:
    """Saves checkpoints, and ends the run with one on a signal, or where a callback of the user's
    asks for it.

    ending: the exit code that such a callback has returned, None until one does.
    """

    def __init__(self, saver, signals, saved: int):
        self.saver, self.signals, self.saved = saver, signals, saved
        self.ending: int | None = None

    def __call__(self, loop: Loop, group: Group) -> int | None:
        del group
        running = loop.experiment.running
        # While meta-gradients fail nothing is saved, so that good checkpoints stay.
        due = loop.passed(loop.experiment.saving.every) and not int(loop.state.bad)
        if due or loop.step >= running.steps or self.ending is not None:
            self.save(loop)
        if got := collectives.stopped(self.signals.got, loop.step // running.group):
            self.save(loop)
            self.ending = None  # It is the signal that ends the run.
            return 128 + got
        return self.ending

    def save(self, loop: Loop) -> None:
        if self.saved < loop.step:
            self.saver.save(loop.step, loop.snapshot())
            self.saved = loop.step

    @contextlib.contextmanager
    def rescuing(self, loop: Loop) -> Iterator[None]:
        """Where what is inside raises, what was trained until then is saved first, if it can be:
        not while meta-gradients fail, nor in one of several processes, as all would have to."""
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):  # The first error is the one to tell.
                if collectives.count() == 1 and not int(loop.state.bad):
                    self.save(loop)
            raise


class Called:
    """Calls the user's own callbacks in turn, until one returns an exit code: with that `save` then
    ends the run."""

    def __init__(self, callbacks: Sequence[Callback], save: Save):
        self.callbacks, self.save = callbacks, save

    def __call__(self, loop: Loop, group: Group) -> None:
        code = None
        with self.save.rescuing(loop):
            for callback in self.callbacks:
                code = _code(callback, callback(loop, group))
                if code is not None:
                    break
        if self.callbacks:  # One process's word ends all of them.
            found = int(collectives.largest(np.int32(-1 if code is None else code)))
            self.save.ending = None if found < 0 else found


def _code(callback: Callback, returned: Any) -> int | None:
    """What a user's callback returned, if it is None or an exit code."""
    if returned is None:
        return None
    is_number = isinstance(returned, int | np.integer) and not isinstance(returned, bool)
    if is_number and 0 <= returned <= 255:
        return int(returned)
    name = getattr(callback, "__qualname__", type(callback).__qualname__)
    raise UserError(
        f"The callback {name} returned {str(returned)[:100]!r}, which is no exit code: let it "
        "return None to go on, 0 to conclude the run early, or another number up to 255 to stop it."
    )


class Compare:
    """Compares with tuned Adam on the way, and says how far the run is.

    compare: (theta) -> (numbers for the log, a phrase).
    """

    def __init__(self, log, compare: Callable, save: Save):
        self.log, self.compare, self.save = log, compare, save
        self.phrase = "not yet compared"

    def __call__(self, loop: Loop, group: Group) -> None:
        if self.is_due(loop):
            theta = loop.theta
            with self.save.rescuing(loop):
                numbers, self.phrase = collectives.together(lambda: self.compare(theta))
            self.log.log(loop.step, numbers)
        self.log.show(loop.step, mean(group.metrics["meta_loss"]), group.name, self.phrase)

    def is_due(self, loop: Loop) -> bool:
        experiment = loop.experiment
        every, steps = experiment.evaluation.every, experiment.running.steps
        return loop.passed(every) and 0 < loop.step < steps

    def catch_up(self, loop: Loop) -> None:
        """Compares before a run goes on, if it was stopped between its save and its comparison."""
        if not self.is_due(loop):
            return
        theta = loop.theta

        def owed():
            return None if self.log.has_comparison(loop.step) else self.compare(theta)

        if found := collectives.together(owed):
            numbers, self.phrase = found
            self.log.log(loop.step, numbers)


def mean(x: np.ndarray) -> float:
    """Over all, and of floats over the finite ones; NaN if there are none."""
    x = base.single(x)
    x = x[np.isfinite(x)] if x.dtype.kind == "f" else x
    return float(x.mean()) if x.size else math.nan


def summary(loop: Loop, group: Group) -> dict[str, float]:
    """One row of the log: means over the group and the problems, finite ones where some are not."""
    hidden = ("finite", "lowest")
    shown = {n: x for n, x in group.metrics.items() if n.partition("/")[0] not in hidden}
    row: dict[str, float] = {name: mean(x) for name, x in shown.items()}
    row |= {"stage/" + name: float(x) for name, x in group.stage._asdict().items()}
    counts = {name: int(getattr(loop.state, name)) for name in ("skipped", "bad", "dropped")}
    return row | counts | {"seconds": loop.seconds}


def refuse(loop: Loop, group: Group) -> None:
    """UserError where a loss is outside what the form of the meta-loss can take."""
    experiment = loop.experiment
    for j, family in enumerate(experiment.families):
        lowest = group.metrics["lowest" if len(experiment.families) == 1 else f"lowest/{j}"]
        if not (lowest < experiment.objective.least(lowest.dtype)).any():
            continue
        sentence = (
            f"The loss of task {family.name} has come down to {float(lowest.min()):.6g} by "
            f'meta-step {loop.step}, and objective.form="log" takes the logarithm of losses: set '
            'objective.form to "plain" or "last", or give the task a loss that is positive, as by '
            "adding a constant to it."
        )
        raise UserError(sentence) if collectives.first() else collectives.Elsewhere(sentence)


def _by_family(loop: Loop, rows: np.ndarray) -> np.ndarray:
    """[group, rows] of the metrics as [group, families, num_problems]."""
    return meta_step.by_family(rows, len(loop.layout.devices), len(loop.experiment.families))


def left_out(loop: Loop, group: Group) -> list[str]:
    """Sentences on the meta-steps of a group in which problems were left out, or all of them."""
    fine = group.metrics["finite"]  # [group, problems]
    losses = np.isfinite(group.metrics["meta_loss"])
    names = [family.name for family in loop.experiment.families]
    state, first, total = loop.state, loop.step - len(fine) + 1, fine.shape[1]
    sentences = []
    for i in np.flatnonzero(~fine.any(1))[:3]:
        sentences.append(
            f"Meta-step {first + i} skipped: of all {total} problems the "
            f"{_cause(fine[i], losses[i])} ({int(state.skipped)} skipped so far)."
        )
    some = fine.any(1)
    if missing := int((~fine[some]).sum()):
        each = (~_by_family(loop, fine)[some]).sum((0, 2))
        counts = [f"{n} of {name}" for name, n in zip(names, each, strict=True) if n]
        whose = f" ({', '.join(counts)})" if len(names) > 1 else ""
        sentences.append(
            f"Meta-steps {first} to {loop.step}: {missing} of {fine[some].size} meta-gradients "
            f"left out{whose}, as the {_cause(fine[some], losses[some])} ({int(state.dropped)} "
            "left out so far)."
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
