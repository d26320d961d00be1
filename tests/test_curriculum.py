"""Stages of horizons: what they keep, and what they are validated by."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base
from l2l.estimators.objective import Objective
from l2l.training import curriculum


def judged(losses):
    """The theta that is kept of stages of 4, 8 and 16 steps, whose thetas 0, 1, … have these
    validation losses; and the stage of each."""
    plan = curriculum.stages(
        steps=100, imitation=curriculum.Imitation(), horizons=(4, 8, 16), patience=1
    )
    memory, stages = plan.start(np.float32(-1)), []
    for theta, loss in enumerate(losses):
        stages.append(int(memory.index))
        memory, *_ = plan.judge(memory, np.float32(theta), loss)
    return int(plan.finish(memory, np.float32(len(losses)))), stages


@pytest.mark.parametrize(
    "losses, kept, stages",
    [
        # The last stage has the horizon of the one before it, so that its best still counts.
        ([5.0, 6.0, 2.0, 3.0, 2.5], 2, [0, 0, 1, 1, 2]),
        ([5.0, 6.0, 2.0, 3.0, 2.5, 1.5], 5, [0, 0, 1, 1, 2, 2]),
        # On the longer horizon of the second stage losses are others.
        ([1.0, 6.0, 2.0, 3.0], 2, [0, 0, 1, 1]),
        ([1.0, 6.0, float("nan"), 3.0], 3, [0, 0, 1, 2]),
    ],
)
def test_a_theta_that_was_worse_on_the_same_horizon_is_not_kept(losses, kept, stages):
    assert judged(losses) == (kept, stages)


@pytest.mark.parametrize(
    "form, expected",
    [
        ("log", np.log([0.5 + 2.0, 0.5 + 3.0])),
        ("plain", [2.0, 3.0]),
        ("last", [2.0, 3.0]),
    ],
)
def test_a_validation_has_the_floor_and_the_cap_of_the_meta_loss(form, expected):
    """Problems whose loss is always 2 or 1e6, which counts as 3."""

    def validated(level):
        family = base.TaskFamily(
            sample=lambda key: (),
            init=lambda key, problem: {"x": jnp.zeros(2)},
            batch=lambda key, problem, data, split: jnp.zeros(()),
            loss=lambda params, problem, batch: level + 0.0 * jnp.sum(params["x"]),
        )
        objective = Objective(form=form, floor=0.5, cap=3.0, emphasis=2.0)
        run = curriculum.validation(family, base.fixed(optax.sgd(0.1)), 2, 20, objective)
        return float(run((), jax.random.key(0), ()))

    np.testing.assert_allclose([validated(2.0), validated(1e6)], expected, rtol=1e-6)
