"""Where a number that is not finite began: problem, inner step, tensor and feature.

Nothing here runs while training goes on, which only counts the problems that it leaves out. A
training loop that is about to stop has the state from before a call of the compiled steps (with its
stage), and knows from metrics["finite"] which of those steps was the first to fail, and for which
problems. It calls

    explain = explainer(meta, inners, order=…, objective=…, reads=…)
    explain(before, data, failing, fine)

which goes through the failing window step by step on one device. That compiles single inner steps;
the meta-step itself is compiled again only where others came before the failing one, or where every
inner step is finite.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.core import base
from l2l.core.unroll import VALIDATION, Inner, batch_at, renew, trained_on
from l2l.estimators.objective import Objective
from l2l.optimizers import coordinates
from l2l.training.meta_step import Meta, meta_step

_NOWHERE = (
    "every step of the window is finite by itself, so the meta-gradient overflowed on its way "
    "through them: try a shorter inner.length or a first-order estimator."
)
_BY_GRADIENT = "the derivative, with respect to the gradient, of"
# The end of the sentence about such a derivative.
_NO_SLOPE = (
    ": a root has no derivative where its argument is zero, as at coordinates whose gradient has "
    "always been zero; set the optimizer's eps_root above zero, such as 1e-8"
)


def explainer(
    meta: Meta,
    inners: Sequence[Inner],
    *,
    order: str = "first",
    objective: Objective | None = None,
    reads: Sequence[int] | None = None,
) -> Callable[..., str]:
    """Makes (state, data, steps, fine=None) -> one sentence on the first problem that was left out
    in the `steps` meta-steps after `state`, since its meta-loss or meta-gradient is not finite.
    fine: of the last of them, whether each problem's was, as the run found: [num_problems], of a
    mixture [families · num_problems], family by family. Without it all are taken again to find out.

    Args:
      inners: one for each estimator of a mixture, or one alone.
      order, objective: see `locate`.
      reads: where the estimator is a mixture, the mixture's own; None where it is not.
    """
    step = jax.jit(lambda state, data: meta_step(meta, state, data))
    begin = [
        jax.jit(lambda run, theta, stage, inner=inner: renew(inner, run, theta, stage))
        for inner in inners
    ]

    @functools.cache
    def search(component):
        return locator(inners[component], order=order, objective=objective)

    def explain(state, data, steps, fine=None):
        # On one device: the states of a run may be spread over several.
        device = min(state.step.devices(), key=lambda device: device.id)
        with jax.default_device(device):
            state, data = jax.device_put((state, data), device)
            return on_one(state, data, steps, fine)

    def on_one(state, data, steps, fine):
        if fine is not None:
            before = state
            for _ in range(steps - 1):
                before, _ = step(before, data)
            row = int(np.flatnonzero(~fine)[0])
            if sentence := seen(before, row, data):
                return about(before, row, sentence)
        found = _replay(step, state, data, steps)
        if found is None:
            return (
                f"Run again on one device, the {steps} meta-steps after {int(state.step)} have "
                "finite meta-gradients: the numbers are at the edge of overflow, or the device is "
                "at fault."
            )
        before, row = found
        return about(before, row, seen(before, row, data) or _NOWHERE)

    def about(before, row, sentence):
        component, problem = divmod(row, meta.num_problems)
        name = inners[component].family.name
        return f"Meta-step {int(before.step) + 1}, problem {problem} ({name}): {sentence}"

    def seen(before, row, data):
        """What is wrong in the window of that row, or None."""
        component, problem = divmod(row, meta.num_problems)
        own, part = data, before.estimator
        if reads is not None:
            own, part = data[reads[component]], before.estimator[component]
        for run in _runs(part, problem):
            # Evolution strategies have two runs, seen here through the theta between them.
            run = begin[component](run, before.theta, before.stage)
            if sentence := search(component)(before.theta, run, own):
                return sentence
        return None

    return explain


def _replay(step, state, data, steps: int) -> tuple[base.MetaState, int] | None:
    """Takes `steps` meta-steps from `state` (layout of checkpoints) one by one: the state before
    the first in which a problem was left out, and the row of that; None if there is none.

    Row i of an estimator is problem i; row j · num_problems + i of a mixture is its estimator j's.
    """
    for _ in range(steps):
        following, metrics = step(state, data)
        fine = np.asarray(metrics["finite"])
        if not fine.all():
            return state, int(np.flatnonzero(~fine)[0])
        state = following
    return None


def locator(
    inner: Inner, *, order: str = "first", objective: Objective | None = None
) -> Callable[[base.PyTree, base.InnerState, base.PyTree], str | None]:
    """Makes (theta, run, data) -> where the first number that is not finite appears in the window
    that begins at `run`: one sentence, or None. `run` is renewed already (`unroll.renew`), as a
    window begins.

    The forward pass first, step by step: parameters, batch, loss, gradient, features by name,
    update, held-out loss. If it is finite, the derivatives a meta-gradient takes: with order
    "exact" of each feature by the gradient and of the gradient by the parameters, from the window's
    second step on (the first sees nothing that depends on theta, unless that holds the start of the
    run); then of the updates by theta.

    Args:
      order: of the estimator, "first" or "exact".
      objective: of the estimator: whether it reads validation batches, and logarithms of losses.
        Without it the former are checked and the latter are not.
    """
    passes = [_values, _slopes_by_gradient, _slopes_by_theta]
    if order != "exact":
        passes.remove(_slopes_by_gradient)
    unseen = objective is not None and not objective.reads_validation
    step = jax.jit(lambda theta, run, data: _values(inner, theta, run, data)[0])
    last_loss = jax.jit(lambda theta, run, data: _last_loss(inner, theta, run, data))
    watches = {
        look: jax.jit(lambda theta, run, data, look=look: look(inner, theta, run, data)[1])
        for look in passes
    }

    def locate(theta, run, data):
        for name, tree in (("the optimizer's weight", theta), ("the problem's", run.problem)):
            if tensor := _first_bad(tree):
                return f"before the window {name} {tensor} is not finite."
        for look, watch in watches.items():
            state = run
            for k in range(inner.length):
                seen = watch(theta, state, data)
                if look is not _slopes_by_gradient or k or inner.optimizer.start is not None:
                    for quantity, tree in seen.items():
                        if "validation" in quantity and unseen:
                            continue
                        if sentence := _fault(quantity, tree, objective):
                            late = "validation" in quantity or "updated" in quantity
                            when = "after" if late else "at"
                            return f"{when} inner step {int(state.step)} {sentence}."
                state = step(theta, state, data)
            if look is _values:
                last = last_loss(theta, state, data)
                if sentence := _fault(_LOSS, last, objective):
                    return f"after inner step {int(state.step) - 1} {sentence}."
        return None

    return locate


_LOSS, _HELD_OUT = "the training loss", "the validation loss"


def _values(inner, theta, run, data):
    """(the state after a step, what it computed: {quantity: pytree} in order of appearance)."""
    family = inner.family
    batch = batch_at(family, run, data)
    loss, gradient = jax.value_and_grad(_training_loss(inner, theta))(
        run.params, run.problem, batch
    )
    # An OrderedDict comes out of jit in this order, a dict in that of its keys.
    seen = OrderedDict({"parameter": run.params, "the training batch's": batch, _LOSS: loss})
    seen["the gradient of"] = gradient
    for name, row in _features(inner, theta, run, gradient).items():
        seen[f"feature {name} of"] = row
    updates, opt_state = _update(inner, theta, run, gradient)
    params = optax.apply_updates(run.params, updates)
    after = run._replace(params=params, opt_state=opt_state, step=run.step + 1)
    seen["the update of"] = updates
    seen["the optimizer's state"] = opt_state
    seen["the updated parameter"] = params
    held_out = batch_at(family, after, data, VALIDATION)
    value, pull = jax.value_and_grad(family.loss)(params, run.problem, held_out)
    seen["the validation batch's"] = held_out
    seen[_HELD_OUT] = value
    seen["the validation gradient of"] = pull
    return after, seen


def _last_loss(inner, theta, run, data):
    batch = batch_at(inner.family, run, data)
    return _training_loss(inner, theta)(run.params, run.problem, batch)


def _training_loss(inner, theta):
    return trained_on(inner.family, inner.optimizer, theta).loss


def _slopes_by_gradient(inner, theta, run, data):
    """Derivatives that order "exact" takes, along one direction of ones: for a feature that is
    coordinate-wise the derivative of every coordinate by its own gradient, for those that are made
    from a whole matrix or tensor the sum over the gradients they see. Whatever is not finite shows
    in either."""
    batch = batch_at(inner.family, run, data)

    def gradient_at(params):
        return jax.grad(_training_loss(inner, theta))(params, run.problem, batch)

    def slope(function, x):
        return jax.jvp(function, (x,), (jax.tree.map(jnp.ones_like, x),))[1]

    gradient = gradient_at(run.params)
    rows = slope(lambda g: OrderedDict(_features(inner, theta, run, g)), gradient)
    seen = OrderedDict()
    for name in rows:
        seen[f"{_BY_GRADIENT} feature {name} of"] = rows[name]
    updates = slope(lambda g: _update(inner, theta, run, g)[0], gradient)
    seen[f"{_BY_GRADIENT} the update of"] = updates
    seen["the second derivative of the loss by"] = slope(gradient_at, run.params)
    return None, seen


def _slopes_by_theta(inner, theta, run, data):
    batch = batch_at(inner.family, run, data)
    gradient = jax.grad(_training_loss(inner, theta))(run.params, run.problem, batch)

    def total(theta):
        return sum(jnp.sum(x) for x in jax.tree.leaves(_update(inner, theta, run, gradient)[0]))

    return None, {"the derivative of the updates by the weight": jax.grad(total)(theta)}


def _update(inner, theta, run, gradient):
    """(updates, optimizer's state)."""
    rule = inner.optimizer.rule
    if not isinstance(rule, base.Rule):
        return inner.optimizer.bind(theta).update(
            gradient, run.opt_state, run.params, num_steps=run.known_horizon
        )
    g, p = _flat(theta, gradient), _flat(theta, run.params)
    shapes = coordinates.shapes_of(run.params)
    updates, opt_state, _ = coordinates.advance(
        rule, theta, g, p, run.opt_state, run.known_horizon, shapes
    )
    return coordinates.unflatten(updates, run.params), opt_state


def _features(inner, theta, run, gradient):
    """{name: that feature, like the parameters} for optimizers with a rule."""
    rule = inner.optimizer.rule
    if rule is None:
        return {}
    state = run.opt_state
    if isinstance(rule, base.PerTensorRule):
        rows = rule.observe(gradient, run.params, state.accumulators)[1]
        leaves, treedef = jax.tree.flatten(run.params)
        return {
            name: treedef.unflatten(list(row[: len(leaves)]))
            for name, row in zip(rule.features, rows, strict=False)
        }
    g, p = _flat(theta, gradient), _flat(theta, run.params)
    rows, names = rule.observe(g, state.accumulators, p, state.step)[0], rule.features
    if rule.matrices is not None:
        shapes = coordinates.shapes_of(run.params)
        directions = coordinates.look(rule, g, p, state, shapes)[0].directions
        rows, names = [*rows, *directions], names + rule.matrices.names
    return {
        name: coordinates.unflatten(row, run.params) for name, row in zip(names, rows, strict=True)
    }


def _flat(theta, tree):
    return coordinates.flatten(tree, coordinates.dtype_of(theta))


def _runs(state, problem):
    """The inner runs of one problem in the state of an estimator: one, or two of a pair."""
    nodes = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, base.InnerState))
    run = next(x for x in nodes if isinstance(x, base.InnerState))
    run = jax.tree.map(lambda x: x[problem], run)
    if run.step.ndim == 0:
        return [run]
    return [jax.tree.map(lambda x, i=i: x[i], run) for i in range(run.step.shape[0])]


def _fault(quantity, tree, objective):
    """What is wrong with a quantity, or None."""
    tensor = _first_bad(tree)
    if tensor is not None:
        remedy = _NO_SLOPE if quantity.startswith(_BY_GRADIENT) else ""
        return f"{quantity} {tensor} is not finite{remedy}".replace("  ", " ")
    if objective is None or quantity not in (_LOSS, _HELD_OUT):
        return None
    read = objective.reads_validation if quantity == _HELD_OUT else objective.reads_train
    if read and float(tree) < objective.least(tree.dtype):
        return (
            f"{quantity} is {float(tree):g}, which has no logarithm: choose objective.form 'plain' "
            "or 'last', or add a constant to the task's loss"
        )
    return None


def _first_bad(tree) -> str | None:
    """The path and first coordinate of the first leaf that is not finite: "layer/w[2, 0] (nan, and
    5 of 12 in all)"; None if all are finite. A tensor without a path is only counted."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        values = np.asarray(leaf).astype(np.float64)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            place = tuple(int(i) for i in bad[0])
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            name += str(list(place)) if place else ""
            total = f", {len(bad)} of {values.size} numbers" if values.size > 1 else ""
            return f"{name} ({values[place]:g}{total})".lstrip()
    return None
