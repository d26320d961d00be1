"""First-order meta-gradients by blocks of coordinates: the engine.

What the optimizer observes (gradients, parameters) is held constant, as in Andrychowicz et al.
(2016). Then the window's losses see an update only through the sum of updates,

    θₜ₊₁ = θₜ + uₜ,   uₜ = f(φ; xₜ, hₜ),   L = Σₛ wₛ ρ(ℓₛ(θₛ)),
    λₜ = ∂L/∂uₜ = Σ_{s>t} wₛ ρ′(ℓₛ) ∇ℓₛ,     ∂L/∂φ = Σ_i Σₜ λₜ,ᵢ ∂uₜ,ᵢ/∂φ,

so the forward pass keeps one number a coordinate and step (the gradient; further the parameter for
an optimizer that looks at it, its direction for one with a preconditioner, and the gradient of a
validation loss that is part of the meta-loss),
and the backward pass takes one block of coordinates through the whole window, forward and back,
while it is in the cache. The result is that of plain automatic differentiation of the same
estimator (`autodiff.truncated`, order "first").
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.core.unroll import TRAIN, VALIDATION, Inner, batch_at, first, renew
from l2l.estimators.first_order_per_tensor import first_order_per_tensor
from l2l.estimators.objective import Objective
from l2l.optimizers import coordinates, features


class Teacher(NamedTuple):
    """The Adam that is imitated while `Stage.imitation` is positive.

    The term added to the meta-loss is imitation · mean((u − u_Adam)²) / learning_rate², over the
    window's steps and coordinates (Chen et al. 2020 imitate analytical optimizers likewise).
    """

    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.999
    eps_root: float = 1e-8

    @property
    def adam(self) -> optax.GradientTransformation:
        """Its direction, before the rate."""
        return optax.scale_by_adam(b1=self.b1, b2=self.b2, eps_root=self.eps_root)


# Windows longer than twice this go back segment by segment, each computed a second time from the
# state at its beginning: what a block then stores between the two passes stays in the cache.
# Measured over 200 steps, M coordinate-steps a second without segments and with those of 50, 20,
# 10, 5 steps: 2xLSTM-20 0.80, 0.81, 1.04, 1.07, 1.09; 1xLSTM-8 4.3, 5.6, 6.4, 6.7, 6.8.
SEGMENT = 10


class FirstOrderState(NamedTuple):
    """teacher: the moments of the imitated Adam, or ()."""

    inner: base.InnerState
    teacher: features.Moments | tuple


class Seen(NamedTuple):
    """What the forward pass keeps of a window of K steps.

    gradient, params: [K, P], before each step. directions: [K, E, P], or (). held_out: of the
    validation loss after each step, or (). last: [P], the gradient after the last step. weights,
    held_out_weights: [K], w ρ′(ℓ) of the training and of the validation loss after each step.
    tensors: [K, S, G], what the rule saw of whole tensors before each step, or ().
    """

    gradient: jax.Array
    params: jax.Array
    directions: jax.Array | tuple
    held_out: jax.Array | tuple
    last: jax.Array
    weights: jax.Array
    held_out_weights: jax.Array | tuple
    tensors: jax.Array | tuple

    def on(self, blocks: coordinates.Blocks, i) -> "Seen":
        """What was seen of the coordinates of block i."""
        own = ("gradient", "params", "directions", "held_out", "last")
        return self._replace(**{name: blocks.cut(getattr(self, name), i) for name in own})

    def pulls(self):
        """∂L/∂θ after each step, [K, P]: the loss that follows update t is met at step t + 1."""
        following = jnp.concatenate([self.gradient[1:], self.last[None]])
        pulls = self.weights[:, None] * following
        if not isinstance(self.held_out, tuple):
            pulls += self.held_out_weights[:, None] * self.held_out
        return pulls


def first_order(
    inner: Inner, objective: Objective, teacher: Teacher | None = None, block: int | None = None
) -> base.MetaGradient:
    """Truncated first-order meta-gradients of an optimizer that has a `rule`.

    Args:
      block: coordinates in a block, if not what suits the machine.

    Raises:
      UserError: the optimizer has no rule.
    """
    rule, family = inner.optimizer.rule, inner.family
    if rule is None:
        raise UserError(
            "This optimizer has no rule that acts coordinate by coordinate, which the first-order "
            "engine needs: use the estimator autodiff.truncated."
        )
    if isinstance(rule, base.PerTensorRule):
        return first_order_per_tensor(inner, objective, teacher, over_problems)

    def init(keys, theta, stage):
        def one(key):
            state = first(inner, key, theta, stage)
            moments = ()
            if teacher is not None:
                dtype = coordinates.dtype_of(theta)
                moments = features.zero_moments(1, base.count(state.params), dtype)
            return FirstOrderState(state, moments)

        return jax.vmap(one)(keys)

    def forward(theta, state, data):
        """K steps: (the state after them, what the backward pass needs, metrics)."""
        dtype = coordinates.dtype_of(theta)
        gradient_of = jax.value_and_grad(family.loss)
        on_train, on_validation = objective.shares(state.step, state.num_steps)
        emphases = objective.emphases(state.step, state.num_steps, inner.length)

        def step(state, _):
            loss, gradient = gradient_of(state.params, state.problem, batch_at(family, state, data))
            g, p = (coordinates.flatten(tree, dtype) for tree in (gradient, state.params))
            shapes = coordinates.shapes_of(state.params)
            updates, opt_state, seen = coordinates.advance(
                rule, theta, g, p, state.opt_state, state.told, shapes, block
            )
            change = coordinates.unflatten(updates, state.params)
            params = optax.apply_updates(state.params, change)
            state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
            value, pull = (), ()
            if objective.reads_validation:
                batch = batch_at(family, state, data, VALIDATION)
                value, pull = gradient_of(params, state.problem, batch)
                pull = coordinates.flatten(pull, dtype)
            return state, (loss, g, p, value, pull, seen)

        state, out = jax.lax.scan(step, state, None, inner.length)
        losses, g, p, values, held_out, whole = out
        last, pull = gradient_of(state.params, state.problem, batch_at(family, state, data, TRAIN))
        following = jnp.concatenate([losses[1:], last[None]])
        slope = jax.grad(objective.value)
        seen = Seen(
            gradient=g,
            params=p,
            directions=whole.directions,
            held_out=held_out,
            last=coordinates.flatten(pull, dtype),
            weights=jnp.zeros_like(losses),
            held_out_weights=(),
            tensors=whole.tensors,
        )
        meta_loss = jnp.zeros((), jnp.promote_types(losses.dtype, jnp.float32))
        if objective.reads_train:
            seen = seen._replace(weights=on_train * slope(following, emphases))
            meta_loss += on_train * objective.value(following, emphases)
        if objective.reads_validation:
            seen = seen._replace(held_out_weights=on_validation * slope(values, emphases))
            meta_loss += on_validation * objective.value(values, emphases)
        metrics = dict(
            meta_loss=meta_loss,
            loss=last,
            capped=jnp.mean((following > objective.cap).astype(losses.dtype)),
            lowest=objective.lowest(following, values),
        )
        return state, seen, metrics

    def backward(theta, start, told, seen, moments, imitation, shapes):
        """(the window's meta-gradient, the teacher's moments after it), block by block."""
        size = seen.last.size
        blocks = coordinates.blocks_of(size, block or coordinates.width(start.hidden))
        steps = start.step + jnp.arange(inner.length)

        def tensor_signals(theta):
            """What the network for whole tensors says at each step: [K, O, G], or ()."""
            if rule.tensors is None:
                return ()

            def step(hidden, xs):
                seen, step = xs
                context = rule.context(step, told).astype(seen.dtype)
                signals, hidden = rule.tensors.propose(theta, seen, context, hidden)
                return hidden, signals

            return jax.lax.scan(step, start.tensors[1], (seen.tensors, steps))[1]

        signals, back_to_theta = jax.vjp(tensor_signals, theta)

        def block_loss(both, statistics, hidden, moments, seen, fresh, first):
            theta, signals = both

            def step(carry, xs):
                statistics, hidden, moments, moved = carry
                g, p, directions, pull, signals, step = xs
                rows, statistics = rule.observe(g, statistics, p, step)
                rows = coordinates.below(rows, directions, signals, shapes, first)
                context = rule.context(step, told).astype(g.dtype)
                updates, hidden = rule.propose(theta, rows, context, hidden)
                # Σₜ ⟨λₜ, uₜ⟩ = Σₛ ⟨pullₛ, Σ_{t≤s} uₜ⟩: the sums λ come out of the backward pass.
                moved = moved + updates
                out = jnp.vdot(pull, moved)
                if teacher is not None:
                    taught, moments = _teach(teacher, g, moments, step)
                    off = jnp.where(fresh, updates - taught, 0) / teacher.learning_rate
                    out += imitation * jnp.vdot(off, off) / (size * inner.length)
                return (statistics, hidden, moments, moved), out

            def scan(carry, xs, length):
                if length > 2 * SEGMENT:
                    return in_segments(scan, carry, xs, length, SEGMENT)
                return jax.lax.scan(step, carry, xs, length)

            pulls = jnp.where(fresh, seen.pulls(), 0)
            xs = (seen.gradient, seen.params, seen.directions, pulls, signals, steps)
            carry = (statistics, hidden, moments, jnp.zeros_like(seen.last))
            (*_, moments, _), out = scan(carry, xs, inner.length)
            return jnp.sum(out), moments

        gradient_of = jax.grad(block_loss, has_aux=True)
        state, both = (start.statistics, start.hidden), (theta, signals)

        def one_block(i, carry):
            total, moments = carry
            arrays = (*blocks.cut(state, i), blocks.cut(moments, i))
            arrays += (seen.on(blocks, i), blocks.fresh(i), blocks.start(i))
            gradient, after = gradient_of(both, *arrays)
            total = jax.tree.map(jnp.add, total, gradient)
            return total, blocks.put(moments, after, i)

        if blocks.count == 1:
            total, moments = gradient_of(both, *state, moments, seen, True, None)
        else:
            zeros = jax.tree.map(jnp.zeros_like, both)
            total, moments = jax.lax.fori_loop(0, blocks.count, one_block, (zeros, moments))
        direct, by_signals = total
        (indirect,) = back_to_theta(by_signals)
        return jax.tree.map(jnp.add, direct, indirect), moments

    def one_problem(theta, state, data, stage):
        run = renew(inner, state.inner, theta, stage)
        moments = state.teacher
        if teacher is not None:
            moments = jax.tree.map(lambda x: jnp.where(run.step == 0, 0, x), moments)
        after, seen, metrics = forward(theta, run, data)
        shapes = coordinates.shapes_of(run.params)
        gradient, moments = backward(
            theta, run.opt_state, run.told, seen, moments, stage.imitation, shapes
        )
        return gradient, FirstOrderState(after, moments), metrics

    def estimate(theta, state, data, stage):
        return over_problems(lambda s: one_problem(theta, s, data, stage), state)

    return base.MetaGradient(init, estimate)


def in_segments(steps: Callable, carry, xs, length: int, size: int):
    """steps(carry, xs, length), `size` of them at a time, computed again in the backward pass.

    Args:
      steps: (carry, xs [n, ...], n) -> (carry, out [n, ...]), for any n.
    """
    whole, rest = divmod(length, size)
    cut = whole * size
    # A loop keeps the compiler from merging the two computations: no barrier is needed.
    segment = jax.checkpoint(lambda carry, xs: steps(carry, xs, size), prevent_cse=False)
    by_segment = jax.tree.map(lambda x: x[:cut].reshape(whole, size, *x.shape[1:]), xs)
    carry, out = jax.lax.scan(segment, carry, by_segment, whole)
    out = jax.tree.map(lambda x: x.reshape(cut, *x.shape[2:]), out)
    if rest:
        last = jax.checkpoint(lambda carry, xs: steps(carry, xs, rest))
        carry, tail = last(carry, jax.tree.map(lambda x: x[cut:], xs))
        out = jax.tree.map(lambda *x: jnp.concatenate(x), out, tail)
    return carry, out


def over_problems(function, states):
    """Maps over problems: one after another on a CPU (each window stays in the cache, and memory is
    that of one problem), all at once on an accelerator."""
    if coordinates.platform() == "cpu":
        return jax.lax.map(function, states)
    return jax.vmap(function)(states)


def _teach(teacher, gradient, moments, step):
    """Adam's update [n] from the same gradient, and its moments."""
    state = optax.ScaleByAdamState(step, moments.mu[0], moments.nu)
    direction, state = teacher.adam.update(gradient, state)
    moments = features.Moments(state.mu[None], state.nu)
    return -teacher.learning_rate * direction, moments
