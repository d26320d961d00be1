"""What the wrappers change, and what they must leave alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2l import tasks

MLP = tasks.mlp(hidden=(6,), batch_size=16)


def begin(family, seed=0):
    @jax.jit  # One compilation for dozens of small ones.
    def start(key):
        problem = family.sample(key)
        return problem, family.init(key, problem)

    return *start(jax.random.key(seed)), family.data()


def first_batch(family, problem, data):
    make = jax.jit(lambda key, problem, data: family.batch(key, problem, data, "train"))
    return make(jax.random.key(1), problem, data)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("per", ["coordinate", "tensor"])
def test_rescaled_gradient_is_c_times_the_original(per):
    # d f(c θ̃) / d θ̃ = c f'(c θ̃), at θ̃ = θ / c.
    family = tasks.rescale(MLP, per=per, magnitude=2.0)
    problem, stored, data = begin(family)
    original = MLP.init(jax.random.key(0), problem.problem)
    batch = first_batch(family, problem, data)
    value, gradient = jax.jit(jax.value_and_grad(family.loss))(stored, problem, batch)
    expected, clean = jax.jit(jax.value_and_grad(MLP.loss))(original, problem.problem, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    score = family.accuracy(stored, problem, batch)
    assert score == MLP.accuracy(original, problem.problem, batch)
    for got, c, g in zip(leaves(gradient), leaves(problem.drawn), leaves(clean), strict=True):
        assert c.shape == (g.shape if per == "coordinate" else ())
        np.testing.assert_allclose(got, c * g, rtol=1e-3, atol=1e-6)


def test_scales_are_log_uniform_and_as_frequent_as_asked():
    family = tasks.rescale(MLP, per="tensor", magnitude=2.0, probability=0.25)
    problems = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 2000))
    log_c = np.log(np.stack(leaves(problems.drawn)))
    changed = (log_c != 0).all(0)
    assert (changed == (log_c != 0).any(0)).all()  # All tensors of a problem, or none.
    np.testing.assert_allclose(changed.mean(), 0.25, atol=0.03)
    # U(−2, 2) has the variance 4/3.
    np.testing.assert_allclose(log_c[:, changed].var(), 4 / 3, rtol=0.1)
    assert np.abs(log_c).max() <= 2.00001


def test_no_magnitude_no_change():
    family = tasks.rescale(MLP, magnitude=0.0)
    problem, stored, _ = begin(family)
    original = MLP.init(jax.random.key(0), problem.problem)
    for a, b in zip(leaves(stored), leaves(original), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_convex_adds_the_mean_square():
    family = tasks.convex(MLP, dimension=5)
    problem, params, data = begin(family)
    batch = first_batch(family, problem, data)
    alone = MLP.loss(params["task"], problem.problem, batch)
    extra = np.mean((np.asarray(params["convex"]) - np.asarray(problem.drawn)) ** 2)
    value, gradient = jax.jit(jax.value_and_grad(family.loss))(params, problem, batch)
    np.testing.assert_allclose(value, alone + extra, rtol=1e-5)
    expected = 2 / 5 * (params["convex"] - problem.drawn)
    np.testing.assert_allclose(gradient["convex"], expected, rtol=1e-5)
    assert np.abs(problem.drawn).max() < 1 and np.abs(params["convex"]).max() < 1
    score = family.accuracy(params, problem, batch)
    assert score == MLP.accuracy(params["task"], problem.problem, batch)


def test_noise_keeps_the_loss_and_is_unbiased_in_the_gradient():
    family = tasks.noise(MLP, scale=0.1)
    problem, params, data = begin(family)
    batch = first_batch(family, problem, data)
    value, clean = jax.jit(jax.value_and_grad(MLP.loss))(params, problem.problem, batch.batch)

    def noisy(key):
        return jax.value_and_grad(family.loss)(params, problem, batch._replace(key=key))

    values, gradients = jax.jit(jax.vmap(noisy))(jax.random.split(jax.random.key(2), 2000))
    np.testing.assert_allclose(values, value, rtol=1e-6)
    errors = np.concatenate(
        [(g - c).reshape(2000, -1) for g, c in zip(leaves(gradients), leaves(clean), strict=True)],
        axis=1,
    )
    np.testing.assert_allclose(errors.std(), 0.1, rtol=0.01)
    # The mean of 2,000 has the deviation 0.1/√2000; over all coordinates it must look like that.
    np.testing.assert_allclose(errors.mean(0).std(), 0.1 / np.sqrt(2000), rtol=0.2)
    correlations = np.corrcoef(errors[:, :50].T) - np.eye(50)
    assert np.abs(correlations).max() < 0.15  # Independent by coordinate and by tensor.


@pytest.mark.parametrize("key, split", [(None, "train"), (3, "validation"), (None, "test")])
def test_noise_is_for_training_batches_alone(key, split):
    family = tasks.noise(MLP, scale=0.1)
    problem, params, data = begin(family)
    key = key and jax.random.key(key)
    batch = family.batch(key, problem, data, split)
    assert batch.key is None
    got, clean = (
        jax.jit(jax.grad(f.loss))(params, p, b)
        for f, p, b in ((family, problem, batch), (MLP, problem.problem, batch.batch))
    )
    for a, b in zip(leaves(got), leaves(clean), strict=True):
        np.testing.assert_array_equal(a, b)


def test_noise_scale_is_drawn_from_its_range():
    family = tasks.noise(MLP, scale=(0.01, 1.0))
    problems = jax.jit(jax.vmap(family.sample))(jax.random.split(jax.random.key(0), 1000))
    np.testing.assert_allclose(np.median(problems.drawn), 0.1, rtol=0.15)
    assert problems.drawn.min() >= 0.0099 and problems.drawn.max() <= 1.0001


def test_wrappers_compose():
    both = tasks.rescale(tasks.rescale(MLP, per="tensor", magnitude=1.5), magnitude=1.0)
    problem, stored, _ = begin(both)
    original = MLP.init(jax.random.key(0), problem.problem.problem)
    scales = zip(leaves(stored), leaves(problem.drawn), leaves(problem.problem.drawn), strict=True)
    for (p, c, d), q in zip(scales, leaves(original), strict=True):
        np.testing.assert_allclose(p * c * d, q, rtol=1e-5)
    family = tasks.convex(tasks.noise(both))
    assert family.name == "mlp-digits-6+rescale-tensor+rescale-coordinate+noise+convex"
    assert family.accuracy is not None and family.data is MLP.data


def test_families_without_a_score_stay_so():
    family = tasks.quadratic(dimension=2, batch_size=2)
    for wrapped in (tasks.rescale(family), tasks.convex(family), tasks.noise(family)):
        assert wrapped.accuracy is None
        problem, params, data = begin(wrapped)
        assert jnp.isfinite(
            wrapped.loss(params, problem, wrapped.batch(None, problem, data, "test"))
        )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tasks.rescale(MLP, per="coordinates"), "did you mean 'coordinate'"),
        (lambda: tasks.rescale(MLP, magnitude=-1.0), "magnitude=-1.0"),
        (lambda: tasks.rescale(MLP, probability=2.0), "probability=2.0"),
        (lambda: tasks.convex(MLP, dimension=0), "dimension=0"),
        (lambda: tasks.noise(MLP, scale=0.0), "scale=\\(0.0, 0.0\\)"),
    ],
)
def test_bad_settings_get_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
