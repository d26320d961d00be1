"""Several optimizers in one, each for some of the parameters.

`by_parameter` is itself a coordinatewise `Rule`, so that its parts are meta-trained together by the
same engine as any other (L2L's simple-multi and cifar-multi).
"""

import fnmatch
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import coordinates


def by_parameter(
    optimizers: Mapping[str, base.LearnedOptimizer], labels: Sequence[tuple[str, str]]
) -> base.LearnedOptimizer:
    """Gives every parameter to one of several optimizers, by its path.

    All parts see every coordinate and the label picks whose update counts: the cost is that of all
    parts together, which for networks this small buys one loop over all coordinates.

    >>> from l2l.optimizers.adam import adam
    >>> from l2l.optimizers.lstm import lstm
    >>> optimizer = by_parameter({"matrices": lstm(), "rest": adam(1e-3)},
    ...                          [("*/w", "matrices"), ("*", "rest")])

    Args:
      optimizers: by label; each must have a `rule`. Theta is a dict with the same labels.
      labels: (pattern, label) pairs; a parameter takes the label of the first pattern that matches
        its path, such as "layers/0/w": shell-style if it has *, ? or [, else any part of it.
    """
    names = sorted(optimizers)
    labels = tuple((pattern, label) for pattern, label in labels)
    rules = _rules(optimizers, labels)

    def init(key):
        keys = jax.random.split(key, len(names))
        return {name: optimizers[name].init(k) for name, k in zip(names, keys, strict=True)}

    def accumulators(params, dtype):
        rows = [
            jnp.full((jnp.size(leaf),), names.index(_label(path, labels)), jnp.int8)
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        ]
        owner = jnp.concatenate(rows) if rows else jnp.zeros((0,), jnp.int8)
        return owner, {name: rules[name].accumulators(params, dtype) for name in names}

    def context(step, num_steps):
        return jnp.concatenate([rules[name].context(step, num_steps) for name in names])

    def observe(gradient, accumulators, params, step):
        owner, parts = accumulators
        seen = {name: rules[name].observe(gradient, parts[name], params, step) for name in names}
        # `propose` sees rows of features and nothing else: the label travels as one of them.
        rows = [owner[None].astype(gradient.dtype), *(seen[name][0] for name in names)]
        return jnp.concatenate(rows), (owner, {name: seen[name][1] for name in names})

    def hidden(theta, n):
        return {name: rules[name].hidden(theta[name], n) for name in names}

    def propose(theta, rows, context, hidden):
        owner, rows = rows[0], rows[1:]
        updates, after = jnp.zeros_like(owner), {}
        for i, name in enumerate(names):
            rule = rules[name]
            mine, rows = rows[: len(rule.features)], rows[len(rule.features) :]
            size = jax.eval_shape(rule.context, *_CLOCK).shape[0]
            told, context = context[:size], context[size:]
            update, after[name] = rule.propose(theta[name], mine, told, hidden[name])
            updates = jnp.where(owner == i, update, updates)
        return updates, after

    rule = base.Rule(
        accumulators=accumulators,
        context=context,
        observe=observe,
        hidden=hidden,
        propose=propose,
        features=("label", *(f"{name}: {row}" for name in names for row in rules[name].features)),
    )
    return coordinates.optimizer(init, rule)


def _rules(optimizers: Mapping[str, base.LearnedOptimizer], labels) -> dict[str, base.Rule]:
    """The rules of the parts; UserError where labels and optimizers do not fit, or one has none."""
    names = sorted(optimizers)
    if unknown := sorted({label for _, label in labels} - set(names)):
        raise UserError(
            f"No optimizer is labelled {unknown}: label parameters with {', '.join(names)}."
        )
    if idle := sorted(set(names) - {label for _, label in labels}):
        raise UserError(
            f"No pattern gives a parameter to {idle}: add one to labels, or drop the optimizer."
        )
    found = {name: optimizers[name].rule for name in names}
    rules = {
        name: rule
        for name, rule in found.items()
        if isinstance(rule, base.Rule) and not rule.tensors and not rule.matrices
    }
    if lacking := [name for name in names if name not in rules]:
        raise UserError(
            f"Optimizers {lacking} have no coordinatewise rule, so they cannot share parameters: "
            "use adam(...) of l2l.optimizers.adam, or optax.partition of bound optimizers."
        )
    return rules


# What a context is asked for where only its size matters.
_CLOCK = (jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32))


def _label(path, labels) -> str:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, label in labels:
        if any(c in pattern for c in "*?["):
            if fnmatch.fnmatchcase(name, pattern):
                return label
        elif pattern in name:
            return label
    raise UserError(
        f"Parameter {name!r} matches none of the patterns {[pattern for pattern, _ in labels]}: "
        'add one for it, or end the labels with ("*", label) to say who takes the rest.'
    )
