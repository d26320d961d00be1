"""Mixtures of estimators."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base
from l2l.core.unroll import Inner
from l2l.estimators import autodiff, pes
from l2l.estimators.mixture import mixture
from l2l.estimators.objective import Objective
from l2l.training import meta_step

STAGE = base.Stage(jnp.float32(4), jnp.float32(8), jnp.float32(0))


def squares(size: int) -> base.TaskFamily:
    """Σ (scale x)² from a random start; the scale is the data."""
    return base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: {"x": jax.random.uniform(key, (size,))},
        batch=lambda key, problem, data, split: data,
        loss=lambda params, problem, batch: jnp.sum((batch * params["x"]) ** 2),
    )


def sgd() -> base.LearnedOptimizer:
    return base.lift(
        lambda key: {"log_rate": jnp.log(jnp.float32(0.1))},
        lambda theta: optax.sgd(jnp.exp(theta["log_rate"])),
    )


def components():
    plain = Objective(form="plain")
    return [
        autodiff.truncated(Inner(squares(3), sgd(), 2), plain, order="exact"),
        pes.pes(Inner(squares(5), sgd(), 2), plain),
    ]


def keys_of(num_problems):
    return jax.random.split(jax.random.key(0), num_problems)


def test_weighted_mean_of_the_components():
    """The plain mean over all problems is Σ w ĝ / Σ w, each component on keys of its own."""
    theta, keys, data = sgd().init(None), keys_of(3), (jnp.float32(0.5), jnp.float32(1.5))
    mixed = mixture(components(), weights=[3.0, 1.0])
    state = mixed.init(keys, theta, STAGE)
    gradients, after, metrics = mixed.estimate(theta, state, data, STAGE)
    means = []
    for j, (one, own) in enumerate(zip(components(), data, strict=True)):
        folded = jax.vmap(lambda key: jax.random.fold_in(key, j))(keys)
        alone = one.estimate(theta, one.init(folded, theta, STAGE), own, STAGE)
        means.append(jnp.mean(alone[0]["log_rate"]))
        np.testing.assert_allclose(metrics[f"loss/{j}"], alone[2]["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"][3 * j : 3 * j + 3], metrics[f"loss/{j}"])
    expected = (3 * means[0] + means[1]) / 4
    np.testing.assert_allclose(jnp.mean(gradients["log_rate"]), expected, rtol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(leaf.shape[0] == 3 for leaf in jax.tree.leaves(after))


def test_estimators_on_the_same_data_read_one_entry():
    theta, keys, data = sgd().init(None), keys_of(2), jnp.float32(0.7)
    outs = []
    for reads, given in (((0, 0), (data,)), (None, (data, data))):
        mixed = mixture(components(), reads=reads)
        outs.append(mixed.estimate(theta, mixed.init(keys, theta, STAGE), given, STAGE)[0])
    np.testing.assert_array_equal(outs[0]["log_rate"], outs[1]["log_rate"])


@pytest.mark.parametrize("clip, equal", [(1e-3, True), (float("inf"), False)])
def test_weights_count_only_as_far_as_gradients_are_not_cut(clip, equal):
    """As docs/tutorial/3-your-own-task.md says: each is cut after its weight."""
    data, thetas = (jnp.float32(0.5), jnp.float32(1.5)), []
    for weights in ([1.0, 1.0], [3.0, 1.0]):
        mixed = mixture(components(), weights=weights)
        made = meta_step.Meta(mixed, sgd(), optax.sgd(0.1), num_problems=2, clip=clip)
        state = meta_step.meta_init(jax.random.key(1), made, STAGE)
        thetas.append(meta_step.meta_step(made, state, data)[0].theta["log_rate"])
    assert bool(np.isclose(*thetas, rtol=1e-7, atol=0)) == equal


def test_the_split_over_devices_changes_nothing():
    data, thetas = (jnp.float32(0.5), jnp.float32(1.5)), []
    made = meta_step.Meta(mixture(components()), sgd(), optax.sgd(0.1), num_problems=4, clip=1e3)
    for count in (1, 4):
        if jax.device_count() < count:
            pytest.skip(f"Needs {count} devices.")
        devices = jax.devices()[:count]
        state = meta_step.spread(meta_step.meta_init(jax.random.key(1), made, STAGE), count)
        state, metrics = meta_step.compile_steps(made, 3, devices)(state, data)
        assert metrics["finite"].size == 3 * 2 * 4
        thetas.append(jax.device_get(state.theta)["log_rate"])
    assert thetas[0] != np.log(np.float32(0.1))
    np.testing.assert_allclose(thetas[0], thetas[1], rtol=1e-6)


@pytest.mark.parametrize(
    ("count", "settings", "sentence"),
    [
        (0, {}, "no estimators"),
        (2, {"weights": [1.0]}, "one positive number for each"),
        (2, {"weights": [1.0, 0.0]}, "one positive number for each"),
        (2, {"reads": [0]}, "one index for each"),
    ],
)
def test_mistakes_are_named(count, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        mixture(components()[:count], **settings)
