"""An error inside a task says which function was called with which shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2l.console.errors import UserError
from l2l.core import base

ARGUMENTS = {
    "sample": ("key",),
    "init": ("key", "problem"),
    "batch": ("key", "problem", "data", "split"),
    "loss": ("params", "problem", "batch"),
    "accuracy": ("params", "problem", "batch"),
    "data": (),
    "outputs": ("params", "problem", "batch"),
}
LONGEST = 300  # Of what is said about one argument.


def named(family: base.TaskFamily, name: str) -> base.TaskFamily:
    """A family whose functions add to what they raise a note: the task's name, the function's, and
    the shapes of its arguments. The error itself is passed on as it is.

    Where one returns what cannot be (no parameters, a loss that is no scalar), that is a
    `UserError`.
    """
    functions = {key: getattr(family, key) for key in ARGUMENTS}
    return family._replace(
        **{
            key: _named(function, key, f"task {name!r}")
            for key, function in functions.items()
            if function is not None
        }
    )


def _named(function: Callable, key: str, task: str) -> Callable:
    @functools.wraps(function)
    def call(*arguments):
        try:
            out = function(*arguments)
        except Exception as error:
            given = zip(ARGUMENTS[key], arguments, strict=False)
            said = ", ".join(f"{name}={shapes(value)}" for name, value in given)
            error.add_note(f"In function {key} of {task}, called as {key}({said}).")
            raise
        _check(out, key, task)
        return out

    call.own = function  # pyright: ignore[reportAttributeAccessIssue]
    return call


def own(function: Callable) -> Callable:
    """The task's own function behind one of a `named` family."""
    return getattr(function, "own", function)


def _check(out: Any, key: str, task: str) -> None:
    if key == "init" and not jax.tree.leaves(out):
        raise UserError(
            f"Function init of {task} returned {out!r}, which leaves nothing to train: let it "
            "return the parameters, a pytree of arrays."
        )
    if key == "init" and (odd := [x for x in jax.tree.leaves(out) if not base.real(x)]):
        raise UserError(
            f"Function init of {task} returned {shapes(odd[0])} among the parameters, and only "
            "real floating-point numbers are trained: keep it in the problem (`sample`) or in the "
            "data."
        )
    if key not in ("loss", "accuracy"):
        return
    if key == "loss" and isinstance(out, float):
        raise UserError(
            f"Function loss of {task} returned {out}, a number that is the same for all "
            "parameters: let it return what jax.numpy makes of them."
        )
    scalar = isinstance(out, jax.Array | np.ndarray | np.generic | float) and not jnp.shape(out)
    if not scalar or not base.real(out):
        raise UserError(
            f"Function {key} of {task} returned {shapes(out)}, not one floating-point number: let "
            "it return a scalar, such as a mean over the batch."
        )


def shapes(tree: Any) -> str:
    """A pytree with float32[3,4] in place of each array: {'w': float32[3,4]}."""

    def of(x):
        if isinstance(x, jax.Array | np.ndarray | np.generic):
            return _Word(f"{x.dtype}[{','.join(map(str, x.shape))}]")
        return x

    text = repr(jax.tree.map(of, tree))
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


class _Word(str):
    """Text that shows itself without quotation marks."""

    __slots__ = ()
    __repr__ = str.__str__
