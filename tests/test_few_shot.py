"""Few-shot problems: what their support and query are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

import l2l
from l2l.tasks import few_shot
from l2l.tasks.few_shot import by_class, distorted
from l2l.tasks.sinusoid import sinusoid


def test_a_quarter_turn_and_a_shift_are_those_of_numpy():
    image = np.random.default_rng(0).uniform(size=(8, 8)).astype(np.float32)
    turned = distorted(jnp.asarray(image), jnp.float32(np.pi / 2), jnp.zeros(2))
    np.testing.assert_allclose(turned, np.rot90(image, -1), atol=1e-5)
    moved = distorted(jnp.asarray(image), jnp.float32(0), jnp.array([1.0, -2.0]))
    np.testing.assert_allclose(moved, scipy.ndimage.shift(image, (1, -2), order=1), atol=1e-5)


def test_support_and_query_are_other_images_of_the_same_classes():
    family = few_shot(ways=3, shots=2, queries=4, rotation=0.0, shift=0.0)
    data, problem = family.data(), family.sample(jax.random.key(0))
    support, again = (family.batch(k, problem, data, "train") for k in (jax.random.key(1), None))
    np.testing.assert_array_equal(support.inputs, again.inputs)  # Every batch is the whole.
    np.testing.assert_array_equal(support.labels, [0, 0, 1, 1, 2, 2])
    for split, number, count in (("train", 0, 2), ("validation", 1, 4), ("test", 2, 4)):
        inputs = family.batch(None, problem, data, split).inputs.reshape(3, count, -1)
        for own, label in zip(inputs, problem.classes, strict=True):
            known = data[number][label].reshape(-1, 64)
            found = [(known == x).all(1).any() for x in np.asarray(own)]
            assert all(found) and len(np.unique(own, axis=0)) == count, split


def test_classes_differ_and_are_turned_and_shifted_each_by_itself():
    family = few_shot(ways=5, rotation=90.0, shift=2.0)
    problems = jax.vmap(family.sample)(jax.random.split(jax.random.key(0), 400))
    assert all(len(set(classes)) == 5 for classes in np.asarray(problems.classes).tolist())
    np.testing.assert_allclose(np.bincount(np.ravel(problems.classes)) / 2000, 0.1, atol=0.02)
    for drawn, most in ((problems.angle, np.pi / 2), (problems.shift, 2.0)):
        numbers = np.asarray(drawn).reshape(400, -1)
        # Uniform in ± most, which has the deviation most/√3, and independent of one another.
        assert np.abs(numbers).max() <= most
        np.testing.assert_allclose(numbers.mean(), 0, atol=0.05 * most)
        np.testing.assert_allclose(numbers.std(), most / 3**0.5, rtol=0.05)
        correlations = np.corrcoef(numbers.T) - np.eye(numbers.shape[1])
        assert np.abs(correlations).max() < 0.2


@pytest.mark.parametrize("setting, split", [("shots", "train"), ("queries", "validation")])
def test_more_images_than_there_are_is_one_sentence(setting, split):
    data = by_class("digits")
    most = {"train": data[0].shape[1], "validation": data[1].shape[1]}[split]
    for count in (most, most + 1):
        family = few_shot(**{setting: count})
        problem = family.sample(jax.random.key(0))
        if count == most:
            assert len(family.batch(None, problem, data, split).labels) == 5 * most
            continue
        with pytest.raises(l2l.UserError, match=f"{setting}={count} is more.* has {most} images"):
            family.batch(None, problem, data, split)


def test_classes_have_as_many_rows_as_the_rarest():
    parts = by_class("digits")
    assert [p.shape[0] for p in parts] == [10] * 3 and parts[0].shape[1] >= 100
    assert all(p.min() >= 0 and p.max() == 1 for p in parts)


def test_points_of_a_sinusoid_lie_on_it_and_stay():
    family = sinusoid(shots=7, queries=4)
    problem = family.sample(jax.random.key(0))
    for split, count in (("train", 7), ("validation", 4), ("test", 100)):
        one, two = (family.batch(k, problem, (), split) for k in (jax.random.key(5), None))
        np.testing.assert_array_equal(one.inputs, two.inputs)
        assert one.inputs.shape == (count, 1) and np.abs(one.inputs).max() <= 5
        wave = problem.amplitude * np.sin(np.asarray(one.inputs)[:, 0] + problem.phase)
        np.testing.assert_allclose(one.labels, wave, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"ways": 11}, "ways=11 does not fit the 10 classes"),
        ({"ways": 1}, "ways=1 does not fit the 10 classes .* use 2 to 10"),
        ({"shots": 0}, "shots=0"),
        ({"rotation": -10.0}, "rotation=-10.0 is not how far"),
        ({"shift": -1.0}, "shift=-1.0 is not how far"),
        ({"dataset": "diabetes"}, "not a set of grey images"),
    ],
)
def test_a_mistake_is_one_sentence(settings, sentence):
    with pytest.raises(l2l.UserError, match=sentence):
        few_shot(**settings)
