"""Parameters that are split over devices, where they meet the flat vectors of a rule.

A rule's vectors run over all parameters, however each lies on a mesh. What that asks for depends
on the axes of the mesh, of which JAX has three kinds:

- automatic: the compiler decides what lies where, and is asked for updates that lie as their
  parameters do. Since JAX 0.11, which has no `shard_alike`, it may split the update of a replicated
  parameter over devices all the same: the numbers are equal, and a sum with the parameter is
  wherever the compiler finds it best (`out_shardings` of `jax.jit` says otherwise).
- explicit: a type says how its value is split, and splits that differ cannot be laid end to end.
  All are gathered first, and the updates split again.
- manual, inside `jax.shard_map`: a type says over which axes its value varies. A vector varies
  where any part of it does; the update of a tensor that does not is the mean of what its devices
  found, so that it stays one tensor (coordinatewise rules found the same on all of them).
"""

import contextlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from l2l.core import base

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # Since JAX 0.11.
    shard_alike = None


def together(
    tree: base.PyTree, beside: base.PyTree = (), axes: frozenset[str] | None = None
) -> base.PyTree:
    """The arrays of a pytree, so that one may be laid beside another, and beside those of a
    second tree once they are treated likewise. axes: the manual ones to vary over, at least; None
    for those over which any of these arrays does."""
    leaves, treedef = jax.tree.flatten(tree)
    around = [*leaves, *jax.tree.leaves(beside)]
    axes = frozenset().union(*map(_varying, around)) if axes is None else axes
    mesh = _first_explicit(around)
    if not axes and mesh is None:
        return tree

    def one(leaf):
        leaf = _varied(leaf, axes)
        if mesh is not None:
            leaf = jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec()))
        return leaf

    return jax.tree.unflatten(treedef, [one(leaf) for leaf in leaves])


def alike(updates: base.PyTree, params: base.PyTree) -> base.PyTree:
    """The updates, lying on the devices as their parameters do."""
    return jax.tree.map(_alike, updates, params)


def _varied(x, axes):
    """x, varying over these manual axes at least."""
    missing = tuple(sorted(axes - _varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def _shared(x, param):
    extra = tuple(sorted(_varying(x) - _varying(param)))
    return jax.lax.pmean(x, extra) if extra else x


def _alike(update, param):
    update = _shared(update, param)
    if _explicit(param) is not None:
        return jax.sharding.reshard(update, jax.typeof(param).sharding)
    if jax.sharding.get_abstract_mesh().manual_axes:
        return update
    return _lying_as(update, param)


def apart(params: base.PyTree) -> frozenset[str]:
    """The manual axes over which every parameter varies: there each device has a model of its own.
    Along other axes devices have one model between them, of which a device has all or a part."""
    found = list(map(_varying, jax.tree.leaves(params)))
    return frozenset.intersection(*found) if found else frozenset()


def over_model(reduce: Callable, x: jax.Array, own: frozenset[str]) -> jax.Array:
    """`jax.lax.psum` or the like over the devices that have one model between them, as far as x
    differs there; own: `apart` of its parameters. The result varies over `own` and no others."""
    axes = tuple(sorted(_varying(x) - own))
    return _varied(reduce(x, axes) if axes else x, own)


def shared(tree: base.PyTree, params: base.PyTree) -> base.PyTree:
    """A tree like the parameters: of what devices share, the mean of what they have there."""
    return jax.tree.map(_shared, tree, params)


def parts(tree: base.PyTree) -> list[list]:
    """The leaves of a tree, in groups of those that are split over the same devices."""
    found: dict[frozenset[str], list] = {}
    for leaf in jax.tree.leaves(tree):
        found.setdefault(_varying(leaf), []).append(leaf)
    return list(found.values())


def count_over_model(params: base.PyTree) -> int:
    """How many numbers a model has, on all devices that have it between them."""
    own = apart(params)

    def copies(leaf):
        return math.prod(jax.lax.axis_size(axis) for axis in _varying(leaf) - own)

    return sum(jnp.size(leaf) * copies(leaf) for leaf in jax.tree.leaves(params))


def within_mesh_of(tree: base.PyTree) -> contextlib.AbstractContextManager:
    """While a function is compiled outside of `jax.set_mesh`: the explicit mesh of the tree's
    arrays, if they have one. Since JAX 0.11 the types of zeros are otherwise those of no mesh."""
    mesh = _first_explicit(jax.tree.leaves(tree))
    if mesh is None or not jax.sharding.get_abstract_mesh().empty:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(mesh)


def _lying_as(x, param):
    """x, which the compiler is to split as it splits `param`, of the same shape."""
    if shard_alike is not None:
        return shard_alike(x, param)[0]
    # Operands of one elementwise operation lie alike, or x is split further: what JAX 0.11 leaves
    # to ask for. The barrier hides from the compiler that nothing is taken from `param`.
    never = jax.lax.optimization_barrier(jnp.zeros((), bool))
    return jnp.where(never, param.astype(x.dtype), x)


def _varying(x) -> frozenset:
    """The manual axes over which a value differs, as far as its type says."""
    kind = jax.typeof(x)
    # JAX 0.10 calls it so, and 0.8 vma.
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def _explicit(x):
    """The mesh of a value whose type says how it is split, else None."""
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit not in mesh.axis_types:
        return None
    # Outside of a compiled function a type does not know the devices, and the array does.
    return mesh if isinstance(x, Tracer) else x.sharding.mesh


def _first_explicit(leaves):
    """The mesh of the first value whose type says how it is split, else None."""
    return next((m for m in map(_explicit, leaves) if m is not None), None)


def beside(state: base.PyTree, params: base.PyTree) -> base.PyTree:
    """State in the shapes of the parameters, on automatic axes lying as they do."""

    def one(kept, param):
        plain = _explicit(param) is None and not jax.sharding.get_abstract_mesh().manual_axes
        return _lying_as(kept, param) if plain and kept.size else kept

    return jax.tree.map(one, state, params)
