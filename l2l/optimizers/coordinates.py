"""All coordinates of a pytree, in blocks: the one place where a `Rule` meets arrays.

The parameters of an optimizee are laid end to end, [P], and a block of them at a time goes through
the accumulators, the features and the network while it is in the cache: memory does not grow with
the network's width, nor the program with the number of tensors. State is kept flat, [..., P], so
that it is the same on every machine, whatever the blocks there.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.core import base
from l2l.optimizers import binding, blocks, halves, leaves


class LearnedState(NamedTuple):
    """The optax state of a bound rule: the step, and accumulators and hidden, leaves [..., P].

    tensors: (accumulators, hidden), leaves [..., G], of a rule with `TensorSignals`, else ().
    matrices: the accumulators of its preconditioner, or ().
    """

    step: jax.Array
    accumulators: base.PyTree
    hidden: base.PyTree
    tensors: base.PyTree = ()
    matrices: base.PyTree = ()


class Seen(NamedTuple):
    """What a rule saw in a step that takes more than a block of coordinates to see.

    directions: [E, P], or () without a preconditioner. tensors: [S, G], or ().
    """

    directions: base.PyTree
    tensors: base.PyTree


def flatten(tree: base.PyTree, dtype) -> jax.Array:
    """The leaves of a pytree, end to end: [P]."""
    leaves = [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros((0,), dtype)


def unflatten(flat: jax.Array, like: base.PyTree) -> base.PyTree:
    """The inverse of `flatten`, with the shapes and dtypes of `like`."""
    leaves, treedef = jax.tree.flatten(like)
    out, start = [], 0
    for leaf in leaves:
        out.append(flat[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(treedef, out)


def shapes_of(params) -> tuple[tuple[int, ...], ...]:
    """The shapes of the tensors of a pytree, in the order in which `flatten` lays them."""
    return tuple(tuple(jnp.shape(leaf)) for leaf in jax.tree.leaves(params))


def start(rule: base.Rule, theta, params, state_dtype=None) -> LearnedState:
    """The state before the first step; hidden is kept in `state_dtype`, or that of theta."""
    hidden, tensors, matrices = rule.hidden(theta, base.count(params)), (), ()
    if rule.matrices is not None and not jax.tree.leaves(params):
        # One leaf, since what a preconditioner keeps depends on which tensors there are: so the
        # state of no tensors is a prefix of any other, which `optax.tree.map_params` asks for.
        matrices = jnp.zeros((0,), dtype_of(theta))
    elif rule.matrices is not None:
        matrices = rule.matrices.accumulators(params, dtype_of(theta))
    if rule.tensors is not None:
        own = rule.tensors.hidden(theta, len(shapes_of(params)))
        averages = rule.tensors.accumulators(params, dtype_of(theta))
        tensors = (averages, jax.tree.map(jnp.array, own))
    return LearnedState(
        step=jnp.zeros((), jnp.int32),
        accumulators=rule.accumulators(params, dtype_of(theta)),
        # Copies: leaves that share a buffer could not be donated.
        hidden=jax.tree.map(lambda x: jnp.array(x, state_dtype or x.dtype), hidden),
        tensors=tensors,
        matrices=matrices,
    )


def look(rule: base.Rule, gradient, params, state: LearnedState, shapes):
    """What a rule sees of whole tensors before a step, for gradient and params [P]: (`Seen`, the
    accumulators after it, of tensors and of matrices; () for what it does not look at)."""
    directions, tensors, told, present, matrices = (), (), [], (), ()
    if rule.matrices is not None:
        directions, own, matrices = rule.matrices.observe(
            gradient, state.accumulators, state.matrices, state.step, shapes
        )
        told = [own]
    if rule.tensors is not None:
        tensors, present = rule.tensors.observe(
            *(gradient, state.accumulators, params, state.tensors[0], state.step),
            tuple(map(math.prod, shapes)),
        )
        tensors = jnp.concatenate([tensors, *told])
    return Seen(directions, tensors), present, matrices


def below(rows: jax.Array, directions, signals, shapes, start=None) -> jax.Array:
    """Features [F, n] with the directions [E, n] and the signals of each coordinate's tensor below
    them, [F + E + O, n].

    Args:
      directions, signals: [E, n] and [O, G], or () for none.
      shapes: of the G tensors.
      start: the first of the n coordinates; None if they are all.
    """
    if not isinstance(directions, tuple):
        rows = jnp.concatenate([rows, directions])
    if isinstance(signals, tuple):
        return rows
    sizes = tuple(map(math.prod, shapes))
    if start is None:
        parts = [
            jnp.broadcast_to(signals[:, i : i + 1], (len(signals), n)) for i, n in enumerate(sizes)
        ]
        return jnp.concatenate([rows, jnp.concatenate(parts, 1)])
    # A product with zeros and ones, since the way back through an index is a slow sum on a CPU.
    ends = np.cumsum(sizes)[:, None]
    position = (start + jnp.arange(rows.shape[1]))[None]
    own = (position < ends) & (position >= ends - np.asarray(sizes)[:, None])
    return jnp.concatenate([rows, signals @ own.astype(signals.dtype)])


def advance(
    rule: base.Rule,
    theta,
    gradient: jax.Array,
    params: jax.Array,
    state: LearnedState,
    num_steps: jax.Array,
    shapes: tuple[tuple[int, ...], ...],
    block: int | None = None,
) -> tuple[jax.Array, LearnedState, Seen]:
    """One step of a rule for gradient and params [P] of tensors of the given shapes: (updates [P],
    state, what was seen of whole tensors)."""
    context = rule.context(state.step, num_steps).astype(gradient.dtype)
    seen, present, matrices = look(rule, gradient, params, state, shapes)
    signals, tensors = (), ()
    if rule.tensors is not None:
        signals, hidden = rule.tensors.propose(theta, seen.tensors, context, state.tensors[1])
        tensors = (present, hidden)
    arrays = (gradient, params, seen.directions, state.accumulators, state.hidden)
    updates, accumulators, hidden = _through(
        rule, shapes, block, theta, context, state.step, signals, arrays
    )
    return updates, LearnedState(state.step + 1, accumulators, hidden, tensors, matrices), seen


def _whole(rule, shapes, theta, context, step, signals, arrays, start=None):
    """(gradient [n], params [n], directions, accumulators, hidden) to (updates [n], accumulators,
    hidden)."""
    gradient, params, directions, accumulators, kept = arrays
    rows, accumulators = rule.observe(gradient, accumulators, params, step)
    rows = below(rows, directions, signals, shapes, start)
    hidden = jax.tree.map(lambda x: x.astype(gradient.dtype), kept)
    updates, hidden = rule.propose(theta, rows, context, hidden)
    return updates, accumulators, jax.tree.map(lambda x, y: x.astype(y.dtype), hidden, kept)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _through(rule, shapes, block, theta, context, step, signals, arrays):
    """`_whole`, one block at a time, each result written over what it was made from: no second copy
    of the state.

    The transpose of such a loop would touch the whole state once a block: derivatives go through
    `_whole`.
    """
    gradient, params, directions, accumulators, hidden = arrays
    cut = blocks.blocks_of(gradient.size, block or blocks.width())
    if cut.count == 1:
        return _whole(rule, shapes, theta, context, step, signals, arrays)

    def body(i, carry):
        def go(block):
            written, read, accumulators, bits = block
            block = (written, *read, accumulators, _from_bits(bits, hidden))
            first = cut.start(i)
            out, after, kept = _whole(rule, shapes, theta, context, step, signals, block, first)
            return out, after, _to_bits(kept)

        written, *state = cut.cut(carry, i)
        # The condition always holds. It keeps the compiler from merging the reads of the block
        # with the arithmetic: it could then not see that they precede the writes, and would copy
        # the whole state in every round of the loop.
        out = jax.lax.cond(
            step >= 0,
            go,
            lambda block: (block[0], block[2], block[3]),
            (written, cut.cut((params, directions), i), *state),
        )
        return cut.put(carry, out, i)

    start = (gradient, accumulators, _to_bits(hidden))
    updates, accumulators, bits = jax.lax.fori_loop(0, cut.count, body, start)
    return updates, accumulators, _from_bits(bits, hidden)


def _to_bits(tree):
    """bfloat16 as integers: a CPU has no such floats, and the compiler would turn the whole state
    into float32 and back around every write of a block."""
    return jax.tree.map(
        lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x,
        tree,
    )


def _from_bits(tree, like):
    return jax.tree.map(
        lambda x, y: jax.lax.bitcast_convert_type(x, y.dtype) if x.dtype != y.dtype else x,
        tree,
        like,
    )


@_through.defjvp
def _through_jvp(rule, shapes, block, primals, tangents):
    return jax.jvp(partial(_whole, rule, shapes), primals, tangents)


def dtype_of(theta) -> jnp.dtype:
    """The floating dtype a rule computes in: that of its theta."""
    leaves = jax.tree.leaves(theta)
    return leaves[0].dtype if leaves else jnp.dtype(jnp.float32)


def bind(
    rule: base.Rule, theta, block: int | None = None, state_dtype=None, wide: bool = False
) -> optax.GradientTransformationExtraArgs:
    """The rule with its theta, as an optax transformation; `binding.transformation` has the
    contract.

    Args:
      state_dtype: the dtype of the recurrent state between steps. With jnp.bfloat16 the default
        optimizer takes 48 bytes a parameter instead of 80. Arithmetic and accumulators
        stay in theta's: bfloat16 has 8 bits, and an average with decay 0.999 that is rounded to
        them after every step stops moving. Measured on digits MLPs after 2,000 steps, the final
        loss is the same to 3 % with the recurrent state in bfloat16, and 1.8 times as high with the
        moments of Adam.
      wide: compute, and keep state, in the widest of the dtypes of theta and of params: in float64
        for float64 parameters. By default all is in theta's.

    Raises:
      UserError: `state_dtype` is not a floating-point type.
    """
    begin = _Begin(rule, leaves.state_type(state_dtype), wide)
    return binding.transformation(begin, _Step(rule, block, wide), theta)


class _Begin(NamedTuple):
    """(theta, params) -> the state before the first step."""

    rule: base.Rule
    state_dtype: Any
    wide: bool

    def __call__(self, theta, params):
        theta = widened(theta, params) if self.wide else theta
        return start(self.rule, theta, params, self.state_dtype)


class _Step(NamedTuple):
    """(theta, gradient, state, params, num_steps) -> (updates, state), for pytrees."""

    rule: base.Rule
    block: int | None
    wide: bool

    def __call__(self, theta, gradient, state, params, num_steps):
        theta = widened(theta, params) if self.wide else theta
        g, p = (flatten(tree, dtype_of(theta)) for tree in (gradient, params))
        shapes = shapes_of(params)
        out, state, _ = advance(self.rule, theta, g, p, state, num_steps, shapes, self.block)
        return unflatten(out, params), state


def widened(theta: base.PyTree, params: base.PyTree) -> base.PyTree:
    """Theta in the widest of its own dtype and those of params."""
    dtype = jnp.result_type(dtype_of(theta), *(jnp.result_type(p) for p in jax.tree.leaves(params)))
    return jax.tree.map(lambda x: x.astype(dtype), theta)


def optimizer(init, rule: base.Rule) -> base.LearnedOptimizer:
    """A `LearnedOptimizer` from a rule and the initialiser of its theta.

    Raises:
      UserError: the rule gives other numbers for half of the coordinates (`halves.check`).
    """
    halves.check(init, rule)
    return base.LearnedOptimizer(init, lambda theta: bind(rule, theta), rule)
