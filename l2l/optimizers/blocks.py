"""How many coordinates go through a network at a time, on this machine, and where they are cut."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l.core import base

# Columns in a block on a CPU; an accelerator takes all of them at once, which is what fills the
# chip. The forward step is fastest at 512 (M coordinate-steps a second: 2xLSTM-20 4.8 at 128, 5.1
# at 256, 5.4 at 512; 1xLSTM-8 29.5 at 256, 31.8 at 512). The backward pass through a window stores
# about seven times the recurrent state for each step, and is fastest while the state of one block
# is 8,192 numbers, 32 KB (2xLSTM-20 1.42 at 128, 1.13 at 256, 1.08 at 512; 1xLSTM-8 9.0 at 256, 9.1
# at 512).
FORWARD_BLOCK = 512
STATE_OF_A_BLOCK = 8192
# Vector registers hold 16 float32.
LANES = 16


def platform() -> str:
    """That of the device which JAX computes on: of `jax.default_device` where it is set, which code
    that is given devices does while it traces; else of the default backend."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform


def width(hidden: base.PyTree | None = None) -> int | None:
    """Columns in a block on this `platform`, None for all: of a step forward or, if the recurrent
    state `hidden` [..., P] is given, of the way back through a window."""
    if platform() != "cpu":
        return None
    if hidden is None:
        return FORWARD_BLOCK
    rows = sum(math.prod(x.shape[:-1]) for x in jax.tree.leaves(hidden))
    fitting = 1 << (STATE_OF_A_BLOCK // max(rows, 1)).bit_length() - 1
    return min(max(fitting, 128), FORWARD_BLOCK)


class Blocks(NamedTuple):
    """How `size` coordinates are cut: `count` blocks of `width`, the last of them moved forward so
    that it ends with the coordinates. Those it shares with the block before are not `fresh`."""

    size: int
    count: int
    width: int

    def start(self, i):
        return jnp.minimum(i * self.width, self.size - self.width)

    def fresh(self, i):
        return self.start(i) + jnp.arange(self.width) >= i * self.width

    @property
    def overlap(self) -> bool:
        return self.count * self.width > self.size

    def cut(self, tree, i):
        """Block i of arrays [..., P]: [..., width]."""
        at = partial(jax.lax.dynamic_slice_in_dim, start_index=self.start(i), axis=-1)
        return jax.tree.map(lambda x: at(x, slice_size=self.width), tree)

    def put(self, tree, parts, i):
        """Writes block i of arrays [..., P]; coordinates that are not fresh stay as they are."""

        def write(whole, new):
            if self.overlap:
                new = jnp.where(self.fresh(i), new, self.cut(whole, i))
            return jax.lax.dynamic_update_slice_in_dim(whole, new, self.start(i), -1)

        return jax.tree.map(write, tree, parts)


def blocks_of(size: int, block: int | None) -> Blocks:
    """`size` coordinates in blocks of at most `block`; None for one block."""
    if block is None or size <= max(block, LANES):
        return Blocks(size, 1, size)
    # Spread evenly, so that the last block is not mostly the one before.
    count = math.ceil(size / block)
    return Blocks(size, count, LANES * math.ceil(size / count / LANES))
