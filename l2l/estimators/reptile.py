"""Reptile (Nichol et al. 2018, arXiv 1803.02999): the start moves to where training ends."""

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core import base, unroll
from l2l.core.unroll import Inner
from l2l.estimators.autodiff import window
from l2l.estimators.first_order import over_problems
from l2l.estimators.objective import Objective


def reptile(inner: Inner, objective: Objective) -> base.MetaGradient:
    """ĝ = θ₀ − θ_K for the parameters before and after the K steps of a window; their sum over the
    windows of a run is how far the run has moved from the start. No derivative is taken, neither
    through the steps nor of the query.

    Args:
      inner: an optimizer whose theta holds a start, and nothing else.
      objective: for the metrics alone.

    Raises:
      UserError: theta holds no start, or more than that.
    """
    like = jax.eval_shape(inner.optimizer.init, jax.random.key(0))
    if inner.optimizer.start is None or jax.tree.leaves(like._replace(start=())):
        raise UserError(
            "Estimator 'reptile' learns the start of runs and nothing else: set theta.start, and "
            "fix the optimizer's settings, or choose 'truncated'."
        )

    def init(keys, theta, stage):
        return jax.vmap(lambda key: unroll.first(inner, key, theta, stage))(keys)

    def one_problem(theta, state, data, stage):
        before = unroll.renew(inner, state, theta, stage)
        after, _, metrics = window(inner, objective, theta, before, data)
        moved = jax.tree.map(jnp.subtract, before.params, after.params)
        return theta._replace(start=moved), after, metrics

    def estimate(theta, state, data, stage):
        return over_problems(lambda s: one_problem(theta, s, data, stage), state)

    return base.MetaGradient(init, estimate)
