"""Hand-designed optimizers to compare with: spaces to tune over, and single ones by expression.

The optimizers of a kind are a `LearnedOptimizer` whose theta is a `Setting`: its numbers are
traced, so that one compiled program serves a whole space (`tuning.py` searches it).
"""

import ast
import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import soap

# Of a run, the part that a warm-up takes, and where it begins, as a part of the peak rate.
WARMUP = 0.05
WARMUP_FROM = 0.1


class Setting(NamedTuple):
    """One point of a space; float32 scalars, or [s] for s points.

    learning_rate: at its highest.
    warmup:        steps over which it rises to that, linearly from `WARMUP_FROM` of it; 0 for none.
    horizon:       steps at whose end it has fallen to 0 as a cosine; 0 keeps it constant.
    eps_root, weight_decay: see `Kind.arguments`.
    """

    learning_rate: Any
    warmup: Any
    horizon: Any
    eps_root: Any
    weight_decay: Any

    def rate(self, count):
        """The learning rate after `count` steps."""
        after = (count - self.warmup) / jnp.maximum(self.horizon - self.warmup, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(after, 0.0, 1.0)))
        rising = WARMUP_FROM + (1.0 - WARMUP_FROM) * count / jnp.maximum(self.warmup, 1.0)
        later = jnp.where(self.horizon > 0, cosine, 1.0)
        return self.learning_rate * jnp.where(count < self.warmup, rising, later)


# What a schedule of a space makes of a run of T steps: (whether it warms up, whether it decays).
SCHEDULE_KINDS = {
    "constant": (False, False),
    "warmup": (True, False),
    "cosine": (False, True),
    "warmup cosine": (True, True),
}


class Kind(NamedTuple):
    """A kind of optimizer and the space in which it is tuned unless told otherwise.

    make: (rate, **arguments, **settings) -> an optax transformation; `rate` is a schedule.
    arguments: (eps_root, weight_decay) -> what `make` is told of them.
    low, high: the lowest and the highest learning rate.
    schedules: of `SCHEDULE_KINDS`.
    decays: weight decays, decoupled and times the rate, as in `optax.adamw`.
    rooted: whether eps_root means anything to it.
    settings: further arguments.
    cost: about that of a step over Adam's, on small networks: for estimates of the time.
    """

    make: Callable[..., optax.GradientTransformation]
    arguments: Callable[[Any, Any], dict[str, Any]]
    low: float = 3e-4
    high: float = 3.0
    schedules: tuple[str, ...] = ("constant", "cosine", "warmup cosine")
    decays: tuple[float, ...] = (0.0, 1e-3, 1e-2, 1e-1)
    rooted: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})
    cost: float = 1.0


def _adaptive(eps_root, weight_decay) -> dict:
    return {"eps_root": eps_root, "weight_decay": weight_decay}


def _decayed(eps_root, weight_decay) -> dict:
    return {"weight_decay": weight_decay}


def _muon(eps_root, weight_decay) -> dict:
    # Vectors are Adam's, with a decay of their own.
    return {"weight_decay": weight_decay, "adam_weight_decay": weight_decay}


def _rmsprop(eps_root, weight_decay) -> dict:
    # optax's RMSprop has its eps inside the root already. For "none" 1e-16 stands in, the square of
    # the eps that Adam adds outside: with 0, a gradient that is zero would give 0/0.
    return {"eps": jnp.maximum(eps_root, 1e-16)}


