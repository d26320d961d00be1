"""The trees that a training loop gives an optimizer: which fit, and an error for those that do not.

Trees come as optax, flax and equinox pass them: with None where there is nothing to train, Python
numbers, shapes in place of arrays. All of it is decided by structure, shapes and types, while a
step is traced or before it runs: no number is looked at.
"""

import contextlib
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import ranges


def check(params: base.PyTree) -> None:
    """Raises UserError for a leaf that has no real gradient."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        kind = _kind(leaf)
        if not base.real(leaf):
            raise UserError(
                f"Parameter {_name(path)} is {kind or f'a {type(leaf).__name__}'}: optimizers of "
                "l2l update real floating-point numbers. Leave it out with optax.masked."
            )
        if jnp.finfo(kind).bits < 16:  # JAX does not compute in these.
            raise UserError(
                f"Parameter {_name(path)} is {kind}, which is for storage: keep the parameters "
                "that are trained in bfloat16 or wider, and make these from them."
            )


def abstract(tree: base.PyTree) -> bool:
    """Whether any leaf is a shape in place of an array."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


def trained(gradients: base.PyTree, params: base.PyTree) -> tuple[list, base.PyTree]:
    """What `update` is about: (the gradients as `matched` gives them, the parameters), of all
    leaves but those that have no gradient and could not have one, such as functions and whole
    numbers. `eqx.filter` takes these out before `init`, and a loop may give `update` them all.

    Raises:
      UserError: as `matched`.
    """
    found = matched(gradients, params)
    if all(one is not None for one in found):
        return found, params
    leaves, treedef = jax.tree.flatten(params)
    kept = [one is not None or base.real(x) for one, x in zip(found, leaves, strict=True)]
    params = treedef.unflatten([x if k else None for x, k in zip(leaves, kept, strict=True)])
    return [one for one, k in zip(found, kept, strict=True) if k], params


def matched(given: base.PyTree, params: base.PyTree, what: str = "gradients") -> list:
    """The leaves of `given`, a tree like params, in the order of those of params. One that is None,
    as equinox leaves it where nothing is trained, stays None, and float0, as JAX has it where there
    is no derivative, becomes None.

    Raises:
      UserError: the two differ in structure, or in the shape of a leaf, or one of `given` is
        complex, of which a real update would take a part; the sentence calls the first tree `what`
        and names the first leaf that does not fit.
    """
    leaves, treedef = jax.tree.flatten(params)
    try:
        found = treedef.flatten_up_to(given)
    except (ValueError, TypeError, KeyError):
        raise UserError(_difference(what, given, params)) from None
    for i, (one, leaf) in enumerate(zip(found, leaves, strict=True)):
        if one is None:
            continue
        kind, need = _kind(one), f"shape {np.shape(leaf)}"
        if kind == jax.dtypes.float0:
            found[i] = None
            continue
        if kind is None:  # What stands where params has a leaf may be a whole subtree.
            have = f"a {type(one).__name__}"
        elif np.shape(one) != np.shape(leaf):
            have = f"shape {np.shape(one)}"
        elif jnp.issubdtype(kind, jnp.complexfloating):
            have, need = f"{kind} numbers", "real ones"
        else:
            continue
        name = _name(jax.tree_util.tree_leaves_with_path(params)[i][0])
        raise UserError(
            f"The {what} have {have} at {name} where params has {need}: {_REMEDY[what]}."
        )
    return found


