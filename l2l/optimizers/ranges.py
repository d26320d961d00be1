"""The settings of an optimizer, held to what they may be: one sentence about one that is not.

Numbers that are arrays pass unseen: `optax.inject_hyperparams` makes such, and while a step is
traced they have no value yet.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from l2l.console.errors import UserError


def decay(name: str, value) -> None:
    """Of an average: with 1 its bias correction would be 0/0."""
    if not _within(name, value, lambda x: 0 <= x < 1):
        raise UserError(f"{name}={value} is not a decay: use a number from 0 to below 1.")


def decays(name: str, values: Sequence) -> None:
    """Of the first moments, of which the first is the nominal one."""
    if not values:
        raise UserError(f"{name}=() leaves no first moment to follow: give one decay or more.")
    for value in values:
        decay(name, value)


def positive(name: str, value) -> None:
    if not _within(name, value, lambda x: 0 < x < math.inf):
        raise UserError(f"{name}={value} is out of range: use a positive number.")


def not_negative(name: str, value) -> None:
    if not _within(name, value, lambda x: 0 <= x < math.inf):
        raise UserError(f"{name}={value} is out of range: use 0 or a positive number.")


def whole(name: str, value, least: int = 1) -> int:
    """A number of things, or of steps, as a Python int. Arrays must have a value here: shapes
    follow from it."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except jax.errors.TracerIntegerConversionError:
        raise UserError(
            f"{name} is traced, but shapes follow from it: name it in the static_args of "
            "optax.inject_hyperparams, or leave it out."
        ) from None
    except TypeError:
        number = least - 1
    if number < least:
        raise UserError(f"{name}={value!r} is not a whole number of {least} or more.")
    return number


def number(value) -> bool:
    """Whether it is one, of Python's or NumPy's; True and False are not."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def unboxed(value) -> Any:
    """A NumPy array without axes as the number in it; anything else as it is."""
    return value.item() if isinstance(value, np.ndarray) and value.shape == () else value


def boxed(value) -> bool:
    """Whether it is a JAX array of one real number, which may be traced."""
    real = (jnp.floating, jnp.integer)
    return (
        isinstance(value, jax.Array)
        and value.shape == ()
        and any(jnp.issubdtype(value.dtype, kind) for kind in real)
    )


def shown(value) -> str:
    """A value in a sentence: of an array, whose numbers may still have to be computed, the type."""
    array = isinstance(value, jax.Array | np.ndarray)
    return f"an array {value.dtype}{list(value.shape)}" if array else repr(value)


def _within(name, value, fits) -> bool:
    if isinstance(value, jax.Array | np.ndarray):
        return True
    if not number(value):
        raise UserError(f"{name}={value!r} is not a number.")
    return bool(fits(value))
