"""How the tensors of a pytree become a few batches of matrices, and back.

Whatever works on matrices (their bases, their products) works on batches of blocks, [k, r, c]:
long sides are cut into equal blocks, tensors of one shape go together, and where there are many
shapes the nearest are padded to a common one. So what there is to compile grows with neither the
number of tensors nor that of shapes. All of it is decided from shapes alone, before anything runs.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Batches for one pytree: beyond it, the nearest shapes share one.
LARGEST_NUMBER_OF_BATCHES = 6
# Columns of blocks that are put together by adding them up; of more, each is moved.
MOST_COLUMNS = 8


class Member(NamedTuple):
    """A tensor in a batch. leaf: its number among the leaves. shape: its own. matrix: (m, n), what
    it is taken for. grid: how many blocks of rows and of columns it is cut into."""

    leaf: int
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    grid: tuple[int, int]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1]


class Batch(NamedTuple):
    """Blocks [k, *block] of the members, one member after another. whitened: which of the two sides
    of a block have a basis."""

    block: tuple[int, int]
    whitened: tuple[bool, bool]
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return sum(member.blocks for member in self.members)

    @property
    def owners(self) -> tuple[int, ...]:
        """The leaf that each of the k blocks belongs to."""
        return tuple(m.leaf for m in self.members for _ in range(m.blocks))

    def gather(self, leaves) -> jax.Array:
        """The members among the leaves of a pytree as blocks [k, r, c], padded with zeros."""
        parts = [self._cut(leaves[member.leaf], member) for member in self.members]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def scatter(self, blocks: jax.Array) -> dict[int, jax.Array]:
        """The inverse of `gather`: {number of the leaf: its array}."""
        out, start = {}, 0
        for member in self.members:
            out[member.leaf] = self._join(blocks[start : start + member.blocks], member)
            start += member.blocks
        return out

    def per_member(self, sums: jax.Array) -> jax.Array:
        """Sums over blocks [..., k], added up for each member: [..., members]."""
        counts = {member.blocks for member in self.members}
        if len(counts) == 1:
            return jnp.sum(sums.reshape(*sums.shape[:-1], -1, counts.pop()), -1)
        ends = np.cumsum([member.blocks for member in self.members])
        parts = jnp.split(sums, ends[:-1], -1)
        return jnp.stack([jnp.sum(part, -1) for part in parts], -1)

    def _cut(self, array, member):
        (m, n), (rows, columns), (r, c) = member.matrix, member.grid, self.block
        array = array.reshape(m, n)
        if (rows * r, columns * c) != (m, n):
            array = jnp.pad(array, ((0, rows * r - m), (0, columns * c - n)))
        if member.blocks == 1:
            return array[None]
        return array.reshape(rows, r, columns, c).swapaxes(1, 2).reshape(-1, r, c)

    def _join(self, blocks, member):
        (m, n), (rows, columns), (r, c) = member.matrix, member.grid, self.block
        if 1 < columns <= MOST_COLUMNS and jax.device_count() == 1:
            # The same as below, in a loop over rows that a CPU does three times as fast; but
            # columns that lie on several devices would be gathered.
            parts = blocks.reshape(rows, columns, r, c)
            zero = jnp.zeros((), blocks.dtype)
            padded = [
                jax.lax.pad(
                    parts[:, j].reshape(rows * r, c),
                    zero,
                    ((0, m - rows * r, 0), (j * c, n - (j + 1) * c, 0)),
                )
                for j in range(columns)
            ]
            return functools.reduce(jnp.add, padded).reshape(member.shape)
        if columns > 1:
            blocks = blocks.reshape(rows, columns, r, c).swapaxes(1, 2)
        return blocks.reshape(rows * r, columns * c)[:m, :n].reshape(member.shape)


class Plan(NamedTuple):
    """batches: of everything that is taken for a matrix. vectors: the numbers of the other leaves.
    count: of all leaves."""

    batches: tuple[Batch, ...]
    vectors: tuple[int, ...]
    count: int


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix a tensor is taken for: all axes but the last, by the last (kernels of haiku and
    flax have their outputs there). Scalars and vectors are one row."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, math.prod(shape))


def plan_of(params, block_size: int, longest: int) -> Plan:
    """The plan for a pytree of arrays, or of anything that has shapes; see `plan`."""
    return plan(tuple(tuple(jnp.shape(x)) for x in jax.tree.leaves(params)), block_size, longest)


@functools.lru_cache(maxsize=256)
def plan(shapes: tuple[tuple[int, ...], ...], block_size: int, longest: int) -> Plan:
    """How tensors of these shapes are cut and put together.

    Args:
      block_size: sides longer than this are cut into the fewest equal blocks that are not.
      longest: a side longer than this gets no basis (the rows of an embedding): its blocks
        are then as long as it is.

    A matrix with a side of 1, and every scalar, vector and empty tensor, is left as it is.
    """
    found: dict[tuple, list[Member]] = {}
    vectors = []
    for leaf, shape in enumerate(shapes):
        matrix = matrix_of(shape)
        whitened = tuple(side <= longest for side in matrix)
        if min(matrix) <= 1 or not any(whitened):
            vectors.append(leaf)
            continue
        grid: Any = tuple(
            -(-d // block_size) if w else 1 for d, w in zip(matrix, whitened, strict=True)
        )
        block = tuple(-(-d // g) for d, g in zip(matrix, grid, strict=True))
        found.setdefault((block, whitened), []).append(Member(leaf, shape, matrix, grid))
    batches = tuple(
        Batch(block, whitened, tuple(members))
        for (block, whitened), members in _merged(found).items()
    )
    return Plan(batches, tuple(vectors), len(shapes))


def _merged(found: dict[tuple, list[Member]]) -> dict[tuple, list[Member]]:
    """The same with few keys: sides are rounded up to ever coarser steps of their own size."""
    steps = 8
    while len(found) > LARGEST_NUMBER_OF_BATCHES and steps:
        rounded: dict[tuple, list[Member]] = {}
        for (block, whitened), members in found.items():
            near = tuple(_round_up(d, steps) for d in block)
            rounded.setdefault((near, whitened), []).extend(members)
        found, steps = rounded, steps // 2
    while len(found) > LARGEST_NUMBER_OF_BATCHES:
        # Still too many: the two whose common shape wastes least become one.
        keys = [key for key in found if sum(key[1] == other[1] for other in found) > 1]
        if not keys:
            break
        one, two = min(
            ((a, b) for a in keys for b in keys if a < b and a[1] == b[1]),
            key=lambda pair: _waste(found, *pair),
        )
        block = tuple(map(max, one[0], two[0]))
        both = found.pop(one) + found.pop(two)
        found.setdefault((block, one[1]), []).extend(both)
    return found


def _round_up(d: int, steps: int) -> int:
    """d to the next multiple of (the power of two not above it) / steps."""
    unit = max((1 << (d.bit_length() - 1)) // steps, 1)
    return -(-d // unit) * unit


def _waste(found, one, two) -> int:
    """Products that padding two keys to one shape adds."""
    block = tuple(map(max, one[0], two[0]))

    def cost(block):
        return math.prod(block) * sum(block)

    return sum(
        (cost(block) - cost(key[0])) * sum(m.blocks for m in found[key]) for key in (one, two)
    )