KINDS = {
    "adam": Kind(optax.adam, lambda root, decay: {"eps_root": root}, decays=(0.0,), rooted=True),
    "adamw": Kind(optax.adamw, _adaptive, rooted=True),
    "nadamw": Kind(optax.nadamw, _adaptive, rooted=True),
    "muon": Kind(optax.contrib.muon, _muon, cost=2.2),
    "schedule_free_adamw": Kind(
        optax.contrib.schedule_free_adamw, _decayed, schedules=("constant", "warmup")
    ),
    # Its rate is a factor on the one that it finds.
    "prodigy": Kind(optax.contrib.prodigy, _decayed, 0.1, 10.0),
    "soap": Kind(soap.soap, _decayed, cost=4.0),
    "sgd": Kind(optax.sgd, lambda *_: {}, 1e-3, 10.0, decays=(0.0,), settings={"momentum": 0.9}),
    "rmsprop": Kind(optax.rmsprop, _rmsprop, 1e-5, 1e-1, decays=(0.0,), rooted=True),
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
      settings: further arguments of the optax function, like `b1=0.95`.
    """
    found = kind(name)

    def bind(theta: Setting):
        arguments = found.arguments(theta.eps_root, theta.weight_decay)
        return found.make(theta.rate, **arguments, **{**found.settings, **settings})

    return base.lift(lambda key: setting(found.low), bind)


def setting(learning_rate, warmup=0, horizon=0, eps_root=0.0, weight_decay=0.0) -> Setting:
    """A `Setting` of float32 arrays, all of the shape of `learning_rate`."""
    rates = jnp.asarray(learning_rate, jnp.float32)
    others = (warmup, horizon, eps_root, weight_decay)
    return Setting(rates, *(jnp.broadcast_to(jnp.float32(x), rates.shape) for x in others))


def scheduled(learning_rate, schedule: str, num_steps: int, eps_root=0.0, weight_decay=0.0):
    """The `Setting` of a run of `num_steps` with one of `SCHEDULE_KINDS`."""
    warms, decays = SCHEDULE_KINDS[schedule]
    warmup = max(1, round(WARMUP * num_steps)) if warms else 0
    return setting(learning_rate, warmup, num_steps if decays else 0, eps_root, weight_decay)


def expression(name: str, point: Setting, **settings) -> str:
    """A setting as `parse` reads it, like "adam(learning_rate=0.01, eps_root=1e-08)"."""
    peak, warmup, horizon = float(point.learning_rate), int(point.warmup), int(point.horizon)
    rate, low = f"{peak:.4g}", f"{WARMUP_FROM * peak:.4g}"
    if warmup and horizon:
        rate = f"warmup_cosine_decay_schedule({low}, {rate}, {warmup}, {horizon})"
    elif warmup:
        rate = f"warmup_constant_schedule({low}, {rate}, {warmup})"
    elif horizon:
        rate = f"cosine_decay_schedule({rate}, {horizon})"
    found = kind(name)
    own = found.arguments(float(point.eps_root), float(point.weight_decay))
    own = {k: float(f"{float(v):.6g}") for k, v in own.items()}
    if not own.get("eps_root", True):
        del own["eps_root"]
    rest = "".join(f", {k}={v!r}" for k, v in {**own, **found.settings, **settings}.items())
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
} | {
    "muon": optax.contrib.muon,
    "prodigy": optax.contrib.prodigy,
    "schedule_free_adamw": optax.contrib.schedule_free_adamw,
    "soap": soap.soap,  # Ours: optax has none.
}
SCHEDULES = {
    name: getattr(optax, name)
    for name in (
        *("constant_schedule", "cosine_decay_schedule", "exponential_decay", "linear_schedule"),
        *("polynomial_schedule", "warmup_constant_schedule", "warmup_cosine_decay_schedule"),
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
    node = _parsed(text)
    made = _call(node, OPTIMIZERS, text)
    return optax.with_extra_args_support(made)


def arguments(text: str) -> tuple[list, dict[str, Any]]:
    """The arguments of a call as typed, like "factory(0.1, b1=0.9)", under the rules of `parse`."""
    return _arguments(_parsed(text), text)


def _parsed(text: str) -> ast.Call:
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
    return node


def _call(node: ast.Call, known: dict[str, Callable], text: str):
    name = plain_name(ast.unparse(node.func))
    if name not in known:
        raise UserError(
            f"{text!r} names {name!r}, which is not among the optax functions known here"
            f"{_meant(name, known)}: choose from {', '.join(known)}."
        )
    args, kwargs = _arguments(node, text)
    if known is OPTIMIZERS and not args:
        kwargs.setdefault("learning_rate", DEFAULT_RATE)
    try:
        return known[name](*args, **kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(f"optax refuses {text!r} ({error}): correct its arguments.") from None


def _arguments(node: ast.Call, text: str) -> tuple[list, dict[str, Any]]:
    starred = [a for a in node.args if isinstance(a, ast.Starred)]
    named = {k.arg: _value(k.value, text) for k in node.keywords if k.arg is not None}
    if starred or len(named) < len(node.keywords):
        raise UserError(f"{text!r} unpacks arguments with *: write each one out.")
    return [_value(a, text) for a in node.args], named


def plain_name(text: str) -> str:
    """The name of an optax function without its module."""
    return text.removeprefix("optax.").removeprefix("contrib.")


def _value(node: ast.expr, text: str):
    if isinstance(node, ast.Call):
        return _call(node, SCHEDULES, text)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise UserError(
            f"{text!r} has the argument {ast.unparse(node)!r}, which is not a plain value: "
            "use numbers, strings, True, False or None."
        ) from None


def _meant(name: str, known) -> str:
    close = difflib.get_close_matches(name, known)
    # Of what is close, letters swapped are likelier than letters left out.
    close.sort(key=lambda other: sorted(other) != sorted(name))
    return f" (did you mean {close[0]}?)" if close else ""
