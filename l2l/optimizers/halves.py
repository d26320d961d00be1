"""Whether a rule treats coordinates alike: all of them at once, and in two halves.

On a CPU coordinates go through a rule in blocks. One that takes a mean over them, say, is another
optimizer there than on a GPU, and another as soon as a model has more than a block of parameters.
"""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from l2l.console.errors import UserError
from l2l.core import base

COUNT = 8
# So that what is taken over all coordinates is far from what is taken over either half.
SCALES = np.repeat([1.0, 100.0], COUNT // 2)
# Of each number, and its square of the largest: products of other widths round differently.
TOLERANCE = 1e-3


def check(init, rule: base.Rule) -> None:
    """UserError where a user's rule gives other numbers for half of the coordinates than for all.

    The rules of l2l are left to its tests: on 2 busy cores this takes 0.4 seconds for a network of
    two layers and 0.6 for two LSTMs, nearly all of it compiling.
    """
    both = ("observe", "propose")
    if all(str(getattr(rule, name).__module__).partition(".")[0] == "l2l" for name in both):
        return
    if isinstance(jnp.zeros(()) + 0, jax.core.Tracer):
        return  # Built inside `jax.jit`, where no number is known.
    try:
        found = _compared(init, rule)
    except Exception:  # What does not work at all says so where it is used, with its traceback.
        return
    for name, (whole, parts) in zip(both, found, strict=True):
        if not _alike(whole, parts):
            raise UserError(
                f"`{name}` of this rule gives other numbers for half of the coordinates than for "
                "all of them, and on a CPU they go through it in blocks: make the numbers of each "
                "depend on that coordinate alone, take those of whole tensors from "
                "`Rule.tensors`, or write the optimizer with l2l.lift."
            )


def _compared(init, rule):
    """((whole, in halves) of `observe`, the same of `propose`): what they return for random
    arguments, state included."""
    rng = np.random.default_rng(0)

    def like(x, scales: Any = 1.0):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        return jnp.asarray(rng.uniform(0.1, 0.5, x.shape) * scales, x.dtype)

    def compared(theta, gradient, params):
        step = jnp.int32(1)
        kept = (rule.accumulators({"x": params}, params.dtype), rule.hidden(theta, COUNT))
        accumulators, hidden = jax.tree.map(lambda x: like(x, SCALES), kept)

        def observe(gradient, accumulators, params):
            return rule.observe(gradient, accumulators, params, step)

        def propose(rows, hidden):
            context = rule.context(step, jnp.int32(10)).astype(params.dtype)
            return rule.propose(theta, rows, context, hidden)

        seen = _both_ways(observe, gradient, accumulators, params)
        if rule.matrices is not None or rule.tensors is not None:
            return seen, ((), ())  # `propose` reads more than what `observe` returns.
        return seen, _both_ways(propose, seen[0][0], hidden)

    theta = jax.tree.map(like, jax.eval_shape(init, jax.random.key(0)))
    gradient, params = (rng.normal(size=COUNT) * SCALES for _ in range(2))
    # It runs once: to compile fast code would take longer than to run slow code.
    quick = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    program = jax.jit(compared, compiler_options=quick)
    return jax.device_get(program(theta, *map(np.float32, (gradient, params))))


def _both_ways(function, *arrays):
    """function(*arrays), and the same from one half of the coordinates and from the other."""
    half = COUNT // 2
    parts = [
        function(*jax.tree.map(lambda x, cut=cut: x[..., cut], arrays))
        for cut in (slice(half), slice(half, COUNT))
    ]
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y], -1), *parts)
    return function(*arrays), joined


def _alike(whole, parts) -> bool:
    def close(x, y):
        x, y = (np.asarray(z, np.float64) for z in (x, y))
        largest = np.max(np.abs(x[np.isfinite(x)]), initial=0.0)
        return x.shape == y.shape and np.allclose(
            x, y, TOLERANCE, TOLERANCE**2 * largest, equal_nan=True
        )

    return jax.tree.all(jax.tree.map(close, whole, parts))
