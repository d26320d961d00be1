"""A rule and its theta as an optax transformation: the contract of all learned optimizers."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import leaves, meshes, ranges


def transformation(
    begin: Callable, step: Callable, theta: base.PyTree
) -> optax.GradientTransformationExtraArgs:
    """The optax transformation of a rule.

    `update` takes `params` (a learned optimizer looks at them) and, optionally, `num_steps`: the
    horizon of the run. Other extra arguments are left to other links of the chain. Updates are in
    the dtypes of params, whatever those of the gradients. Both halves are compiled, as one program
    each, where they are called outside of `jax.jit`; inside it they are traced as if they were not.
    Derivatives of any mode pass through both, with the bases of matrices held constant.

    Args:
      begin: (theta, params) -> state. Like `step` a key of compiled programs: equal functions (of
        two loads of one export, say) share them.
      step: (theta, gradient, state, params, num_steps) -> (updates, state), for pytrees without
        None; updates like params.

    Raises:
      UserError: from `init`, for parameters that are no real floating-point numbers; from `update`,
        where params is None, gradients or state do not fit it, or `num_steps` is not a number of
        steps.
    """
    # Only for the sentence about a state that does not fit.
    begun: dict[str, tuple[int, ...]] = {}

    def init(params):
        leaves.check(params)
        begun.clear()
        begun.update(leaves.described(params))
        make = partial(_begin, begin)
        if leaves.abstract(params):
            return jax.eval_shape(make, theta, params)
        return meshes.together(make(theta, params), params)

    def update(updates, state, params=None, *, num_steps=None, **extra_args):
        del extra_args
        if params is None:
            raise UserError(
                "The learned optimizer looks at the parameters, and `params` is None: call "
                "update(gradients, state, params)."
            )
        gradients, params = leaves.trained(updates, params)
        if base.count(params) == 0:
            return updates, state
        steps = leaves.horizon(num_steps)
        try:
            return _advance(begin, step, theta, gradients, state, params, steps)
        except leaves.Unfit as unfit:
            raise UserError(unfit.sentence(begun, leaves.described(params))) from None

    return optax.GradientTransformationExtraArgs(init, update)


@partial(jax.jit, static_argnums=0, inline=True)
def _begin(begin, theta, params):
    return begin(theta, params)


@partial(jax.jit, static_argnums=(0, 1), inline=True)
def _advance(begin, step, theta, gradients, state, params, num_steps):
    """(updates like params, state). `gradients` is a list, None where a leaf has none."""
    # While it is traced: once, not in every step.
    leaves.check_state(state, jax.eval_shape(partial(_begin, begin), theta, params))
    values, treedef = jax.tree.flatten(params)
    given = [jnp.zeros_like(p) if g is None else g for g, p in zip(gradients, values, strict=True)]
    given, whole = (list(map(jnp.asarray, x)) for x in (given, values))
    given, whole, state, num_steps = meshes.together((given, whole, state, num_steps))
    out, state = step(theta, treedef.unflatten(given), state, treedef.unflatten(whole), num_steps)
    out = meshes.alike(treedef.flatten_up_to(out), values)
    out = [None if g is None else u for g, u in zip(gradients, out, strict=True)]
    return jax.tree.unflatten(treedef, out), state


class DecayState(NamedTuple):
    """count: steps taken, int32."""

    count: jax.Array


# Where data come back this often, weight decay is at its full strength, and how it grows to there
# (docs/journal.md, "decay that is told how often data come back").
OFTEN, REPEATED_DECAY, REPEATED_POWER = 20.0, 0.3, 1.5


def repeated_decay(epochs: float | jax.Array) -> float | jax.Array:
    """The weight decay, over the rate, of a run that goes `epochs` times through its data: 0.3 ·
    min(1, epochs/20)^1.5. What is seen again and again is memorised; what is seen once is not.

    Args:
      epochs: a positive number; one in a JAX array, which may be traced, gives an array.

    Raises:
      UserError: `epochs` is no positive number.
    """
    epochs = ranges.unboxed(epochs)
    if ranges.boxed(epochs):
        return REPEATED_DECAY * jnp.minimum(1.0, epochs / OFTEN) ** REPEATED_POWER
    if not (ranges.number(epochs) and 0 < epochs < float("inf")):
        raise UserError(
            f"epochs={ranges.shown(epochs)} is no positive number: give the steps of the run times "
            "the batch size, over the number of training examples."
        )
    return REPEATED_DECAY * min(1.0, float(epochs) / OFTEN) ** REPEATED_POWER


def with_knobs(
    transform: optax.GradientTransformationExtraArgs,
    rate: Callable | None = None,
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    weight_decay: float | jax.Array | None = None,
    mask: Any | Callable[[Any], Any] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A learned optimizer with what people expect to turn, outside of its rule.

    Args:
      rate: (step, num_steps) -> its nominal rate; None if it has none.
      learning_rate: a factor on every update, or an optax schedule of factors.
      weight_decay: decoupled, as in `optax.adamw`: weight_decay · rate · θ is taken off as well.
        None is 0; `optax.inject_hyperparams` makes no array of it.
      mask: where that decay applies, as in `optax.adamw`.

    Raises:
      UserError: a knob is out of range; or there is a weight decay and no rate to multiply it by,
        or a mask and no weight decay.
    """
    learning_rate = _knob("learning_rate", learning_rate)
    weight_decay = _knob("weight_decay", 0.0 if weight_decay is None else weight_decay)
    links: list[optax.GradientTransformation] = [transform]
    if isinstance(weight_decay, jax.Array) or weight_decay:
        if rate is None:
            raise UserError(
                f"weight_decay={weight_decay} is to be multiplied by the optimizer's nominal rate, "
                "and this one has none: chain optax.add_decayed_weights(-rate · decay) behind it."
            )
        decay = _decay(rate, weight_decay)
        links.append(masked(decay, mask))
    elif mask is not None:
        raise UserError(
            "mask says where weight_decay applies, and there is none: give weight_decay, or leave "
            "mask out. The decay that an optimizer has learned is a part of its rule."
        )
    if callable(learning_rate):
        links.append(optax.scale_by_schedule(learning_rate))
    elif isinstance(learning_rate, jax.Array) or learning_rate != 1:
        links.append(_scaled(learning_rate))
    return transform if len(links) == 1 else optax.chain(*links)


