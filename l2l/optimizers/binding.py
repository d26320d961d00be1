"""A rule with its theta as an optax transformation: the contract that all learned optimizers keep."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import optax

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import leaves


def transformation(
    begin: Callable, step: Callable, theta: base.PyTree
) -> optax.GradientTransformationExtraArgs:
    """The optax transformation of a rule.

    `update` takes `params` (a learned optimizer looks at them) and, optionally, `num_steps`: the
    horizon of the run. Other extra arguments are left to other links of the chain. Updates are in
    the dtypes of params, whatever those of the gradients. Both halves are compiled, as one program
    each, where they are called outside of `jax.jit`; inside it they are traced as if they were not.

    Args:
      begin: (theta, params) -> state.
      step: (theta, gradient, state, params, num_steps) -> (updates, state), for pytrees without
        None; updates like params.

    Raises:
      UserError: from `init`, for parameters that are no real floating-point numbers; from `update`,
        where params is None, gradients or state do not fit it, or `num_steps` is no number of
        steps.
    """
    # Only for the sentence about a state that does not fit.
    begun: dict[str, tuple[int, ...]] = {}

    @partial(jax.jit, inline=True)
    def start(theta, params):
        return begin(theta, jax.tree.map(jnp.asarray, params))

    @partial(jax.jit, inline=True)
    def advance(theta, gradients, state, params, num_steps):
        # While it is traced: once, not in every step.
        leaves.check_state(state, jax.eval_shape(start, theta, params))
        values, treedef = jax.tree.flatten(params)
        values = [jnp.asarray(p) for p in values]
        given = [
            jnp.zeros_like(p) if g is None else jnp.asarray(g)
            for g, p in zip(gradients, values, strict=True)
        ]
        out, state = step(
            theta, treedef.unflatten(given), state, treedef.unflatten(values), num_steps
        )
        out = [None if g is None else u for g, u in zip(gradients, treedef.flatten_up_to(out), strict=True)]
        return jax.tree.unflatten(treedef, out), state

    def init(params):
        leaves.check(params)
        begun.clear()
        begun.update(leaves.described(params))
        return jax.eval_shape(start, theta, params) if leaves.abstract(params) else start(theta, params)

    def update(updates, state, params=None, *, num_steps=None, **extra_args):
        del extra_args
        if params is None:
            raise UserError(
                "The learned optimizer looks at the parameters, and `params` is None: call "
                "update(gradients, state, params)."
            )
        gradients = leaves.matched(updates, params)
        if base.count(params) == 0:
            return updates, state
        steps = leaves.horizon(num_steps)
        try:
            return advance(theta, gradients, state, params, steps)
        except leaves.Unfit as unfit:
            raise UserError(unfit.sentence(begun, leaves.described(params))) from None

    return optax.GradientTransformationExtraArgs(init, update)
