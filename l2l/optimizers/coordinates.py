"""All coordinates of a pytree, in blocks: the one place where a `Rule` meets arrays.

The parameters of an optimizee are laid end to end and cut into blocks [num_blocks, B]; a block goes
through the statistics, the features and the network while it is in the cache, so that memory does
not grow with the network's width, and the program does not grow with the number of tensors.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2l import base

# Columns in a block. On a CPU a block and its LSTM gates should stay in the second-level cache;
# on an accelerator a block must fill the chip.
CPU_BLOCK = 512
ACCELERATOR_BLOCK = 1 << 20
# Vector registers hold 16 float32: a small network is padded to this, not to a whole block.
LANES = 16


class LearnedState(NamedTuple):
    """The optax state of a bound rule: the step, and statistics and hidden in blocks
    [num_blocks, ..., B]."""

    step: jax.Array
    statistics: base.PyTree
    hidden: base.PyTree


def block_shape(size: int, block: int | None = None) -> tuple[int, int]:
    """(num_blocks, B) for `size` coordinates; the last block may be padded."""
    if block is None:
        block = CPU_BLOCK if jax.default_backend() == "cpu" else ACCELERATOR_BLOCK
    if not size:
        return 0, LANES
    # The coordinates are spread evenly, so that the last block is not mostly padding.
    num_blocks = math.ceil(size / block)
    return num_blocks, LANES * math.ceil(size / num_blocks / LANES)


def cut(flat: jax.Array, block: int | None = None) -> jax.Array:
    """[..., P] to [num_blocks, ..., B], padded with zeros."""
    size = flat.shape[-1]
    num_blocks, width = block_shape(size, block)
    padding = [(0, 0)] * (flat.ndim - 1) + [(0, num_blocks * width - size)]
    flat = jnp.pad(flat, padding)
    return jnp.moveaxis(flat.reshape(*flat.shape[:-1], num_blocks, width), -2, 0)


def flatten(tree: base.PyTree, dtype) -> jax.Array:
    """The leaves of a pytree, end to end: [P]."""
    leaves = [jnp.ravel(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves) if leaves else jnp.zeros((0,), dtype)


def unflatten(flat: jax.Array, like: base.PyTree) -> base.PyTree:
    """The inverse of `flatten`, with the shapes and dtypes of `like`; padding at the end is cut."""
    leaves, treedef = jax.tree.flatten(like)
    out, start = [], 0
    for leaf in leaves:
        out.append(flat[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(treedef, out)


def start(
    rule: base.Rule, theta, params, block: int | None = None, state_dtype=None
) -> LearnedState:
    """The state before the first step; hidden is kept in `state_dtype`, or that of theta."""
    dtype = dtype_of(theta)
    statistics = jax.tree.map(lambda x: cut(x, block), rule.statistics(params, dtype))
    num_blocks, width = block_shape(base.count(params), block)
    hidden = jax.tree.map(
        lambda x: jnp.broadcast_to(x, (num_blocks, *x.shape)).astype(state_dtype or x.dtype),
        rule.hidden(theta, width),
    )
    return LearnedState(jnp.zeros((), jnp.int32), statistics, hidden)


def advance(
    rule: base.Rule,
    theta,
    gradient: jax.Array,
    params: jax.Array,
    state: LearnedState,
    num_steps: jax.Array,
) -> tuple[jax.Array, LearnedState]:
    """One step of a rule for gradient and params [num_blocks, B]: (updates, state)."""
    context = rule.context(state.step, num_steps).astype(gradient.dtype)
    blocks = (gradient, params, state.statistics, state.hidden)
    updates, statistics, hidden = _through(rule, theta, context, state.step, blocks)
    return updates, LearnedState(state.step + 1, statistics, hidden)


def _one_block(rule, theta, context, step, block):
    """(gradient [B], params [B], statistics, hidden) to (updates [B], statistics, hidden)."""
    gradient, params, statistics, kept = block
    rows, statistics = rule.observe(gradient, statistics, params, step)
    hidden = jax.tree.map(lambda x: x.astype(gradient.dtype), kept)
    updates, hidden = rule.propose(theta, rows, context, hidden)
    return updates, statistics, jax.tree.map(lambda x, y: x.astype(y.dtype), hidden, kept)


def _scanned(rule, theta, context, step, blocks):
    """All blocks, results in new arrays: what automatic differentiation goes through."""
    if blocks[0].shape[0] == 1:  # A loop of one would keep the compiler from fusing around it.
        out = _one_block(rule, theta, context, step, jax.tree.map(lambda x: x[0], blocks))
        return jax.tree.map(lambda x: x[None], out)
    return jax.lax.scan(
        lambda _, block: (None, _one_block(rule, theta, context, step, block)), None, blocks
    )[1]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _through(rule, theta, context, step, blocks):
    """All blocks, each result written over what it was made from: no second copy of the state.

    Twice as fast as `_scanned` on a large network, but its transpose would touch the whole state
    once a block, so derivatives go through `_scanned`.
    """
    gradient, params, statistics, hidden = blocks
    if gradient.shape[0] == 1:
        return _scanned(rule, theta, context, step, blocks)

    def body(i, carry):
        def at(tree):
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), tree)

        def go(block):
            written, params, statistics, bits = block
            block = (written, params, statistics, _from_bits(bits, hidden))
            out, after, kept = _one_block(rule, theta, context, step, block)
            return out, after, _to_bits(kept)

        written, *state = at(carry)
        # The condition always holds. It keeps the compiler from merging the reads of the block
        # with the arithmetic: it could then not see that they precede the writes, and would copy
        # the whole state in every round of the loop.
        out = jax.lax.cond(
            step >= 0,
            go,
            lambda block: (block[0], block[2], block[3]),
            (written, at(params), *state),
        )
        return jax.tree.map(
            lambda whole, part: jax.lax.dynamic_update_index_in_dim(whole, part, i, 0), carry, out
        )

    start = (gradient, statistics, _to_bits(hidden))
    updates, statistics, bits = jax.lax.fori_loop(0, gradient.shape[0], body, start)
    return updates, statistics, _from_bits(bits, hidden)


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
def _through_jvp(rule, primals, tangents):
    return jax.jvp(partial(_scanned, rule), primals, tangents)


def dtype_of(theta) -> jnp.dtype:
    """The floating dtype a rule computes in: that of its theta."""
    leaves = jax.tree.leaves(theta)
    return leaves[0].dtype if leaves else jnp.dtype(jnp.float32)


def bind(
    rule: base.Rule, theta, block: int | None = None, state_dtype=None
) -> optax.GradientTransformationExtraArgs:
    """The rule with its theta, as an optax transformation.

    `update` takes `params` (a learned optimizer looks at them) and, optionally, `num_steps`: the
    horizon of the run. Other extra arguments are left to other links of the chain.

    `state_dtype` (jnp.bfloat16) is that in which the recurrent state is kept between steps: of the
    default optimizer, 48 bytes a parameter in place of 80. Arithmetic and statistics stay in
    theta's: bfloat16 has 8 bits, and an average with decay 0.999 that is rounded to them after
    every step stops moving. Measured on digits MLPs after 2,000 steps, the final loss is the same
    to 3 % with the recurrent state in bfloat16, and 1.8 times as high with the moments of Adam.
    """
    dtype = dtype_of(theta)

    def init(params):
        check_leaves(params)
        return start(rule, theta, params, block, state_dtype)

    def update(updates, state, params=None, *, num_steps=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError(
                "The learned optimizer looks at the parameters, and `params` is None: call "
                "update(gradients, state, params)."
            )
        if base.count(updates) == 0:
            return updates, state
        gradient = cut(flatten(updates, dtype), block)
        position = cut(flatten(params, dtype), block)
        out, state = advance(rule, theta, gradient, position, state, base.as_steps(num_steps))
        return unflatten(out.reshape(-1), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def check_leaves(params) -> None:
    """Raises TypeError for leaves that have no real gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"Parameter {jax.tree_util.keystr(path)} is {jnp.result_type(leaf)}: learned "
                "optimizers update real floating-point numbers. Leave it out with optax.masked."
            )


def optimizer(init, rule: base.Rule) -> base.LearnedOptimizer:
    """A `LearnedOptimizer` from a rule and the initialiser of its theta."""
    return base.LearnedOptimizer(init, lambda theta: bind(rule, theta), rule)