def masked(decay: optax.GradientTransformation, mask) -> optax.GradientTransformation:
    """`optax.masked`, if there is a mask. Its `init` raises UserError for one that does not fit."""
    if mask is None:
        return decay
    own = optax.masked(decay, mask)

    def init(params):
        leaves.check_mask(mask(params) if callable(mask) else mask, params)
        return own.init(params)

    return own._replace(init=init)


def _knob(name: str, value) -> Any:
    """The value of a knob, if it is in range; a NumPy array without axes becomes a number."""
    schedules = name == "learning_rate"
    if schedules and callable(value):
        return value
    value = ranges.unboxed(value)
    if not (ranges.number(value) or ranges.boxed(value)):
        kinds = "neither a number nor an optax schedule" if schedules else "not a number"
        raise UserError(f"{name}={ranges.shown(value)} is {kinds}: use 0 or a positive number.")
    if ranges.number(value) and not 0 <= value < float("inf"):
        raise UserError(f"{name}={value} is out of range: use 0 or a positive number.")
    return value


def _scaled(factor) -> optax.GradientTransformation:
    """`optax.scale`, which makes float32 of bfloat16 where the factor is a float32 array."""

    def update(updates, params):
        del params
        return jax.tree.map(lambda u: u * jnp.asarray(factor, u.dtype), updates)

    return optax.stateless(update)


def _decay(rate, weight_decay) -> optax.GradientTransformationExtraArgs:
    def update(updates, state, params=None, *, num_steps=None, **extra_args):
        del extra_args
        factor = weight_decay * rate(state.count, leaves.horizon(num_steps))

        def decayed(u, p):
            return None if u is None else u - (factor * p).astype(u.dtype)

        updates = jax.tree.map(decayed, updates, params, is_leaf=lambda x: x is None)
        return updates, DecayState(state.count + 1)

    return optax.GradientTransformationExtraArgs(
        lambda params: DecayState(jnp.zeros((), jnp.int32)), update
    )
