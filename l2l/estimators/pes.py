"""Persistent evolution strategies (Vicol et al. 2021, arXiv 2112.13835), and plain ones.

No derivative is taken: two runs of the same problem, on the same batches, are trained by θ + ε and
θ − ε (θ the meta-parameters here), with a new ε every window. The noise is drawn from the run's own
key, so devices have nothing to send one another but the mean.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core import base, unroll
from l2l.estimators.autodiff import window
from l2l.estimators.first_order import over_problems
from l2l.estimators.objective import Objective


class PesState(NamedTuple):
    """pair: the runs under θ + ε and θ − ε, leaves [2, ...]; xi: Σ ε over the run's windows."""

    pair: base.InnerState
    xi: base.PyTree


def gaussian(key: jax.Array, theta) -> base.PyTree:
    """Standard normal numbers like theta."""
    leaves, treedef = jax.tree.flatten(theta)
    keys = jax.random.split(key, len(leaves))
    draws = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(treedef, draws)


def pes(
    inner: unroll.Inner,
    objective: Objective,
    *,
    sigma: float = 0.01,
    persistent: bool = True,
    noise: Callable = gaussian,
) -> base.MetaGradient:
    """ξ_w = ξ_{w−1} + σ ε_w,   ĝ_w = ξ_w (L⁺_w − L⁻_w) / 2σ²,   ε_w ~ N(0, I).

    L_w is the meta-loss of window w, as every estimator has it (a mean over the window's losses;
    the last one for form "last"), and ξ starts from zero with a new run. The scale: E[ĝ_w] is the
    whole derivative dL_w/dθ, through all windows of the run up to w and smoothed by σ, so that the
    mean over the W windows of a run estimates ∇ (1/W) Σ_w L_w, which for windows of equal length is
    the gradient of the mean over the run's steps. Truncated estimators have E[ĝ_w] = ∂L_w/∂θ with
    the window's first state held constant; where a run is one window they and PES agree.

    Args:
      inner: its `length` is the window; staggered starts decorrelate the pairs of a meta-batch.
      objective: the meta-loss. It needs no derivative, but ĝ is as noisy as it varies.
      sigma: the standard deviation of the noise on every scalar of theta.
      persistent: False forgets: ξ_w = σ ε_w and both runs begin a window where the positive one
        ended the last. That is truncated antithetic ES, biased as truncated gradients are.
      noise: (key, theta) -> ε, with mean 0 and covariance I.

    A run is restarted together with its twin, even when only one of the two is no longer finite.
    The imitation weight of the stage is ignored. The optimizer's state at the start of a run is
    made by theta without noise, unless theta holds the start itself: each of the pair then begins
    with its own.
    """
    if not 0 < sigma < float("inf"):
        raise UserError(f"sigma={sigma} perturbs nothing: use a positive number, such as 0.01.")

    def init(keys, theta, stage):
        def one(key):
            state = unroll.first(inner, key, theta, stage)
            return PesState(_twice(state), jax.tree.map(jnp.zeros_like, theta))

        return jax.vmap(one)(keys)

    def one_problem(theta, state, data, stage):
        pair = _renew(state.pair if persistent else _twice(_positive(state.pair)), theta, stage)
        run = _positive(pair)
        key = jax.random.fold_in(jax.random.fold_in(run.key, unroll.NOISE), run.step)
        epsilon = jax.tree.map(lambda e: sigma * e, noise(key, theta))
        forget = (run.step == 0) | (not persistent)
        xi = jax.tree.map(lambda x, e: jnp.where(forget, 0, x) + e, state.xi, epsilon)

        def side(xs):
            sign, state = xs
            # Same run key on both sides: common random numbers.
            perturbed = jax.tree.map(lambda t, e: t + sign.astype(t.dtype) * e, theta, epsilon)
            run = unroll.begun(inner, perturbed, state)
            return window(inner, objective, perturbed, run, data)

        pair, values, metrics = over_problems(side, (jnp.asarray([1.0, -1.0]), pair))
        slope = (values[0] - values[1]) / (2 * sigma**2)
        gradient = jax.tree.map(lambda x: slope.astype(x.dtype) * x, xi)
        means = {name: jnp.mean(x) for name, x in metrics.items()}
        return gradient, PesState(pair, xi), means | {"lowest": jnp.min(metrics["lowest"])}

    def _renew(pair, theta, stage):
        alive = base.finite(pair.params)
        # Where one of the pair is not finite, both are put at their end, and so renewed together.
        pair = pair._replace(step=jnp.where(alive, pair.step, pair.num_steps))
        return over_problems(lambda run: unroll.renew(inner, run, theta, stage), pair)

    def estimate(theta, state, data, stage):
        return over_problems(lambda s: one_problem(theta, s, data, stage), state)

    return base.MetaGradient(init, estimate)


def _twice(run):
    return jax.tree.map(lambda x: jnp.stack([x, x]), run)


def _positive(pair):
    return jax.tree.map(lambda x: x[0], pair)
