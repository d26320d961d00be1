"""How the tensors of a pytree become a few batches of matrices, and back.

Whatever works on matrices (their bases, their products) works on batches of blocks, [k, r, c]:
long sides are cut into equal blocks, tensors of one shape go together, and where there are many
shapes, the nearest are padded to a common one. So the program to compile grows with neither the
number of tensors nor the number of shapes. All of this is decided from shapes alone, before
anything runs.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Batches for one pytree: beyond this number, the nearest shapes share one.
LARGEST_NUMBER_OF_BATCHES = 6
# This many products (of two numbers, in a step) cost as much as the operations of one more batch.
CHEAP = 1_000_000
# Up to this many columns of blocks are joined by adding them up; if there are more, each is moved.
MOST_COLUMNS = 8
# A group of at least this many members is split at places that the compiler does not know.
MANY = 4

Places = tuple[jax.Array, ...]


class Member(NamedTuple):
    """A tensor in a batch. leaf: its number among the leaves. shape: its own. matrix: (m, n), what
    it is treated as. grid: how many blocks of rows and of columns it is cut into."""

    leaf: int
    shape: tuple[int, ...]
    matrix: tuple[int, int]
    grid: tuple[int, int]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def block(self) -> tuple[int, int]:
        """The sides of its blocks, before they are padded to match others in the batch."""
        (m, n), (rows, columns) = self.matrix, self.grid
        return -(-m // rows), -(-n // columns)


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
    def sides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The lengths of the two sides of each of the k blocks, without the padding to match longer
        ones: means over a block are over that many numbers, whatever it shares a batch with."""
        rows, columns = zip(*(m.block for m in self.members for _ in range(m.blocks)), strict=True)
        return rows, columns

    @property
    def owners(self) -> tuple[int, ...]:
        """The leaf that each of the k blocks belongs to."""
        return tuple(m.leaf for m in self.members for _ in range(m.blocks))

    def gather(self, leaves) -> jax.Array:
        """The members among the leaves of a pytree as blocks [k, r, c], padded with zeros."""
        parts = [self._cut(leaves[member.leaf], member) for member in self.members]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def scatter(self, blocks: jax.Array, places: Places = ()) -> dict[int, jax.Array]:
        """The inverse of `gather`: {number of the leaf: its array}."""
        parts = _parts(blocks, [member.blocks for member in self.members], places)
        return {m.leaf: self._join(part, m) for m, part in zip(self.members, parts, strict=True)}

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
            # The same as below, as a loop over rows that is three times as fast on a CPU; but
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


class Stack(NamedTuple):
    """Tensors without a basis, of one shape, side by side: [k, *shape]. leaves: their numbers."""

    leaves: tuple[int, ...]

    @property
    def sides(self) -> tuple[()]:
        """None of them has a basis."""
        return ()

    @property
    def owners(self) -> tuple[int, ...]:
        """The leaf that each of the k belongs to."""
        return self.leaves

    def gather(self, leaves) -> jax.Array:
        """The members among the leaves of a pytree."""
        parts = [leaves[i][None] for i in self.leaves]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

    def scatter(self, stacked: jax.Array, places: Places = ()) -> dict[int, jax.Array]:
        """The inverse of `gather`: {number of the leaf: its array}."""
        parts = _parts(stacked, [1] * len(self.leaves), places)
        return {leaf: part[0] for leaf, part in zip(self.leaves, parts, strict=True)}

    def per_member(self, sums: jax.Array) -> jax.Array:
        """Sums over each of the k, as they are."""
        return sums


def places(plan: "Plan", count: jax.Array) -> Places:
    """0, 1, 2 … as numbers that the compiler does not know; () where there is no use for them.

    XLA on a CPU compiles a kernel for each slice, in some 20 ms, unless two are identical to the
    letter, and slices at known places never are. So these numbers come out of a loop that runs once
    if count >= 0, which always holds. On several devices, slices at unknown places would be
    gathered.
    """
    most = max((len(set(group.owners)) for group in plan.groups), default=0)
    if most < MANY or jax.device_count() > 1:
        return ()

    def turn(carry):
        _, numbers = carry
        return jnp.zeros((), bool), (*numbers[1:], numbers[0])

    numbers = tuple(jnp.asarray((i - 1) % most, jnp.int32) for i in range(most))
    return jax.lax.while_loop(lambda carry: carry[0], turn, (count >= 0, numbers))[1]


def _parts(stacked: jax.Array, sizes: list[int], places: Places) -> list[jax.Array]:
    """Consecutive parts of an array, of these sizes."""
    if places and len(sizes) >= MANY and len(set(sizes)) == 1:
        size = sizes[0]
        return [
            jax.lax.dynamic_slice_in_dim(stacked, size * place, size)
            for place in places[: len(sizes)]
        ]
    ends = np.cumsum(sizes)
    return [stacked[end - size : end] for end, size in zip(ends, sizes, strict=True)]


