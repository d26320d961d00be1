"""Several estimators at once: of one family, or each of its own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core import base


def mixture(
    estimators: Sequence[base.MetaGradient],
    weights: Sequence[float] | None = None,
    *,
    reads: Sequence[int] | None = None,
) -> base.MetaGradient:
    """Σⱼ wⱼ ĝⱼ / Σⱼ wⱼ, each ĝⱼ over as many problems as there are keys.

    With m estimators and `num_problems` = n a meta-step trains m · n problems: estimator j has n
    problems of its own, drawn from fold_in(key i, j), so that any number of devices that divides n
    will do, as without a mixture. The state is a tuple of the estimators' states, leaves [n, ...].

    Args:
      estimators: m of them, over one theta.
      weights: w, positive; equal by default. Gradients of estimator j come multiplied by
        m wⱼ / Σ w, so that the plain mean over all m · n of them is the weighted one. They are
        clipped afterwards (`meta_step.Meta`), which bounds the final weight of a problem.
      reads: `data` is a tuple, and estimator j reads data[reads[j]]. By default it is the j-th;
        families on the same data set share an entry, and it is stored once.

    Metrics that all estimators give are joined, [m · n] in order; "name/j" [n] is estimator j's.
    """
    estimators = tuple(estimators)
    count = len(estimators)
    if not count:
        raise UserError("A mixture of no estimators has no gradient: name at least one.")
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count or not all(0 < w < float("inf") for w in weights):
        raise UserError(
            f"weights={weights} do not fit {count} estimators: give one positive number for each."
        )
    reads = list(range(count)) if reads is None else list(reads)
    if len(reads) != count:
        raise UserError(f"reads={reads} does not fit {count} estimators: give one index for each.")
    scales = [count * w / sum(weights) for w in weights]

    def init(keys, theta, stage):
        def own(j):
            return jax.vmap(lambda key: jax.random.fold_in(key, j))(keys)

        return tuple(e.init(own(j), theta, stage) for j, e in enumerate(estimators))

    def estimate(theta, state, data, stage):
        outs = [
            e.estimate(theta, s, data[i], stage)
            for e, s, i in zip(estimators, state, reads, strict=True)
        ]
        gradients, states, metrics = zip(*outs, strict=True)
        scaled = [
            jax.tree.map(lambda g: scale * g, gradient)
            for scale, gradient in zip(scales, gradients, strict=True)
        ]
        joined = jax.tree.map(lambda *g: jnp.concatenate(g), *scaled)
        common = [name for name in metrics[0] if all(name in m for m in metrics)]
        shown = {name: jnp.concatenate([m[name] for m in metrics]) for name in common}
        for j, own in enumerate(metrics):
            shown |= {f"{name}/{j}": value for name, value in own.items()}
        return joined, states, shown

    return base.MetaGradient(init, estimate)
