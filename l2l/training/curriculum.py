"""Which horizons are drawn, and how strongly Adam is imitated, at every meta-step.

The host decides between calls of the compiled program, from the meta-step and a small memory that
is part of every checkpoint: a resumed run takes the decisions of an uninterrupted one.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l.console.errors import UserError
from l2l.core import base, unroll
from l2l.estimators.objective import Objective
from l2l.optimizers import ranges


class Imitation(NamedTuple):
    """Section `imitation`: of Adam, with a weight that goes from `weight` to `final` along a
    straight line during the first `until` of the meta-steps; 0 for none.

    final:         0 anneals it away; above 0 it stays as a regulariser.
    learning_rate: of the Adam that is imitated.
    """

    weight: float = 0.0
    until: float = 0.5
    final: float = 0.0
    learning_rate: float = 1e-3

    def checked(self) -> "Imitation":
        """This, if all of it is in range; UserError otherwise."""
        for name in ("weight", "until", "final"):
            ranges.not_negative(f"imitation.{name}", getattr(self, name))
        ranges.positive("imitation.learning_rate", self.learning_rate)
        return self


class Curriculum(NamedTuple):
    """A plan of horizons.

    start:  (theta) -> Memory, a pytree of arrays.
    stage:  (memory, step) -> (Stage of Python floats, what to call it in a line of progress).
    every:  meta-steps between validations; 0 for none.
    test:   (memory) -> the horizon to validate on, in inner steps.
    judge:  (memory, theta, loss) -> (memory, theta, sentence or None), after a validation.
    finish: (memory, theta) -> the theta to keep at the end.
    num_problems: of a validation.
    window: the longest that `inner.length` may be, in a run no longer than the plan says; None for
            any.
    longest: inner steps of the longest run that the plan asks for; None where that is not known.
    """

    start: Callable[[Any], Any]
    stage: Callable[[Any, int], tuple[base.Stage, str]]
    every: int = 0
    test: Callable[[Any], int] = lambda memory: 0
    judge: Callable[[Any, Any, float], tuple[Any, Any, str | None]] = lambda m, theta, loss: (
        m,
        theta,
        None,
    )
    finish: Callable[[Any, Any], Any] = lambda memory, theta: theta
    num_problems: int = 0
    window: int | None = None
    longest: int | None = None

    def check(self, length: int) -> None:
        """UserError where a single window is longer than the runs that are asked for."""
        if self.window is not None and length > self.window:
            raise UserError(
                f"inner.length={length} is longer than the runs of {self.window} steps that "
                "section `horizon` asks for, and a run is at least one window: set inner.length to "
                f"{self.window} or less, or ask for runs of {length} steps or more."
            )


def log_uniform(
    *,
    steps: int,
    imitation: Imitation,
    shortest: int = 100,
    longest: int = 2000,
    start: int | None = None,
    growth: float = 0.5,
) -> Curriculum:
    """Horizons drawn log-uniformly between `shortest` and a limit, which grows geometrically from
    `start` (by default twice the shortest) to `longest` over the first `growth` of the meta-steps.
    What is drawn is rounded to whole windows of `inner.length`, and to one at least.

    Raises:
      UserError: shortest, start, longest are not in this order, or growth is negative.
    """
    ranges.not_negative("horizon.growth", growth)
    start = min(2 * shortest, longest) if start is None else start
    if not 1 <= shortest <= start <= longest:
        raise UserError(
            f"shortest={shortest}, start={start}, longest={longest} are horizons in the wrong "
            "order: each must be at least the one before, and the first at least 1."
        )

    def stage(memory, step):
        share = min(1.0, step / (growth * steps)) if growth > 0 else 1.0
        top = start * (longest / start) ** share
        return _stage(shortest, top, imitation, step / steps), f"{shortest}–{top:.0f}"

    return Curriculum(lambda theta: (), stage, window=longest, longest=longest)


class Memory(NamedTuple):
    """What `stages` remembers: the stage, the best validation so far on its horizon and the theta
    it was measured at, and the validations since."""

    index: Any
    best: Any
    theta: Any
    waited: Any


def stages(
    *,
    steps: int,
    imitation: Imitation,
    horizons: Sequence[int] = (100, 200, 500, 1000, 2000),
    every: int = 100,
    patience: int = 3,
    num_problems: int = 8,
) -> Curriculum:
    """One horizon after another (Chen et al. 2020): at regular intervals theta is validated on the
    next stage's horizon; once that has not improved `patience` times, the best theta is restored
    and the next stage begins. The last stage is validated on its own horizon, as the one before it
    was: it has to improve on the best of that one. It ends with the meta-steps.

    Args:
      every: meta-steps between validations.
      num_problems: fixed, of a validation.
    """
    horizons = tuple(horizons)
    if not horizons or list(horizons) != sorted(set(horizons)) or horizons[0] < 1:
        raise UserError(f"horizons={horizons} do not increase: list each once, the shortest first.")
    if min(every, patience, num_problems) < 1:
        raise UserError(
            f"every={every}, patience={patience}, num_problems={num_problems} of the stages: each "
            "counts something, and must be 1 or more."
        )
    last = len(horizons) - 1

    def begin(theta):
        theta = jax.tree.map(np.asarray, theta)
        return Memory(np.int32(0), np.float32(np.inf), theta, np.int32(0))

    def stage(memory, step):
        horizon = horizons[int(memory.index)]
        name = f"{horizon} ({int(memory.index) + 1}/{len(horizons)})"
        return _stage(horizon, horizon, imitation, step / steps), name

    def judge(memory, theta, loss):
        loss = np.float32(loss)
        if loss < memory.best:  # False for NaN.
            return begin(theta)._replace(index=memory.index, best=loss), theta, None
        if memory.waited + 1 < patience or memory.index >= last:
            return memory._replace(waited=np.int32(memory.waited + 1)), theta, None
        following = Memory(np.int32(memory.index + 1), memory.best, memory.theta, np.int32(0))
        if test(following) != test(memory):  # Losses on another horizon are no measure of these.
            following = following._replace(best=np.float32(np.inf))
        sentence = (
            f"No better on {test(memory)} steps for {patience} validations: "
            f"back to the best weights ({memory.best:.4g}), "
            f"on to {horizons[following.index]} steps."
        )
        return following, memory.theta, sentence

    def test(memory):
        return horizons[min(int(memory.index) + 1, last)]

    def finish(memory, theta):
        return memory.theta if np.isfinite(memory.best) else theta

    return Curriculum(
        *(begin, stage, every, test, judge, finish, num_problems),
        window=horizons[0],
        longest=horizons[-1],
    )


def validation(
    family: base.TaskFamily,
    optimizer: base.LearnedOptimizer,
    num_problems: int,
    num_steps: int,
    objective: Objective,
) -> Callable[[Any, jax.Array, Any], jax.Array]:
    """Makes (theta, key, data) -> the mean loss on validation batches in the last tenth of
    `num_problems` runs of `num_steps` steps: a scalar, compiled once a horizon.

    objective: the meta-loss, whose cap and floor hold here too. Under the form "log" it is the mean
      logarithm of the losses, which then must not be negative; under the others, which losses of
      any sign are for, the plain mean.
    """
    objective = objective._replace(form="log" if objective.form == "log" else "plain")
    tail = max(num_steps // 10, 1)

    def one(theta, key, data):
        inner = unroll.Inner(family, optimizer, num_steps, stagger=False)
        horizon = jnp.float32(num_steps)
        state = unroll.fresh(inner, key, theta, base.Stage(horizon, horizon, jnp.float32(0)))
        bound = optimizer.bind(theta)
        training = unroll.trained_on(family, optimizer, theta)
        state, _ = unroll.unroll(state, data, training, bound, num_steps - tail)

        def step(state, _):
            state, _ = unroll.unroll(state, data, training, bound, 1)
            batch = unroll.batch_at(family, state, data, unroll.VALIDATION)
            return state, family.loss(state.params, state.problem, batch)

        losses = jax.lax.scan(step, state, None, tail)[1]
        return objective.value(losses, jnp.ones(tail))

    @jax.jit
    def run(theta, key, data):
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num_problems))
        return jnp.mean(jax.lax.map(lambda k: one(theta, k, data), keys))

    return run


def _stage(shortest, longest, imitation, progress) -> base.Stage:
    left = max(0.0, 1.0 - progress / imitation.until) if imitation.until > 0 else 0.0
    weight = imitation.final + (imitation.weight - imitation.final) * left
    return base.Stage(float(shortest), float(longest), weight)
