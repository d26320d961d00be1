"""The estimators of the meta-gradient by name."""

from l2l.estimators import autodiff, first_order, pes, reptile

ESTIMATORS = {
    "first_order": first_order.first_order,
    "pes": pes.pes,
    "reptile": reptile.reptile,
    "truncated": autodiff.truncated,
}
