"""The learned optimizers by name, and one from a section `optimizer` of a configuration.

An export names its optimizer here: whatever file is read, nothing else can be built from it.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from l2l.console import schema
from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import adam, adamw, lstm, per_tensor, published, sgd
from l2l.optimizers.by_parameter import by_parameter


def _by_sections(parts: Mapping, labels: Sequence) -> base.LearnedOptimizer:
    """`by_parameter` of the optimizers that `parts`, {label: section}, describe."""
    if not isinstance(parts, Mapping):
        raise UserError(
            f"parts={parts!r} of 'by_parameter' are no sections by label: write "
            "dict(label=dict(name=…, …), …)."
        )
    pairs = labels if isinstance(labels, list | tuple) else ()
    if not pairs or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise UserError(
            f"labels={labels!r} of 'by_parameter' are no pairs of a pattern and a label: write "
            '(("*/w", label), …, ("*", label)).'
        )
    made = tuple((label, optimizer(parts[label])) for label in sorted(parts))
    found = made, tuple(map(tuple, pairs))
    return _together(*found) if _hashable(found) else by_parameter(dict(made), pairs)


def _hashable(x) -> bool:
    """What a user has registered need not be."""
    try:
        hash(x)
    except TypeError:
        return False
    return True


@functools.lru_cache(maxsize=64)
def _together(parts: tuple[tuple[str, base.LearnedOptimizer], ...], labels: tuple):
    """The same optimizer for the same parts."""
    return by_parameter(dict(parts), labels)


OPTIMIZERS = {
    "adam": adam.adam,
    "by_parameter": _by_sections,
    "dm": published.dm,
    "learned_adam": adam.learned_adam,
    "learned_adamw": adamw.learned_adamw,
    "lstm": lstm.lstm,
    "per_tensor": per_tensor.per_tensor,
    "rnnprop": published.rnnprop,
    "sgd": sgd.sgd,
}


_OWN = MappingProxyType(dict(OPTIMIZERS))


def optimizer(settings: Mapping) -> base.LearnedOptimizer:
    """An optimizer from its section. Only names in `OPTIMIZERS`: exports go through here.

    Equal sections get the same one, whose rule is a key of compiled programs: two loads of an
    export share them. What a user has registered is made anew: only they know what it depends on.
    """
    factory, _ = schema.factory_of("optimizer", OPTIMIZERS, settings)
    if factory is _by_sections or factory is not _OWN.get(settings["name"]):
        return schema.make("optimizer", OPTIMIZERS, settings)
    # Its defaults are written out: what is left out means the same as what is said.
    return _made(json.dumps(schema.complete("optimizer", _OWN, settings), sort_keys=True))


@functools.lru_cache(maxsize=64)
def _made(section: str) -> base.LearnedOptimizer:
    """One of ours, from its whole section as JSON."""
    return schema.make("optimizer", _OWN, schema.plain(json.loads(section)))
