"""First-order meta-gradients of rules that act on whole tensors, from inner products alone.

With uₜ = Σⱼ cₜⱼ dₜⱼ (`base.PerTensorRule`) and what the optimizer observes held constant, a
window's losses meet theta only in the coefficients cₜⱼ, one a tensor and direction, and

    ∂L/∂cₜⱼ = ⟨λₜ, dₜⱼ⟩,   λₜ = Σ_{s>t} wₛ ρ′(ℓₛ) ∇ℓₛ,

so that the backward pass adds up λ from the window's end, takes one inner product a tensor,
direction and step, and differentiates the network at [K, J, G] numbers: no array with a number for
each coordinate goes back through the window. The result is that of `autodiff.truncated`, order
"first".
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2l.core import base
from l2l.core.unroll import TRAIN, VALIDATION, Inner, batch_at, first, renew
from l2l.estimators.objective import Objective


class PerTensorGradientState(NamedTuple):
    """teacher: the optax state of the imitated Adam, or ()."""

    inner: base.InnerState
    teacher: Any


class Window(NamedTuple):
    """What the forward pass keeps of K steps.

    directions: J pytrees like the parameters, leaves [K, ...]. features: [K, S, G], before each
    step. pulls: wₛ ρ′(ℓₛ) ∇ℓₛ after each step, a pytree with leaves [K, ...]. off: how far each
    update is from the teacher's, over its rate, likewise, or ().
    """

    directions: tuple[Any, ...]
    features: jax.Array
    pulls: Any
    off: Any


def first_order_per_tensor(
    inner: Inner, objective: Objective, teacher, over_problems: Callable
) -> base.MetaGradient:
    """Truncated first-order meta-gradients of an optimizer whose rule is a `PerTensorRule`.

    Args:
      teacher: a `first_order.Teacher`, or None.
      over_problems: (function, states) -> its results, mapped over the leading axis.
    """

    def init(keys, theta, stage):
        def one(key):
            state = first(inner, key, theta, stage)
            taught = () if teacher is None else teacher.adam.init(state.params)
            return PerTensorGradientState(state, taught)

        return jax.vmap(one)(keys)

    def one_problem(theta, state, data, stage):
        run = renew(inner, state.inner, theta, stage)
        taught = jax.tree.map(lambda x: jnp.where(run.step == 0, 0, x), state.teacher)
        after, taught, window, metrics = _forward(
            inner, objective, teacher, theta, run, taught, data
        )
        pulled = _backward(inner, teacher, run, window, stage.imitation)
        gradient = _through_network(inner, theta, run, window.features, pulled)
        return gradient, PerTensorGradientState(after, taught), metrics

    def estimate(theta, state, data, stage):
        return over_problems(lambda s: one_problem(theta, s, data, stage), state)

    return base.MetaGradient(init, estimate)


def _forward(inner, objective, teacher, theta, run, taught, data):
    """(the run after K steps, the teacher's state, `Window`, metrics)."""
    rule, family = inner.optimizer.rule, inner.family
    gradient_of = jax.value_and_grad(family.loss)

    def step(carry, _):
        state, taught = carry
        batch = batch_at(family, state, data)
        loss, gradient = gradient_of(state.params, state.problem, batch)
        seen, features, accumulators = rule.observe(
            gradient, state.params, state.opt_state.accumulators
        )
        coefficients, hidden = rule.propose(
            theta, features, state.step, state.known_horizon, state.opt_state.hidden
        )
        directions = _directions(rule, seen, coefficients, state.params)
        updates = _sum(coefficients, directions)
        off = ()
        if teacher is not None:
            wanted, taught = teacher.adam.update(gradient, taught)
            off = jax.tree.map(lambda u, d: u / teacher.learning_rate + d, updates, wanted)
        params = optax.apply_updates(state.params, updates)
        state = state._replace(
            params=params,
            opt_state=type(state.opt_state)(accumulators, hidden),
            step=state.step + 1,
        )
        held_out: Any = ()
        if objective.reads_validation:
            batch = batch_at(family, state, data, VALIDATION)
            held_out = gradient_of(params, state.problem, batch)
        return (state, taught), (loss, gradient, directions, features, off, held_out)

    (after, taught), out = jax.lax.scan(step, (run, taught), None, inner.length)
    losses, gradients, directions, features, off, held_out = out
    last = gradient_of(after.params, run.problem, batch_at(family, after, data, TRAIN))
    following = jnp.concatenate([losses[1:], last[0][None]])
    meta_loss = objective.at(run.step, run.num_steps, inner.length)
    values, held_out_pulls = held_out if objective.reads_validation else ((), ())
    weights, held_out_weights = meta_loss.slopes(following, values)
    pulls = []
    if objective.reads_train:
        # The loss that follows update t is met, with its gradient, at step t + 1.
        ahead = jax.tree.map(lambda g, x: jnp.concatenate([g[1:], x[None]]), gradients, last[1])
        pulls.append(_weighed(weights, ahead))
    if objective.reads_validation:
        pulls.append(_weighed(held_out_weights, held_out_pulls))
    metrics = objective.metrics(meta_loss.value(following, values), following, values)
    pulls = jax.tree.map(lambda *x: sum(x), *pulls)
    return after, taught, Window(directions, features, pulls, off), metrics


def _directions(rule, seen, coefficients, params) -> tuple:
    """Each of the J directions by itself: pytrees like params."""
    ones = jnp.ones_like(coefficients[0])
    basis = jnp.eye(len(coefficients), dtype=ones.dtype)
    return tuple(rule.combine(seen, row[:, None] * ones[None], params) for row in basis)


def _sum(coefficients, directions):
    """Σⱼ cⱼ dⱼ, tensor by tensor."""
    leaves = [jax.tree.leaves(d) for d in directions]
    own = [
        sum(coefficients[j, i].astype(d[i].dtype) * d[i] for j, d in enumerate(leaves))
        for i in range(len(leaves[0]))
    ]
    return jax.tree.unflatten(jax.tree.structure(directions[0]), own)


def _weighed(weights, tree):
    """Leaves [K, ...] times weights [K]."""
    return jax.tree.map(
        lambda x: x * weights.reshape(-1, *[1] * (x.ndim - 1)).astype(x.dtype), tree
    )


def _backward(inner, teacher, run, window, imitation) -> jax.Array:
    """∂L/∂c: [K, J, G]."""
    size = base.count(run.params) * inner.length

    def products(pull, directions):
        leaves = zip(*(jax.tree.leaves(x) for x in (pull, *directions)), strict=True)
        return jnp.stack([jnp.stack([jnp.vdot(p, d) for d in ds]) for p, *ds in leaves], 1)

    def step(later, xs):
        pull, directions, off = xs
        later = jax.tree.map(jnp.add, later, pull)
        own = later
        if teacher is not None:
            scale = 2 * imitation / (size * teacher.learning_rate)
            own = jax.tree.map(lambda x, o: x + (scale * o).astype(x.dtype), later, off)
        return later, products(own, directions)

    nothing = jax.tree.map(jnp.zeros_like, run.params)
    xs = (window.pulls, window.directions, window.off)
    return jax.lax.scan(step, nothing, xs, inner.length, reverse=True)[1]


def _through_network(inner, theta, run, features, pulled):
    """The meta-gradient, from what is asked of each step's coefficients."""
    rule = inner.optimizer.rule
    steps = run.step + jnp.arange(inner.length)

    def coefficients(theta):
        def step(hidden, xs):
            features, step = xs
            out, hidden = rule.propose(theta, features, step, run.known_horizon, hidden)
            return hidden, out

        return jax.lax.scan(step, run.opt_state.hidden, (features, steps))[1]

    values, back = jax.vjp(coefficients, theta)
    return back(pulled.astype(values.dtype))[0]
