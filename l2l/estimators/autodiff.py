"""Truncated meta-gradients by plain automatic differentiation: for any optimizer, and of any order.

A window of K steps is differentiated as it stands; the state before it enters as a constant (the
truncation). `first_order` gives the same numbers as order "first" for optimizers that have a rule,
in a fraction of the memory; order "exact" and optimizers without a rule need this file.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.core.unroll import (
    TRAIN,
    VALIDATION,
    Inner,
    batch_at,
    begun,
    first,
    renew,
    trained_on,
    unroll,
)
from l2l.estimators.first_order import Teacher, in_segments, over_problems
from l2l.estimators.objective import Objective


class AutodiffState(NamedTuple):
    """teacher: the state of the imitated Adam, or ()."""

    inner: base.InnerState
    teacher: base.PyTree


class Imitation(NamedTuple):
    """The optax state of an optimizer beside its teacher; miss: Σ (u − u_Adam)² / its rate²."""

    student: base.PyTree
    teacher: base.PyTree
    miss: jax.Array


def truncated(
    inner: Inner,
    objective: Objective,
    *,
    order: str = "first",
    segments: bool = True,
    teacher: Teacher | None = None,
) -> base.MetaGradient:
    """The gradient of a window's meta-loss by theta; inner states persist between windows.

    With gₜ = ∇ℓₜ(θₜ), sₜ the optimizer's state and θₜ₊₁ = θₜ + u(φ; gₜ, θₜ, sₜ), the estimate is
    dL/dφ of L = Σₖ wₖ ρ(ℓₖ(θₖ)) (`Objective`) for fixed θ₀, s₀. Where theta holds the start of a
    run, θ₀ and s₀ of its first window are functions of theta: order "exact" is then MAML, order
    "first" its first-order form, FOMAML (Finn et al. 2017), when runs are one window.

    Args:
      order: "first" holds gₜ and θₜ constant where the optimizer observes them (Andrychowicz et
        al. 2016, section 2.1); "exact" differentiates through them and through the moments, which
        takes second derivatives of the task, and an optimizer with eps_root > 0.
      segments: keep only the states between √K segments of the window and compute each segment
        again when the backward pass comes to it: memory grows with √K, not K, for one more forward
        pass (Chen et al. 2016, arXiv 1604.06174).
      teacher: adds the imitation term of `first_order.Teacher`, the teacher held constant.

    An optimizer whose `init` copies theta into its state (`optax.inject_hyperparams`) gets no
    gradient through that copy: state is constant.
    """
    if order not in ("first", "exact"):
        raise UserError(f"Unknown order of meta-gradient {order!r}: choose first or exact.")
    frozen = jax.lax.stop_gradient if order == "first" else lambda tree: tree

    def start_teacher(params):
        return () if teacher is None else teacher.adam.init(params)

    def init(keys, theta, stage):
        def one(key):
            state = first(inner, key, theta, stage)
            return AutodiffState(state, start_teacher(state.params))

        return jax.vmap(one)(keys)

    def one_problem(theta, state, data, stage):
        run = renew(inner, state.inner, theta, stage)
        teaching = jax.tree.map(lambda x: jnp.where(run.step == 0, 0, x), state.teacher)

        def loss(theta):
            transform, begin = inner.optimizer.bind(theta), begun(inner, theta, run)
            if teacher is not None:
                transform = _beside(transform, teacher)
                beside = Imitation(begin.opt_state, teaching, jnp.zeros(()))
                begin = begin._replace(opt_state=beside)
            after, value, metrics = window(
                *(inner, objective, theta, begin, data),
                transform=transform,
                frozen=frozen,
                segments=segments,
            )
            if teacher is None:
                return value, (AutodiffState(after, ()), metrics)
            student, taught, miss = after.opt_state
            value += stage.imitation * miss / (base.count(run.params) * inner.length)
            return value, (AutodiffState(after._replace(opt_state=student), taught), metrics)

        gradient, (state, metrics) = jax.grad(loss, has_aux=True)(theta)
        return gradient, state, metrics

    def estimate(theta, state, data, stage):
        return over_problems(lambda s: one_problem(theta, s, data, stage), state)

    return base.MetaGradient(init, estimate)


def window(
    inner: Inner,
    objective: Objective,
    theta,
    state: base.InnerState,
    data,
    *,
    transform: optax.GradientTransformationExtraArgs | None = None,
    frozen: Callable = lambda tree: tree,
    segments: bool = False,
) -> tuple[base.InnerState, jax.Array, dict[str, jax.Array]]:
    """One window of inner training: (state after it, its meta-loss, metrics), differentiable.

    Its steps go down the loss that theta makes of the family's own, by which validation batches are
    judged.

    transform: the optimizer; by default as theta binds it.
    """
    family = trained_on(inner.family, inner.optimizer, theta)
    if transform is None:
        transform = inner.optimizer.bind(theta)
    every_step = objective.reads_validation and objective.form != "last"

    def held_out_at(state):
        batch = batch_at(family, state, data, VALIDATION)
        return inner.family.loss(state.params, state.problem, batch)

    meta_loss = objective.at(state.step, state.num_steps, inner.length)

    def steps(state, _, length):
        if not every_step:
            state, losses = unroll(state, data, family, transform, length, frozen)
            return state, (losses, ())

        def step(state, _):
            state, losses = unroll(state, data, family, transform, 1, frozen)
            return state, (losses[0], held_out_at(state))

        return jax.lax.scan(step, state, None, length)

    if segments:
        size = _segment(inner.length)
        state, (losses, held_out) = in_segments(steps, state, None, inner.length, size)
    else:
        state, (losses, held_out) = steps(state, None, inner.length)
    if objective.reads_validation and not every_step:
        # Of K numbers the form "last" reads the last.
        held_out = jnp.broadcast_to(held_out_at(state), losses.shape)
    last = family.loss(state.params, state.problem, batch_at(family, state, data, TRAIN))
    following = jnp.concatenate([losses[1:], last[None]])
    value = meta_loss.value(following, held_out)
    return state, value, objective.metrics(value, following, held_out)


def _segment(length: int) -> int:
    """Steps in a segment: about √K. Where K has a divisor d for which no more than half as much
    again is kept (K/d states between segments, and d within one), that: steps left over after whole
    segments are a second program, as long to compile as the first."""
    root = math.isqrt(length - 1) + 1
    divisors = (d for d in range(1, length + 1) if length % d == 0)
    best = min(divisors, key=lambda d: d + length // d)
    return best if best + length // best <= 3 * root else root


def _beside(student, teacher):
    """The student's updates, and in the state how far they are from the teacher's."""

    def update(updates, state, params=None, **extra_args):
        # Held constant: the student is to come to the teacher, not the teacher to the student.
        gradient = jax.lax.stop_gradient(updates)
        out, inside = student.update(updates, state.student, params, **extra_args)
        direction, taught = teacher.adam.update(gradient, state.teacher)
        off = jax.tree.map(lambda u, d: u / teacher.learning_rate + d, out, direction)
        miss = sum(jnp.sum(x * x) for x in jax.tree.leaves(off))
        return out, Imitation(inside, taught, state.miss + miss)

    def init(params):
        return Imitation(student.init(params), teacher.adam.init(params), jnp.zeros(()))

    return optax.GradientTransformationExtraArgs(init, update)
