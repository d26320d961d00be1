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
from l2l.core.unroll import EVERY, TRAIN, VALIDATION, Inner, batch_at, first, renew
from l2l.estimators.first_order_per_tensor import first_order_per_tensor
from l2l.estimators.objective import Objective
from l2l.optimizers import blocks, coordinates, features, ranges


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
# Fields of `Seen` with a number for each coordinate.
OF_EACH = ("gradient", "params", "directions", "held_out", "last")


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

    def on(self, cut: blocks.Blocks, i) -> "Seen":
        """What was seen of the coordinates of block i."""
        return self._replace(**{name: cut.cut(getattr(self, name), i) for name in OF_EACH})

    def pulls(self):
        """∂L/∂θ after each step, [K, P]: the loss that follows update t is met at step t + 1."""
        following = jnp.concatenate([self.gradient[1:], self.last[None]])
        pulls = self.weights[:, None] * following
        if not isinstance(self.held_out, tuple):
            pulls += jnp.asarray(self.held_out_weights)[:, None] * self.held_out
        return pulls


def first_order(
    inner: Inner,
    objective: Objective,
    teacher: Teacher | None = None,
    block: int | None = None,
    every: int = 1,
) -> base.MetaGradient:
    """Truncated first-order meta-gradients of an optimizer that has a `rule`.

    Args:
      block: coordinates in a block; by default what suits the machine.
      every: the way back takes one coordinate in this many, from an offset that is drawn for each
        window, and counts it as often. The meta-gradient is a sum over coordinates, so its mean
        over the offsets is the whole one. The way back is some four fifths of the time.

    Raises:
      UserError: the optimizer has no rule; `block` or `every` is no positive integer, or `every` is
        not 1 where a network reads whole tensors or Adam is imitated, which take all coordinates.
    """
    rule = inner.optimizer.rule
    ranges.whole("estimator.every", every)
    if block is not None:
        ranges.whole("estimator.block", block)
    if rule is None:
        raise UserError(
            "This optimizer has no rule that acts coordinate by coordinate, which the first-order "
            "engine needs: use the estimator autodiff.truncated."
        )
    whole = isinstance(rule, base.PerTensorRule)
    if every > 1 and (whole or rule.tensors is not None or teacher is not None):
        reason = "the optimizer reads whole tensors" if teacher is None else "Adam is imitated"
        raise UserError(
            f"estimator.every={every} leaves out coordinates, but {reason}: set it to 1."
        )
    if whole:
        return first_order_per_tensor(inner, objective, teacher, over_problems)
    engine = _Engine(inner, rule, objective, teacher, block, every)

    def init(keys, theta, stage):
        return jax.vmap(lambda key: engine.begin(key, theta, stage))(keys)

    def estimate(theta, state, data, stage):
        return over_problems(lambda s: engine.estimate(theta, s, data, stage), state)

    return base.MetaGradient(init, estimate)


