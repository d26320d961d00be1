"""Inner training: a problem, its optimizer, and the steps between them."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from l2l.core import base

# Folded into a problem's key, so that no two uses of randomness ever share a key.
SAMPLE, INIT, HORIZON, STAGGER, NEXT, HIDE, TRAIN, VALIDATION, EVERY, NOISE = range(10)


class Inner(NamedTuple):
    """How inner runs are made.

    length:   steps in a window (the truncation); horizons are rounded to multiples of it, and to
              one window at least.
    stagger:  begin with horizons cut at random, so that one meta-batch covers all ages.
    hide_horizon_probability: that the optimizer of a run does not know its horizon.
    """

    family: base.TaskFamily
    optimizer: base.LearnedOptimizer
    length: int
    stagger: bool = True
    hide_horizon_probability: float = 0.0


def fresh(inner: Inner, key: base.RandomKey, theta, stage: base.Stage) -> base.InnerState:
    """A new inner run, all of it decided by `key`; its horizon is log-uniform in the range."""

    def fold(use):
        return jax.random.fold_in(key, use)

    problem = inner.family.sample(fold(SAMPLE))
    start = inner.optimizer.start
    params = inner.family.init(fold(INIT), problem) if start is None else start(theta)
    low, high = jnp.log(stage.shortest), jnp.log(stage.longest)
    # uniform() reaches 1 only by rounding, so the longest horizon needs the nearest multiple.
    steps = jnp.exp(low + (high - low) * jax.random.uniform(fold(HORIZON)))
    windows = jnp.maximum(jnp.round(steps / inner.length), 1).astype(jnp.int32)
    num_steps = windows * inner.length
    hidden = jax.random.bernoulli(fold(HIDE), inner.hide_horizon_probability)
    return base.InnerState(
        params=params,
        opt_state=inner.optimizer.bind(theta).init(params),
        problem=problem,
        key=key,
        step=jnp.zeros((), jnp.int32),
        num_steps=num_steps,
        known_horizon=jnp.where(hidden, 0, num_steps),
    )


def first(inner: Inner, key: base.RandomKey, theta, stage: base.Stage) -> base.InnerState:
    """The first run of a slot: like `fresh`, but cut at a random age where runs are staggered."""
    state = fresh(inner, key, theta, stage)
    if not inner.stagger:
        return state
    share = jax.random.uniform(jax.random.fold_in(key, STAGGER))
    windows = jnp.ceil(share * (state.num_steps // inner.length)).astype(jnp.int32)
    return state._replace(num_steps=jnp.maximum(windows, 1) * inner.length)


def renew(inner: Inner, state: base.InnerState, theta, stage: base.Stage) -> base.InnerState:
    """Replaces a run that is over, or that has left the finite numbers, by the next of its slot.

    Called between windows only: inside them there is nothing to mask.
    """
    over = (state.step >= state.num_steps) | ~base.finite(state.params)
    following = jax.random.fold_in(state.key, NEXT)
    return jax.lax.cond(over, lambda: fresh(inner, following, theta, stage), lambda: state)


def begun(inner: Inner, theta, state: base.InnerState) -> base.InnerState:
    """A run that is before its first step with its beginning as a function of theta, to be
    differentiated or perturbed: the start that theta holds, and the optimizer's state there. Any
    other run as it is, and so are all runs of an optimizer whose theta holds no start."""
    if inner.optimizer.start is None:
        return state
    params = inner.optimizer.start(theta)
    own = state._replace(params=params, opt_state=inner.optimizer.bind(theta).init(params))
    return jax.tree.map(lambda x, y: jnp.where(state.step == 0, x, y), own, state)


def trained_on(family: base.TaskFamily, optimizer: base.LearnedOptimizer, theta) -> base.TaskFamily:
    """The family with the loss that theta makes of its own, which the steps of a run go down."""
    if optimizer.loss is None:
        return family
    return family._replace(loss=optimizer.loss(theta, family.loss))


def batch_at(
    inner_family: base.TaskFamily, state: base.InnerState, data, use: int = TRAIN
) -> base.PyTree:
    """The batch of a step: the training one, or the validation one of the meta-loss."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, use), state.step)
    split = "train" if use == TRAIN else "validation"
    return inner_family.batch(key, state.problem, data, split)


def unroll(
    state: base.InnerState,
    data,
    family: base.TaskFamily,
    optimizer,
    length: int,
    frozen: Callable = lambda tree: tree,
) -> tuple[base.InnerState, Float[Array, " {length}"]]:
    """Trains for `length` steps; returns (state, training losses [length], each before its step).

    `optimizer` is any optax transformation with extra arguments. What it observes, the gradient and
    the parameters, passes through `frozen` first: `jax.lax.stop_gradient` makes meta-gradients
    first-order.
    """

    def step(state, _):
        batch = batch_at(family, state, data)
        loss, gradient = jax.value_and_grad(family.loss)(state.params, state.problem, batch)
        updates, opt_state = optimizer.update(
            frozen(gradient),
            state.opt_state,
            frozen(state.params),
            value=frozen(loss),
            num_steps=state.known_horizon,
        )
        # In the parameters' dtype, whatever that of the updates.
        params = optax.apply_updates(state.params, updates)
        return state._replace(params=params, opt_state=opt_state, step=state.step + 1), loss

    if length == 1:  # A loop within another would be one more to trace back through.
        state, loss = step(state, None)
        return state, loss[None]
    return jax.lax.scan(step, state, None, length)