class Plan(NamedTuple):
    """batches: of everything that is treated as a matrix. stacks: of the other leaves. count: how
    many leaves there are in all."""

    batches: tuple[Batch, ...]
    stacks: tuple[Stack, ...]
    count: int

    @property
    def groups(self) -> tuple[Stack | Batch, ...]:
        """All stacks, and all batches."""
        return (*self.stacks, *self.batches)

    @property
    def vectors(self) -> frozenset[int]:
        """The numbers of the leaves that have no basis."""
        return frozenset(leaf for stack in self.stacks for leaf in stack.leaves)

    def per_leaf(self, sums: list[jax.Array]) -> jax.Array:
        """Sums over each of the k of every group, [..., k], added up for each leaf: [..., count],
        in the order of the leaves."""
        members = [leaf for group in self.groups for leaf in dict.fromkeys(group.owners)]
        parts = [group.per_member(x) for group, x in zip(self.groups, sums, strict=True)]
        return jnp.concatenate(parts, -1)[..., np.argsort(members)]


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix a tensor is treated as: all axes but the last, by the last (kernels of haiku and
    flax have their outputs there). Scalars and vectors are one row."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (1, math.prod(shape))


def plan_of(params, block_size: int, longest: int) -> Plan:
    """The plan for a pytree of arrays, or of anything that has shapes; see `plan`."""
    return plan(tuple(tuple(jnp.shape(x)) for x in jax.tree.leaves(params)), block_size, longest)


@functools.lru_cache(maxsize=256)
def plan(shapes: tuple[tuple[int, ...], ...], block_size: int, longest: int) -> Plan:
    """How tensors of these shapes are cut and put together.

    Args:
      block_size: sides longer than this are cut into the fewest equal blocks that are no longer.
      longest: a side longer than this gets no basis (the rows of an embedding): its blocks
        are then as long as that side.

    A matrix with a side of 1, and every scalar, vector and empty tensor, is left as it is.
    """
    found: dict[tuple, list[Member]] = {}
    vectors: dict[tuple[int, ...], list[int]] = {}
    for leaf, shape in enumerate(shapes):
        matrix = matrix_of(shape)
        whitened = tuple(side <= longest for side in matrix)
        if min(matrix) <= 1 or not any(whitened):
            vectors.setdefault(shape, []).append(leaf)
            continue
        grid: Any = tuple(
            -(-d // block_size) if w else 1 for d, w in zip(matrix, whitened, strict=True)
        )
        member = Member(leaf, shape, matrix, grid)
        found.setdefault((member.block, whitened), []).append(member)
    batches = tuple(
        Batch(block, whitened, tuple(members))
        for (block, whitened), members in _merged(found).items()
    )
    stacks = tuple(Stack(tuple(leaves)) for leaves in vectors.values())
    return Plan(batches, stacks, len(shapes))


def _merged(found: dict[tuple, list[Member]]) -> dict[tuple, list[Member]]:
    """The same with fewer keys. Sides are rounded up to ever coarser fractions of their own size
    until few keys are left. Of these, the two whose common shape wastes least become one, as long
    as that wastes less than a batch costs, or there are too many."""
    steps = 8
    while len(found) > 2 * LARGEST_NUMBER_OF_BATCHES and steps:
        rounded: dict[tuple, list[Member]] = {}
        for (block, whitened), members in found.items():
            near = tuple(_round_up(d, steps) for d in block)
            rounded.setdefault((near, whitened), []).extend(members)
        found, steps = rounded, steps // 2
    while True:
        pairs = [(a, b) for a, b in itertools.combinations(found, 2) if a[1] == b[1]]
        if not pairs:
            return found
        one, two = min(pairs, key=lambda pair: _waste(found, *pair))
        if len(found) <= LARGEST_NUMBER_OF_BATCHES and _waste(found, one, two) > CHEAP:
            return found
        block = tuple(map(max, one[0], two[0]))
        both = found.pop(one) + found.pop(two)
        found.setdefault((block, one[1]), []).extend(both)


def _round_up(d: int, steps: int) -> int:
    """d rounded up to a multiple of (the largest power of two not above it) / steps."""
    unit = max((1 << (d.bit_length() - 1)) // steps, 1)
    return -(-d // unit) * unit


def _waste(found, one, two) -> int:
    """How many products it adds to pad two keys to one shape."""
    block = tuple(map(max, one[0], two[0]))

    def cost(block):
        return math.prod(block) * sum(block)

    return sum(
        (cost(block) - cost(key[0])) * sum(m.blocks for m in found[key]) for key in (one, two)
    )