class _Engine(NamedTuple):
    """The estimator for one problem."""

    inner: Inner
    rule: base.Rule
    objective: Objective
    teacher: Teacher | None
    block: int | None
    every: int

    def begin(self, key, theta, stage) -> FirstOrderState:
        state, moments = first(self.inner, key, theta, stage), ()
        if self.teacher is not None:
            dtype = coordinates.dtype_of(theta)
            moments = features.zero_moments(1, base.count(state.params), dtype)
        return FirstOrderState(state, moments)

    def estimate(self, theta, state: FirstOrderState, data, stage):
        """(the meta-gradient of the next window, the state after it, metrics)."""
        run = renew(self.inner, state.inner, theta, stage)
        moments = state.teacher
        if self.teacher is not None:
            moments = jax.tree.map(lambda x: jnp.where(run.step == 0, 0, x), moments)
        after, seen, metrics = self.forward(theta, run, data)
        if self.every > 1:
            key = jax.random.fold_in(jax.random.fold_in(run.key, EVERY), run.step)
            offset = jax.random.randint(key, (), 0, self.every)
            gradient = self.thinned(theta, run, seen, offset)
        else:
            gradient, moments = self.backward(theta, run, seen, moments, stage.imitation)
        return gradient, FirstOrderState(after, moments), metrics

    def forward(self, theta, state: base.InnerState, data):
        """K steps: (the state after them, what the backward pass needs, metrics)."""
        objective, family = self.objective, self.inner.family
        meta_loss = objective.at(state.step, state.num_steps, self.inner.length)
        state, out = jax.lax.scan(
            lambda state, _: self.step(theta, state, data), state, None, self.inner.length
        )
        losses, g, p, values, held_out, whole = out
        batch = batch_at(family, state, data, TRAIN)
        last, pull = jax.value_and_grad(family.loss)(state.params, state.problem, batch)
        following = jnp.concatenate([losses[1:], last[None]])
        weights, held_out_weights = meta_loss.slopes(following, values)
        seen = Seen(
            gradient=g,
            params=p,
            directions=whole.directions,
            held_out=held_out,
            last=coordinates.flatten(pull, coordinates.dtype_of(theta)),
            weights=weights,
            held_out_weights=held_out_weights,
            tensors=whole.tensors,
        )
        value = meta_loss.value(following, values)
        return state, seen, objective.metrics(value, following, values)

    def step(self, theta, state: base.InnerState, data):
        """A training step: (the state after it, what is kept of it)."""
        family, dtype = self.inner.family, coordinates.dtype_of(theta)
        gradient_of = jax.value_and_grad(family.loss)
        loss, gradient = gradient_of(state.params, state.problem, batch_at(family, state, data))
        g, p = (coordinates.flatten(tree, dtype) for tree in (gradient, state.params))
        shapes = coordinates.shapes_of(state.params)
        updates, opt_state, seen = coordinates.advance(
            self.rule, theta, g, p, state.opt_state, state.known_horizon, shapes, self.block
        )
        change = coordinates.unflatten(updates, state.params)
        params = optax.apply_updates(state.params, change)
        state = state._replace(params=params, opt_state=opt_state, step=state.step + 1)
        value, pull = (), ()
        if self.objective.reads_validation:
            batch = batch_at(family, state, data, VALIDATION)
            value, pull = gradient_of(params, state.problem, batch)
            pull = coordinates.flatten(pull, dtype)
        return state, (loss, g, p, value, pull, seen)

    def thinned(self, theta, run: base.InnerState, seen: Seen, offset):
        """The window's meta-gradient from coordinates offset, offset + every … alone, times every.

        Zeros fill the last of them up: where nothing pulls, nothing is added.
        """

        def thin(x):
            padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % self.every)])
            rows = padded.reshape(*x.shape[:-1], -1, self.every)
            return jax.lax.dynamic_index_in_dim(rows, offset, -1, keepdims=False)

        state = run.opt_state
        arrays = jax.tree.map(thin, (state.accumulators, state.hidden))
        state = state._replace(accumulators=arrays[0], hidden=arrays[1])
        seen = seen._replace(**{name: jax.tree.map(thin, getattr(seen, name)) for name in OF_EACH})
        gradient, _ = self.backward(theta, run._replace(opt_state=state), seen, (), 0.0)
        return jax.tree.map(lambda x: self.every * x, gradient)

    def backward(self, theta, run: base.InnerState, seen: Seen, moments, imitation):
        """(the window's meta-gradient, the teacher's moments after it), block by block.

        run: the state before the window.
        """
        start = run.opt_state
        size = seen.last.size
        cut = blocks.blocks_of(size, self.block or blocks.width(start.hidden))
        signals, back_to_theta = jax.vjp(lambda t: self.tensor_signals(t, run, seen), theta)
        window = _Window(self, run, imitation / (size * self.inner.length))
        gradient_of = jax.grad(window.loss, has_aux=True)
        state, both = (start.accumulators, start.hidden), (theta, signals)

        def one_block(i, carry):
            total, moments = carry
            arrays = (*cut.cut(state, i), cut.cut(moments, i))
            place = (seen.on(cut, i), cut.fresh(i), cut.start(i))
            gradient, after = gradient_of(both, arrays, *place)
            total = jax.tree.map(jnp.add, total, gradient)
            return total, cut.put(moments, after, i)

        if cut.count == 1:
            total, moments = gradient_of(both, (*state, moments), seen, True, None)
        else:
            zeros = jax.tree.map(jnp.zeros_like, both)
            total, moments = jax.lax.fori_loop(0, cut.count, one_block, (zeros, moments))
        direct, by_signals = total
        (indirect,) = back_to_theta(by_signals)
        return jax.tree.map(jnp.add, direct, indirect), moments

    def tensor_signals(self, theta, run: base.InnerState, seen: Seen):
        """What the network for whole tensors says at each step: [K, O, G], or ()."""
        whole = self.rule.tensors
        if whole is None:
            return ()

        def step(hidden, xs):
            seen, step = xs
            context = self.rule.context(step, run.known_horizon).astype(seen.dtype)
            signals, hidden = whole.propose(theta, seen, context, hidden)
            return hidden, signals

        steps = run.opt_state.step + jnp.arange(self.inner.length)
        return jax.lax.scan(step, run.opt_state.tensors[1], (seen.tensors, steps))[1]


