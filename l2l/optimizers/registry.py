"""The learned optimizers by name, and one from a section `optimizer` of a configuration.

An export names its optimizer here: whatever file is read, nothing else can be built from it.
"""

from collections.abc import Mapping, Sequence

from l2l.console import schema
from l2l.core import base
from l2l.optimizers import adam, adamw, lstm, per_tensor, published, sgd
from l2l.optimizers.by_parameter import by_parameter


def _by_sections(parts: Mapping, labels: Sequence) -> base.LearnedOptimizer:
    """`by_parameter` of the optimizers that `parts`, {label: section}, describe."""
    return by_parameter({label: optimizer(part) for label, part in parts.items()}, labels)


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


def optimizer(settings: Mapping) -> base.LearnedOptimizer:
    """An optimizer from its section. Only names in `OPTIMIZERS`: exports go through here."""
    return schema.make("optimizer", OPTIMIZERS, settings)