def described(params: base.PyTree) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the leaves."""
    return {
        _name(path): tuple(np.shape(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


def check_mask(mask: base.PyTree, params: base.PyTree) -> None:
    """Raises UserError unless a mask has a leaf for every leaf or subtree of params."""
    try:
        jax.tree.structure(mask).flatten_up_to(params)
    except (ValueError, TypeError, KeyError):
        theirs, ours = (
            [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
            for tree in (mask, params)
        )
        bare = [p for p in ours if not any(p[: len(m)] == m for m in theirs)]
        idle = [m for m in theirs if not any(p[: len(m)] == m for p in ours)]
        if bare:
            fault = f"it says nothing of {_name(bare[0])}"
        elif idle:
            fault = f"it has {_name(idle[0])}, and params has not"
        else:
            fault = f"it is {str(jax.tree.structure(mask))[:150]}"
        raise UserError(
            f"The mask does not fit the parameters: {fault}. Give a tree of True and False "
            "that has their structure, or a function from the parameters to one."
        ) from None


class Unfit(Exception):
    """A state that was not made for the parameters; `check_state` raises it.

    had, need: how many numbers the state holds, and would for these parameters.
    """

    def __init__(self, had: int, need: int):
        super().__init__(had, need)
        self.had, self.need = had, need

    def sentence(self, begun: dict, now: dict) -> str:
        """What is wrong, from `described` of the parameters that `init` was last given (empty if it
        never was) and of those of the update."""
        cause = "for other parameters, or by an optimizer of another kind or other settings"
        fault = f"it holds {self.had} numbers, and `init` of params would make {self.need}"
        if self.had == self.need:
            fault = "its arrays have other shapes than those that `init` of params would make"
        changed = [name for name in {**begun, **now} if begun.get(name) != now.get(name)]
        if begun and changed:
            cause = "for other parameters than `update` is given"
            fault = _change(changed[0], begun, now)
        return (
            f"The state was made {cause}: {fault}. Begin with what `init` of this optimizer makes, "
            "and call `init` again whenever the parameters change in structure or shape."
        )


def check_state(state: base.PyTree, expected: base.PyTree) -> None:
    """Raises `Unfit` unless the state has the structure and the shapes of `expected`."""
    shapes = [[np.shape(x) for x in jax.tree.leaves(tree)] for tree in (state, expected)]
    if shapes[0] != shapes[1] or jax.tree.structure(state) != jax.tree.structure(expected):
        raise Unfit(*(sum(map(math.prod, x)) for x in shapes))


def horizon(num_steps: Any) -> jax.Array:
    """`num_steps` as an int32 scalar; None becomes 0, which says that the horizon is unknown.

    Raises:
      UserError: it is not a whole number from 0 to 2³¹ − 1. The value of an array is not checked.
    """
    steps = -1
    if isinstance(num_steps, jax.Array):
        if num_steps.shape == () and jnp.issubdtype(num_steps.dtype, jnp.integer):
            return num_steps.astype(jnp.int32)
    elif not isinstance(num_steps, bool):
        with contextlib.suppress(TypeError):
            steps = operator.index(0 if num_steps is None else num_steps)
    if steps >= 1 << 31:
        raise UserError(
            f"num_steps={steps} is above the limit of {(1 << 31) - 1} (2³¹ − 1), since steps are "
            "counted in 32 bits: give a smaller whole number, or leave it out."
        )
    if steps < 0:
        raise UserError(
            f"num_steps={ranges.shown(num_steps)} is not a number of steps: give a whole number of "
            "0 or more, the length of the run, or leave it out where that is not known."
        )
    # By name, so that a transfer guard lets it pass.
    return jax.device_put(np.int32(steps))


def state_type(state_dtype: Any) -> np.dtype | None:
    """The dtype to keep a recurrent state in, from what a user wrote; None for None.

    Raises:
      UserError: it is no floating-point type that JAX computes in.
    """
    if state_dtype is None:
        return None
    kept = {jnp.dtype(x) for x in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)}
    try:
        dtype = jnp.dtype(state_dtype)
    except TypeError:
        dtype = state_dtype
    if not isinstance(dtype, np.dtype) or dtype not in kept:
        raise UserError(
            f"state_dtype={dtype} cannot hold a recurrent state: choose bfloat16, float16, float32 "
            "or float64."
        )
    return dtype


_REMEDY = {
    "gradients": "give `update` the gradients of the parameters that it is given",
    "moments": "call `init` again when the parameters change in structure or shape",
    "remembered parameters": "call `init` again when the parameters change in structure or shape",
}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path) or "the root"


def _kind(leaf) -> np.dtype | None:
    """The dtype of a number or array; None for what is neither."""
    number = hasattr(leaf, "dtype") or isinstance(leaf, int | float | complex)
    return jnp.result_type(leaf) if number else None


def _change(name, begun, now) -> str:
    if name not in begun:
        return f"params has {name} of shape {now[name]}, which `init` was not given"
    if name not in now:
        return f"`init` was given {name} of shape {begun[name]}, which params has not"
    return f"params has {name} of shape {now[name]}, and `init` was given {name} {begun[name]}"


def _difference(what, given, params) -> str:
    """The sentence about two trees of different structure."""
    theirs, ours = described(given), described(params)
    less = next(
        (f"{name} of shape {shape}" for name, shape in ours.items() if name not in theirs), ""
    )
    more = next(
        (f"{name} of shape {shape}" for name, shape in theirs.items() if name not in ours), ""
    )
    if less and more:
        fault = f"params has {less} where the {what} have {more}"
    elif less or more:
        fault = (
            f"params has {less}, and the {what} do not"
            if less
            else f"the {what} have {more}, and params does not"
        )
    else:
        ours, theirs = (str(jax.tree.structure(tree))[:150] for tree in (params, given))
        fault = f"params is {ours}, and the {what} are {theirs}"
    return f"The {what} do not fit the parameters: {fault}; {_REMEDY[what]}."