class _Window(NamedTuple):
    """The window again, for a block of coordinates at a time, as a function of theta.

    run: the state before it. imitation: weight of a coordinate's squared distance from the teacher.
    """

    engine: _Engine
    run: base.InnerState
    imitation: jax.Array

    def loss(self, both, state, seen: Seen, fresh, first):
        """(a number with the gradient of the block's part of the meta-loss, the teacher's moments).

        both:  (theta, the signals of the tensors), which it is differentiated by.
        state: (accumulators, hidden, the teacher's moments) of the block before the window.
        fresh: which of its coordinates no other block has. first: the number of the first.
        """
        theta, signals = both
        length = self.engine.inner.length

        def step(carry, xs):
            return self.step(theta, fresh, first, carry, xs)

        def scan(carry, xs, length):
            if length > 2 * SEGMENT:
                return in_segments(scan, carry, xs, length, SEGMENT)
            return jax.lax.scan(step, carry, xs, length)

        pulls = jnp.where(fresh, seen.pulls(), 0)
        steps = self.run.opt_state.step + jnp.arange(length)
        xs = (seen.gradient, seen.params, seen.directions, pulls, signals, steps)
        (*_, moments, _), out = scan((*state, jnp.zeros_like(seen.last)), xs, length)
        return jnp.sum(out), moments

    def step(self, theta, fresh, first, carry, xs):
        rule, teacher = self.engine.rule, self.engine.teacher
        accumulators, hidden, moments, moved = carry
        g, p, directions, pull, signals, step = xs
        rows, accumulators = rule.observe(g, accumulators, p, step)
        shapes = coordinates.shapes_of(self.run.params)
        rows = coordinates.below(rows, directions, signals, shapes, first)
        context = rule.context(step, self.run.known_horizon).astype(g.dtype)
        updates, hidden = rule.propose(theta, rows, context, hidden)
        # Σₜ ⟨λₜ, uₜ⟩ = Σₛ ⟨pullₛ, Σ_{t≤s} uₜ⟩: the sums λ come out of the backward pass.
        moved = moved + updates
        out = jnp.vdot(pull, moved)
        if teacher is not None:
            taught, moments = _teach(teacher, g, moments, step)
            off = jnp.where(fresh, updates - taught, 0) / teacher.learning_rate
            out += self.imitation * jnp.vdot(off, off)
        return (accumulators, hidden, moments, moved), out


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
    if blocks.platform() == "cpu":
        return jax.lax.map(function, states)
    return jax.vmap(function)(states)


def _teach(teacher, gradient, moments, step):
    """Adam's update [n] from the same gradient, and its moments."""
    state = optax.ScaleByAdamState(step, moments.mu[0], moments.nu)
    direction, state = teacher.adam.update(gradient, state)
    moments = features.Moments(state.mu[None], state.nu)
    return -teacher.learning_rate * direction, moments
