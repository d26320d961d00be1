"""First-order meta-gradients by blocks of coordinates: the engine.

What the optimizer observes (gradients, parameters) is held constant, as in Andrychowicz et al.
(2016). Then the window's losses see an update only through the sum of updates,

    θₜ₊₁ = θₜ + uₜ,   uₜ = f(φ; xₜ, hₜ),   L = Σₛ wₛ ρ(ℓₛ(θₛ)),
    λₜ = ∂L/∂uₜ = Σ_{s>t} wₛ ρ′(ℓₛ) ∇ℓₛ,     ∂L/∂φ = Σ_i Σₜ λₜ,ᵢ ∂uₜ,ᵢ/∂φ,

so the forward pass keeps two or three numbers a coordinate and step (the gradient, the parameter
and, where it is another, the gradient of the meta-loss), and the backward pass takes one block of
coordinates through the whole window, forward and back, while it is in the cache. The result is that
of plain automatic differentiation of the same estimator (`autodiff.truncated`, order "first").
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2l import base, features
from l2l.estimators.objective import Objective
from l2l.optimizers import coordinates
from l2l.unroll import TRAIN, VALIDATION, Inner, batch_at, first, renew


class Teacher(NamedTuple):
    """The Adam that is imitated while `Stage.imitation` is positive.

    The term added to the meta-loss is imitation · mean((u − u_Adam)²) / learning_rate², over the
    window's steps and coordinates (Chen et al. 2020 imitate analytical optimizers likewise).
    """

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps_root: float = 1e-8


class FirstOrderState(NamedTuple):
    inner: base.InnerState
    teacher: features.Moments | tuple


def first_order(
    inner: Inner, objective: Objective, teacher: Teacher | None = None, block: int | None = None
) -> base.MetaGradient:
    """Truncated first-order meta-gradients of an optimizer that has a `rule`."""
    rule, family = inner.optimizer.rule, inner.family
    if rule is None:
        raise ValueError(
            "This optimizer has no rule that acts coordinate by coordinate, which the first-order "
            "engine needs: use the estimator autodiff.truncated."
        )
    if block is not None:  # The states of inner runs must come in the same blocks.
        own = inner.optimizer._replace(bind=lambda theta: coordinates.bind(rule, theta, block))
        inner = inner._replace(optimizer=own)

    def init(keys, theta, stage):
        def one(key):
            state = first(inner, key, theta, stage)
            return FirstOrderState(state, _teacher_start(teacher, state.params, theta, block))

        return jax.vmap(one)(keys)

    def forward(theta, state, teaching, data):
        """K steps; what the backward pass needs of them, each [K, num_blocks, B]."""
        dtype = coordinates.dtype_of(theta)
        flat = lambda tree: coordinates.cut(coordinates.flatten(tree, dtype), block)  # noqa: E731
        gradient_of = jax.value_and_grad(family.loss)
        on_train, on_validation = objective.shares(state.step, state.num_steps)

        def step(carry, _):
            state, teaching = carry
            loss, gradient = gradient_of(state.params, state.problem, batch_at(family, state, data))
            g, p = flat(gradient), flat(state.params)
            updates, opt_state = coordinates.advance(rule, theta, g, p, state.opt_state, state.told)
            taught = ()
            if teacher is not None:
                taught, teaching = _teach(teacher, g, teaching, state.step)
            change = coordinates.unflatten(updates.reshape(-1), state.params)
            params = jax.tree.map(jnp.add, state.params, change)
            state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
            held_out = ()
            if objective.reads_validation:
                value, pull = gradient_of(
                    params, state.problem, batch_at(family, state, data, VALIDATION)
                )
                held_out = (value, flat(pull))
            return (state, teaching), (loss, g, p, held_out, taught)

        (state, teaching), (losses, g, p, held_out, taught) = jax.lax.scan(
            step, (state, teaching), None, inner.length
        )
        last, pull = gradient_of(state.params, state.problem, batch_at(family, state, data, TRAIN))
        following = jnp.concatenate([losses[1:], last[None]])

        def weighted(values, weight):  # w ρ'(ℓ) for every loss of the window
            return weight * jax.grad(objective.value)(values)[:, None, None]

        pulls = jnp.zeros_like(g)
        meta_loss = jnp.zeros((), losses.dtype)
        if objective.reads_train:
            weights = weighted(following, on_train)
            # Shifted by one: the loss that follows update t is met at step t + 1.
            pulls = jnp.concatenate([weights[:-1] * g[1:], weights[-1:] * flat(pull)[None]])
            meta_loss += on_train * objective.value(following)
        if objective.reads_validation:
            pulls += weighted(held_out[0], on_validation) * held_out[1]
            meta_loss += on_validation * objective.value(held_out[0])
        blame = jnp.flip(jnp.cumsum(jnp.flip(pulls, 0), 0), 0)
        metrics = dict(
            meta_loss=meta_loss,
            loss=last,
            capped=jnp.mean((following > objective.cap).astype(losses.dtype)),
        )
        return state, teaching, (g, p, blame, taught), metrics

    def backward(theta, start, told, window, imitation, size):
        """Σ over blocks of the window's meta-gradient; nothing outlives its block."""
        steps = start.step + jnp.arange(inner.length)

        num_blocks, width = window[0].shape[1:]
        # Nobody teaches the padding of the last block, which some optimizers move.
        real = (jnp.arange(num_blocks * width) < size).reshape(num_blocks, width)

        def block_loss(theta, statistics, hidden, window, real):
            def step(carry, xs):
                statistics, hidden = carry
                g, p, blame, taught, step = xs
                rows, statistics = rule.observe(g, statistics, p, step)
                context = rule.context(step, told).astype(g.dtype)
                updates, hidden = rule.propose(theta, rows, context, hidden)
                out = jnp.vdot(blame, updates)
                if teacher is not None:
                    off = jnp.where(real, updates - taught, 0) / teacher.learning_rate
                    out += imitation * jnp.vdot(off, off) / (size * inner.length)
                return (statistics, hidden), out

            return jnp.sum(jax.lax.scan(step, (statistics, hidden), (*window, steps))[1])

        def one_block(total, xs):
            statistics, hidden, window, real = xs
            gradient = jax.grad(block_loss)(theta, statistics, hidden, window, real)
            return jax.tree.map(jnp.add, total, gradient), None

        zeros = jax.tree.map(jnp.zeros_like, theta)
        by_block = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), window)
        return jax.lax.scan(one_block, zeros, (start.statistics, start.hidden, by_block, real))[0]

    def one_problem(theta, state, data, stage):
        run = renew(inner, state.inner, theta, stage)
        teaching = state.teacher
        if teacher is not None:
            teaching = jax.tree.map(lambda x: jnp.where(run.step == 0, 0, x), teaching)
        after, teaching, window, metrics = forward(theta, run, teaching, data)
        gradient = backward(
            theta, run.opt_state, run.told, window, stage.imitation, base.count(run.params)
        )
        return gradient, FirstOrderState(after, teaching), metrics

    def estimate(theta, state, data, stage):
        return over_problems(lambda s: one_problem(theta, s, data, stage), state)

    return base.MetaGradient(init, estimate)


def over_problems(function, states):
    """Maps over problems: one after another on a CPU (each window stays in the cache, and memory is
    that of one problem), all at once on an accelerator."""
    if jax.default_backend() == "cpu":
        return jax.lax.map(function, states)
    return jax.vmap(function)(states)


def _teacher_start(teacher, params, theta, block):
    if teacher is None:
        return ()
    moments = features.zero_moments(1, base.count(params), coordinates.dtype_of(theta))
    return jax.tree.map(lambda x: coordinates.cut(x, block), moments)


def _teach(teacher, gradient, moments, step):
    """Adam's update [num_blocks, B] from the same gradient, and its moments."""
    adam = optax.scale_by_adam(b1=teacher.b1, b2=teacher.b2, eps_root=teacher.eps_root)
    state = optax.ScaleByAdamState(step, moments.mu[:, 0], moments.nu)
    direction, state = adam.update(gradient, state)
    moments = features.Moments(state.mu[:, None], state.nu)
    return -teacher.learning_rate * direction, moments
