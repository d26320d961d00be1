"""How long runs are, when that changes, and what stages keep, against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base, unroll
from l2l.estimators.objective import Objective
from l2l.training import curriculum

PLAIN = curriculum.Imitation()


def slope(split_counts: float = 0.0) -> base.TaskFamily:
    """½ x² from x = 1, and on validation batches so much more."""
    return base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jnp.ones(()),
        batch=lambda key, problem, data, split: split_counts * (split == "validation"),
        loss=lambda x, problem, batch: 0.5 * x**2 + batch,
    )


SGD = base.lift(lambda key: jnp.float32(0.1), optax.sgd)


def test_a_stage_ends_after_so_many_validations_without_a_gain():
    """Back to the best theta, here the number of its validation. A gain begins the count anew, a
    loss of NaN is none, and the last stage has no end."""
    plan = curriculum.stages(steps=100, imitation=PLAIN, horizons=(4, 8, 16), patience=2)
    memory, path = plan.start(np.float32(-1)), []
    losses = (3.0, 4.0, 2.0, 2.5, math.nan, 9.0, 9.5, 9.5, 1.0, 2.0, 2.0, 2.0)
    for i, loss in enumerate(losses):
        memory, theta, sentence = plan.judge(memory, np.float32(i), loss)
        path.append((plan.stage(memory, i)[0].longest, float(theta)))
        assert (sentence is not None) == (i in (4, 7))
    assert path == [
        *((4, 0), (4, 1), (4, 2), (4, 3)),
        *((8, 2), (8, 5), (8, 6)),
        *((16, 5), (16, 8), (16, 9), (16, 10), (16, 11)),
    ]
    assert plan.finish(memory, np.float32(11)) == 8
    # Validated on the horizon that comes next, where there is one.
    horizons = [plan.test(memory._replace(index=np.int32(i))) for i in range(3)]
    assert horizons == [8, 16, 16]


def test_before_the_first_validation_the_last_theta_is_kept():
    plan = curriculum.stages(steps=9, imitation=PLAIN)
    assert plan.finish(plan.start(np.float32(0)), np.float32(7)) == 7


def test_horizons_grow_geometrically_and_imitation_fades_linearly():
    imitation = curriculum.Imitation(weight=2.0, until=0.4, final=0.5)
    plan = curriculum.log_uniform(
        steps=100, imitation=imitation, shortest=10, start=10, longest=1000, growth=0.5
    )
    for step, longest, weight in (
        (0, 10, 2.0),
        (20, 10 * 100**0.4, 1.25),
        (25, 100, 2 - 1.5 * 0.25 / 0.4),
        (40, 10 * 100**0.8, 0.5),
        (50, 1000, 0.5),
        (99, 1000, 0.5),
    ):
        stage, _ = plan.stage((), step)
        assert stage == pytest.approx((10, longest, weight))


@pytest.mark.parametrize("form", ["plain", "log"])
def test_validation_is_of_the_last_tenth_on_other_batches(form):
    # SGD at rate α on ½ x²: x_t = (1 − α)ᵗ. Of 20 steps the last two count, after each of them.
    run = curriculum.validation(slope(3.0), SGD, 2, 20, Objective(form=form))
    losses = 3 + 0.5 * 0.9 ** (2 * np.array([19.0, 20.0]))
    wanted = np.mean(np.log(losses) if form == "log" else losses)
    np.testing.assert_allclose(run(jnp.float32(0.1), jax.random.key(0), ()), wanted, rtol=1e-6)


def windows(make, shortest, longest, count=4000):
    """How many windows of four steps each of `count` runs has."""
    inner = unroll.Inner(slope(), SGD, 4)
    stage = base.Stage(jnp.float32(shortest), jnp.float32(longest), jnp.float32(0))
    keys = jax.random.split(jax.random.key(0), count)
    runs = jax.jit(jax.vmap(lambda key: make(inner, key, jnp.float32(0.1), stage).num_steps))
    return np.asarray(runs(keys)) / 4


def test_horizons_are_log_uniform_to_the_nearest_window():
    # One window below 6 steps, two below 10, three below 14, four up to 16.
    drawn = windows(unroll.fresh, 4, 16)
    shares = np.diff(np.log([4, 6, 10, 14, 16])) / math.log(4)
    found = [np.mean(drawn == n) for n in (1, 2, 3, 4)]
    np.testing.assert_allclose(found, shares, atol=4 * math.sqrt(0.25 / 4000))


def test_first_runs_are_cut_anywhere_whatever_their_horizon():
    """To one window or more of those that they have, each as often."""
    for shortest in (16, 4):
        whole, cut = (windows(make, shortest, 16) for make in (unroll.fresh, unroll.first))
        own = cut[whole == 4]
        found = [np.mean(own == n) for n in (1, 2, 3, 4)]
        np.testing.assert_allclose(found, [0.25] * 4, atol=4 * math.sqrt(0.25 * 0.75 / len(own)))
        assert (cut <= whole).all()


def test_a_run_that_is_over_or_lost_gives_way_to_the_next_of_its_slot():
    inner, theta = unroll.Inner(slope(), SGD, 4), jnp.float32(0.1)
    stage = base.Stage(jnp.float32(8), jnp.float32(8), jnp.float32(0))
    run = unroll.fresh(inner, jax.random.key(3), theta, stage)
    middle = run._replace(step=jnp.int32(4), params=jnp.float32(0.5))
    following = jax.random.fold_in(run.key, unroll.NEXT)
    for before, key, step in (
        (middle, run.key, 4),
        (middle._replace(step=jnp.int32(8)), following, 0),
        (middle._replace(params=jnp.float32(jnp.nan)), following, 0),
    ):
        after = unroll.renew(inner, before, theta, stage)
        assert after.key == key and after.step == step


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
