"""Hand-designed optimizers to compare with: grids of them, and any by expression.

The optimizers of a grid are `LearnedOptimizer`s whose theta is a `Setting`: its numbers are traced,
so that one compiled program serves a whole grid (`tuning.py` searches it).
"""

import ast
import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base


class Setting(NamedTuple):
    """One point of a grid; float32 scalars, or [s] for s points.

    learning_rate: at the first step.
    horizon:       steps over which it falls to 0 as a cosine; 0 keeps it constant.
    eps_root:      see `KINDS`.
    """

    learning_rate: Any
    horizon: Any
    eps_root: Any


class Kind(NamedTuple):
    """make: (rate, eps_root, **settings) -> an optax transformation; `rate` is a schedule.
    low, high: the learning rates where a grid begins and ends unless told otherwise.
    rooted:    whether eps_root means anything to it."""

    make: Callable[..., optax.GradientTransformation]
    low: float
    high: float
    rooted: bool = True


def _sgd(rate, eps_root, momentum=0.9, **settings):
    del eps_root
    return optax.sgd(rate, momentum=momentum, **settings)


def _rmsprop(rate, eps_root, **settings):
    # optax's RMSprop has its eps inside the root already. For "none" 1e-16 stands in, the square of
    # the eps that Adam adds outside: with 0, a gradient that is zero would give 0/0.
    return optax.rmsprop(rate, eps=jnp.maximum(eps_root, 1e-16), **settings)


KINDS = {
    "adam": Kind(lambda rate, eps_root, **s: optax.adam(rate, eps_root=eps_root, **s), 1e-4, 1.0),
    "adamw": Kind(lambda rate, eps_root, **s: optax.adamw(rate, eps_root=eps_root, **s), 1e-4, 1.0),
    "nadamw": Kind(
        lambda rate, eps_root, **s: optax.nadamw(rate, eps_root=eps_root, **s), 1e-4, 1.0
    ),
    "sgd": Kind(_sgd, 1e-3, 10.0, rooted=False),
    "rmsprop": Kind(_rmsprop, 1e-5, 1e-1),
}


def kind(name: str) -> Kind:
    """The kind of that name; UserError with the nearest name for an unknown one."""
    if name not in KINDS:
        raise UserError(
            f"There is no baseline {name!r}{_meant(name, KINDS)}: choose from {', '.join(KINDS)}."
        )
    return KINDS[name]


def grid(name: str, **settings) -> base.LearnedOptimizer:
    """The optimizers of a kind, as functions of a `Setting`.

    Args:
      name: one of `KINDS`.
      settings: further arguments of the optax function, like `b1=0.95` or `momentum=0.9` (sgd's
        default here).
    """
    make = kind(name).make

    def bind(theta: Setting):
        def rate(count):
            fraction = jnp.minimum(count / jnp.maximum(theta.horizon, 1.0), 1.0)
            cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * fraction))
            return theta.learning_rate * jnp.where(theta.horizon > 0, cosine, 1.0)

        return make(rate, theta.eps_root, **settings)

    return base.lift(lambda key: setting(kind(name).low), bind)


def setting(learning_rate, horizon=0, eps_root=0.0) -> Setting:
    """A `Setting` of float32 arrays, all of the shape of `learning_rate`."""
    rates = jnp.asarray(learning_rate, jnp.float32)
    return Setting(rates, *(jnp.full(rates.shape, x, jnp.float32) for x in (horizon, eps_root)))


def expression(name: str, point: Setting, **settings) -> str:
    """A setting as `parse` reads it, like "adam(learning_rate=0.01, eps_root=1e-08)"."""
    rate = f"{float(point.learning_rate):.4g}"
    if point.horizon:
        rate = f"cosine_decay_schedule({rate}, {int(point.horizon)})"
    settings = dict({"momentum": 0.9} if name == "sgd" else {}, **settings)
    root = float(point.eps_root)
    if name == "rmsprop":
        settings["eps"] = max(root, 1e-16)
    elif root and kind(name).rooted:
        settings["eps_root"] = float(f"{root:.6g}")
    rest = "".join(f", {k}={v!r}" for k, v in settings.items())
    return f"{name}(learning_rate={rate}{rest})"


# What an expression may name. A learning rate that is not given is `DEFAULT_RATE`.
OPTIMIZERS = {
    name: getattr(optax, name)
    for name in (
        *("adabelief", "adadelta", "adagrad", "adafactor", "adam", "adamax", "adamaxw", "adamw"),
        *("adan", "amsgrad", "fromage", "lamb", "lars", "lion", "nadam", "nadamw", "noisy_sgd"),
        *("novograd", "radam", "rmsprop", "rprop", "sgd", "sm3", "yogi"),
    )
    if hasattr(optax, name)
}
SCHEDULES = {
    name: getattr(optax, name)
    for name in (
        *("constant_schedule", "cosine_decay_schedule", "exponential_decay", "linear_schedule"),
        *("polynomial_schedule", "warmup_cosine_decay_schedule"),
    )
}
DEFAULT_RATE = 1e-3


def parse(text: str) -> optax.GradientTransformationExtraArgs:
    """An optax expression as typed: `adam`, `adam(learning_rate=1e-2)`, `sgd(0.1, momentum=0.9)`.

    Names come from `OPTIMIZERS`, and arguments are literals or one of `SCHEDULES` with literals:
    nothing typed is ever evaluated.

    Raises:
      UserError: anything else, or arguments that optax does not take.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError:
        raise UserError(
            f"{text!r} is not an expression: write it like adam(learning_rate=1e-2)."
        ) from None
    if isinstance(node, ast.Name | ast.Attribute):
        node = ast.Call(func=node, args=[], keywords=[])
    if not isinstance(node, ast.Call):
        raise UserError(
            f"{text!r} does not name an optimizer: write it like adam(learning_rate=1e-2)."
        )
    made = _call(node, OPTIMIZERS, text)
    return optax.with_extra_args_support(made)


def _call(node: ast.Call, known: dict[str, Callable], text: str):
    name = ast.unparse(node.func).removeprefix("optax.")
    if name not in known:
        raise UserError(
            f"{text!r} names {name!r}, which is not among the optax functions known here"
            f"{_meant(name, known)}: choose from {', '.join(known)}."
        )
    starred = [a for a in node.args if isinstance(a, ast.Starred)]
    if starred or any(k.arg is None for k in node.keywords):
        raise UserError(f"{text!r} unpacks arguments with *: write each one out.")
    args = [_value(a, text) for a in node.args]
    kwargs = {k.arg: _value(k.value, text) for k in node.keywords}
    if known is OPTIMIZERS and not args:
        kwargs.setdefault("learning_rate", DEFAULT_RATE)
    try:
        return known[name](*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"optax refuses {text!r} ({error}): correct its arguments.") from None


def _value(node: ast.expr, text: str):
    if isinstance(node, ast.Call):
        return _call(node, SCHEDULES, text)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(
            f"{text!r} has the argument {ast.unparse(node)!r}, which is no plain value: "
            "use numbers, strings, True, False or None."
        ) from None


def _meant(name: str, known) -> str:
    close = difflib.get_close_matches(name, known)
    # Of what is close, letters swapped are likelier than letters left out.
    close.sort(key=lambda other: sorted(other) != sorted(name))
    return f" (did you mean {close[0]}?)" if close else ""
