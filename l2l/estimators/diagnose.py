"""Where a number that is not finite began: problem, inner step, tensor and feature.

Nothing here runs while all is well. A training loop keeps the state from before a call of the
compiled steps; when metrics["finite"] shows a False it calls `explain`, which runs the same
meta-steps again, one at a time, and the failing window step by step on the host.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from l2l import base
from l2l.meta import Meta, meta_step
from l2l.optimizers import coordinates
from l2l.unroll import VALIDATION, Inner, batch_at, renew


def explain(
    meta: Meta,
    inners: Sequence[Inner],
    state: base.MetaState,
    data,
    steps: int,
    *,
    orders: Sequence[str] | str = "first",
    reads: Sequence[int] | None = None,
) -> str:
    """One sentence on the first non-finite meta-gradient of the `steps` meta-steps after `state`.

    Args:
      inners: one for each estimator of a mixture; one alone otherwise.
      state: from before those steps, in the layout of checkpoints (`meta.gather`).
      orders: of the estimators: "first", or "exact" where derivatives of what the optimizer
        observes are taken too. One for all, or one each.
      reads: the mixture's own: which entry of `data` each estimator reads. None without a mixture.
    """
    found = replay(meta, state, data, steps)
    if found is None:
        return (
            f"Run again, the {steps} meta-steps after {int(state.step)} have finite "
            "meta-gradients: the fault lies in arithmetic that differs between devices."
        )
    before, problem = found
    n = meta.num_problems
    component, index = divmod(problem, n)
    inner, name = inners[component], inners[component].family.name
    order = orders if isinstance(orders, str) else orders[component]
    own, part = data, before.estimator
    if reads is not None:
        own, part = data[reads[component]], before.estimator[component]
    sentence = None
    for run in _runs(part, index):
        run = jax.jit(lambda run: renew(inner, run, before.theta, before.stage))(run)
        sentence = sentence or locate(inner, before.theta, run, own, order)
    return (
        f"Meta-step {int(before.step) + 1}, problem {index} ({name}): "
        + (sentence or _NOWHERE)
    )


_NOWHERE = (
    "every step of the window is finite by itself, so the meta-gradient overflowed on its way "
    "through them: take a shorter inner.length or a first-order estimator."
)


def replay(meta: Meta, state: base.MetaState, data, steps: int):
    """(the state before the first meta-step with a non-finite gradient, the problem's index in the
    estimator's gradients), or None if `steps` meta-steps from `state` have none."""
    step = jax.jit(lambda state, data: meta_step(meta, state, data))
    for _ in range(steps):
        following, metrics = step(state, data)
        fine = np.asarray(metrics["finite"])
        if not fine.all():
            return state, int(np.flatnonzero(~fine)[0])
        state = following
    return None


def locate(
    inner: Inner, theta, run: base.InnerState, data, order: str = "first", checks: int | None = None
) -> str | None:
    """Where in the window that begins at `run` the first number is not finite: one sentence, or
    None if there is none.

    The forward pass first: at every step the parameters, the batch, the loss, its gradient, the
    features (of an optimizer with a rule), the update; then the validation loss. If all of that is
    finite, the derivatives that order "exact" takes (features by gradient, at eps_root = 0 infinite
    where the gradient has always been zero; the second derivative of the loss), and the derivative
    of the updates in theta. `run` must be renewed already, as at the start of a window.
    """
    for path, leaf in _bad(theta):
        return f"the optimizer's own weight {path}{_where(leaf)} is not finite before the window."
    tests = [_forward, _held_out] + [_by_gradient] * (order == "exact") + [_by_theta]
    for test in tests:
        look = jax.jit(lambda theta, run, data, test=test: test(inner, theta, run, data))
        advance = jax.jit(lambda theta, run, data: _forward(inner, theta, run, data)[0])
        state = run
        for _ in range(inner.length):
            after, seen = look(theta, state, data)
            for quantity, tree in seen:
                for path, leaf in _bad(tree):
                    return f"at inner step {int(state.step)} {quantity}{_tensor(path, leaf)} …"
            state = after
    return None
