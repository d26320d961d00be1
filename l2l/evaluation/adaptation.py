"""How far a few steps from a start get: query losses of new problems after 0, 1, … inner steps.

The start that theta holds is measured beside two others: parameters drawn anew for each problem,
and those of one network pretrained on many problems at once. Inner steps see the training split of
a problem, its support; what is measured is the loss over its test split, which no start has seen.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from l2l.core import base, unroll
from l2l.evaluation import curves, statistics
from l2l.evaluation.curves import Problems

# On the updates of the inner optimizer, for the starts that it was not learned with.
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


class Adapted(NamedTuple):
    """The results of adaptation from one start, as NumPy arrays: n problems, c numbers of steps.

    factor:   on the optimizer's updates.
    steps:    [c], 0 the first of them.
    loss:     [n, c], the query loss after so many steps.
    accuracy: [n, c], or None where the family has no accuracy.
    outputs:  what the family's `outputs` gives on the query, [n, c, ...], or None.
    """

    factor: float
    steps: Any
    loss: Any
    accuracy: Any
    outputs: Any


def adapt(
    optimizer: base.LearnedOptimizer,
    theta,
    start,
    task: tuple[base.TaskFamily, Any],
    problems: Problems,
    steps: Sequence[int],
    *,
    factors: Sequence[float] = (1.0,),
) -> Adapted:
    """Trains new problems of a family from one start, with the optimizer that theta holds.

    Args:
      start: Params; or None for those that the family draws for each problem.
      task: (the family, what its `data()` returned).
      steps: after which to measure; 0 is added.
      factors: on the updates; the one with the lowest mean loss after the last step is kept.
    """
    family, data = task
    marks = sorted({0, *steps})

    def one(theta, start, data, key, factor):
        transform = optax.chain(optimizer.bind(theta), optax.scale(factor))
        run = curves.beginning(family, key)
        run = run if start is None else run._replace(params=start)
        state, seen = curves.opened(transform, run, marks[-1]), []
        training = unroll.trained_on(family, optimizer, theta)
        for before, mark in zip([0, *marks], marks, strict=False):
            state, _ = unroll.unroll(state, data, training, transform, mark - before)
            batch = family.batch(None, state.problem, data, "test")
            measures = (family.loss, family.accuracy, family.outputs)
            seen.append([f and f(state.params, state.problem, batch) for f in measures])
        return [None if x[0] is None else jnp.stack(x) for x in zip(*seen, strict=True)]

    @jax.jit
    def run(theta, start, data, key, factors):
        keys = problems._replace(key=key).keys()
        each = jax.vmap(one, (None, None, None, None, 0))
        return jax.lax.map(lambda key: each(theta, start, data, key, factors), keys)

    found = jax.device_get(run(theta, start, data, problems.key, jnp.asarray(factors)))
    best = int(np.argmin(statistics.or_infinite(found[0][..., -1]).mean(0)))
    own = [None if x is None else x[:, best] for x in found]
    return Adapted(float(factors[best]), np.asarray(marks), *own)


def pretrain(
    family: base.TaskFamily,
    data,
    key: jax.Array,
    *,
    steps: int,
    num_problems: int,
    learning_rate: float = 1e-3,
):
    """The Params of one network trained on all problems at once, as a start to compare with.

    Each of `steps` steps of Adam with cosine decay goes down the mean loss of `num_problems` new
    problems, on a training and a validation batch of each. Meta-training with the same two numbers
    sees as many problems, where its runs are one window.
    """
    adam = optax.adam(optax.cosine_decay_schedule(learning_rate, steps))

    def loss(params, key, data):
        def one(i):
            own = jax.random.split(jax.random.fold_in(key, i), 3)
            problem = family.sample(own[0])
            batches = zip(own[1:], ("train", "validation"), strict=True)
            return [
                family.loss(params, problem, family.batch(key, problem, data, split))
                for key, split in batches
            ]

        return jnp.mean(jnp.stack(jax.vmap(one)(jnp.arange(num_problems))))

    @jax.jit
    def run(key, data):
        params = curves.beginning(family, key).params

        def step(state, i):
            params, opt_state = state
            gradient = jax.grad(loss)(params, jax.random.fold_in(key, i), data)
            updates, opt_state = adam.update(gradient, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, adam.init(params)), jnp.arange(steps))[0][0]

    return run(key, data)


def rows(found: dict[str, Adapted]) -> list[dict]:
    """A row for each start: its name, its factor, the mean query loss after each number of steps
    with its standard error; and the mean accuracy."""
    out = []
    for name, adapted in found.items():
        row: dict[str, Any] = {"start": name, "updates": f"× {adapted.factor:g}"}
        for i, step in enumerate(adapted.steps):
            losses = statistics.or_infinite(adapted.loss[:, i])
            mean, error = losses.mean(), statistics.standard_error(losses)
            row[_after(step)] = f"{mean:.3g} ± {error:.1g}" if np.isfinite(mean) else "inf"
        if adapted.accuracy is not None:
            for i, step in enumerate(adapted.steps):
                row[f"accuracy {_after(step)}"] = f"{adapted.accuracy[:, i].mean():.3f}"
        out.append(row)
    return out


def _after(step) -> str:
    return f"after {step} step{'s' if step != 1 else ''}"
