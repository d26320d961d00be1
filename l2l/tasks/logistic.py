"""Logistic regression: `mlp` without hidden layers."""

from l2l.core.base import TaskFamily
from l2l.tasks.mlp import mlp


def logistic(
    *,
    dataset: str = "digits",
    initial_scale: tuple[float, float] = (0.5, 2.0),
    subset: tuple[float, float] = (0.25, 1.0),
    batch_size: int = 128,
    init: str | float = "lecun",
) -> TaskFamily:
    """Multinomial logistic regression, convex in its parameters. Settings as in `mlp`; a data set
    without classes (diabetes) makes it least squares."""
    return mlp(
        dataset=dataset,
        hidden=(),
        activations=("relu",),  # There is nothing to activate.
        initial_scale=initial_scale,
        subset=subset,
        batch_size=batch_size,
        init=init,
        name=f"logistic-{dataset}",
    )
