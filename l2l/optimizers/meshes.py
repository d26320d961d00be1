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

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from l2l.core import base

try:
    from jax.experimental.shard_alike import shard_alike
except ImportError:  # Since JAX 0.11.
    shard_alike = None


def together(tree: base.PyTree, beside: base.PyTree = ()) -> base.PyTree:
    """The arrays of a pytree, so that one may be laid beside another, and beside those of a
    second tree once they are treated likewise."""
    leaves, treedef = jax.tree.flatten(tree)
    around = [*leaves, *jax.tree.leaves(beside)]
    axes = set().union(*map(_varying, around))
    mesh = _first_explicit(around)
    if not axes and mesh is None:
        return tree

    def one(leaf):
        if missing := tuple(sorted(axes - _varying(leaf))):
            leaf = jax.lax.pcast(leaf, missing, to="varying")
        if mesh is not None:
            leaf = jax.sharding.reshard(leaf, NamedSharding(mesh, PartitionSpec()))
        return leaf

    return jax.tree.unflatten(treedef, [one(leaf) for leaf in leaves])


def alike(updates: base.PyTree, params: base.PyTree) -> base.PyTree:
    """The updates, lying on the devices as their parameters do."""
    return jax.tree.map(_alike, updates, params)


def _alike(update, param):
    if extra := tuple(sorted(_varying(update) - _varying(param))):
        update = jax.lax.pmean(update, extra)
    if _explicit(param) is not None:
        return jax.sharding.reshard(update, jax.typeof(param).sharding)
    if jax.sharding.get_abstract_mesh().manual_axes:
        return update
    return _lying_as(update, param)


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
