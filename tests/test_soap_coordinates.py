"""SOAP's direction, as `lstm` observes it, against closed forms, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from l2l.optimizers import coordinates, features
from l2l.optimizers.lstm import lstm
from l2l.optimizers.soap_coordinates import soap_direction

B1, B2, ROOT = 0.9, 0.999, 1e-30
SHAPES = {
    "kernel": (2, 3, 4),
    "matrix": (6, 5),
    "other matrix": (6, 5),
    "row": (1, 7),
    "vector": (9,),
    "wide": (3, 30),
}


def see(gradients, shapes=None, largest=20):
    """Directions [T, P] and features of the tensors [T, S, G] for gradients [T, P]."""
    shapes = tuple((shapes or SHAPES).values())
    rule = soap_direction(largest=largest, decay=B1, second_decay=B2, eps_root=ROOT)
    gradients = jnp.asarray(gradients)
    like = [jnp.zeros(shape, gradients.dtype) for shape in shapes]
    moments = features.zero_moments(1, gradients.shape[1], gradients.dtype)

    def step(carry, xs):
        moments, present = carry
        i, g = xs
        directions, told, present = rule.observe(g, moments, present, i, shapes)
        moments, _ = features.update_moments(g, moments, i, decays=(B1,), second_decay=B2)
        return (moments, present), (directions[0], told)

    start = (moments, rule.accumulators(like, gradients.dtype))
    steps = jnp.arange(len(gradients))
    return jax.jit(lambda: jax.lax.scan(step, start, (steps, gradients))[1])()


def noise(steps=40, shapes=None):
    size = sum(int(np.prod(shape)) for shape in (shapes or SHAPES).values())
    return np.random.default_rng(0).normal(size=(steps, size)).astype(np.float32)


def adam(gradients):
    """m̃/√v̂ after the last gradient: NAdam's direction, in numpy."""
    g = np.asarray(gradients, np.float64)
    t = len(g)
    mu = sum(B1 ** (t - 1 - i) * (1 - B1) * g[i] for i in range(t)) / (1 - B1**t)
    nu = sum(B2 ** (t - 1 - i) * (1 - B2) * g[i] ** 2 for i in range(t)) / (1 - B2**t)
    return (B1 * mu + (1 - B1) * g[-1]) / np.sqrt(nu)


def followed(matrices):
    """The bases of both sides after each of T gradients, [T, d, d]: what the module says of them,
    in numpy. A step of orthogonal iteration on the average of GGᵀ/mean(G²), of which every
    eigenvalue is raised by a part of their mean: 0.3 in the first ten steps, each of which takes
    one, and 0.001 in every tenth step from then on."""
    sides = []
    for side in range(2):
        size, seen = matrices.shape[1 + side], []
        average, vectors = np.zeros((size, size)), np.eye(size)
        for step, g in enumerate(matrices):
            product = g @ g.T if side == 0 else g.T @ g
            average = 0.95 * average + 0.05 * product / np.mean(g**2)
            if step < 10 or step % 10 == 0:
                raised = (0.3 if step < 10 else 1e-3) * np.trace(average) / size
                q, r = np.linalg.qr((average + raised * np.eye(size)) @ vectors)
                vectors = q * np.sign(np.diag(r))
            seen.append(vectors)
        sides.append(np.stack(seen))
    return sides


def test_bases_follow_often_at_first_and_later_seldom():
    matrices = np.random.default_rng(3).normal(size=(32, 4, 3))
    rule = soap_direction(largest=20, decay=B1, second_decay=B2, eps_root=ROOT)
    with jax.enable_x64(True):
        gradients = jnp.asarray(matrices.reshape(32, -1))
        moments = features.zero_moments(1, 12, gradients.dtype)

        def step(present, xs):
            i, g = xs
            present = rule.observe(g, moments, present, i, ((4, 3),))[2]
            return present, [basis.vectors[0] for basis in present.bases[0]]

        start = rule.accumulators([jnp.zeros((4, 3))], gradients.dtype)
        steps = jnp.arange(32)
        found = jax.jit(lambda: jax.lax.scan(step, start, (steps, gradients))[1])()
    for own, expected in zip(found, followed(matrices), strict=True):
        np.testing.assert_allclose(own, expected, atol=1e-8)


@pytest.mark.parametrize("shape", [(5, 5), (6, 4), (2, 2, 6)])
def test_of_one_gradient_forever_it_is_the_polar_factor(shape):
    """In the basis of its singular vectors G = U S Vᵀ is S, and S/√S² is 1: the direction is U Vᵀ,
    which is the step of a spectral descent (as long as Adam's, of ±1 in every coordinate). The
    steps are several times what second moments remember: of the first ones, in no such basis yet.
    """
    matrix = (int(np.prod(shape[:-1])), shape[-1])
    rng = np.random.default_rng(1)
    u, _, v = np.linalg.svd(rng.normal(size=matrix), full_matrices=False)
    g = (u * 4.0 ** -np.arange(len(v))) @ v
    with jax.enable_x64(True):
        directions, told = see(np.repeat(g.reshape(1, -1), 4000, 0), {"g": shape})
    polar = (u @ v).reshape(-1)
    polar *= np.sqrt(polar.size / np.sum(polar**2))
    np.testing.assert_allclose(directions[-1], polar, atol=0.02)
    np.testing.assert_allclose(told[-1, 1, 0], np.mean(polar * np.sign(g.reshape(-1))), atol=0.02)


def test_directions_in_which_there_is_nothing_stay_short():
    """Of a diagonal gradient the basis is the coordinates; second moments count as at least 1e-9 of
    their mean more: here ¼."""
    directions, _ = see(np.array([[1.0, 0.0, 0.0, 1e-5]], np.float32), {"g": (2, 2)})
    first, _, _, last = directions[0]
    np.testing.assert_allclose(last / first, 1e-5 / np.sqrt(1e-10 + 1e-9 / 4), rtol=1e-3)


def test_where_no_side_is_short_enough_it_is_adams():
    directions, told = see(noise(), largest=1)
    np.testing.assert_allclose(directions[-1], adam(noise()), rtol=2e-4, atol=1e-5)
    np.testing.assert_array_equal(told[:, 1], 1)


def test_it_is_as_long_as_adams_tensor_by_tensor():
    directions, told = see(noise())
    start = 0
    for i, shape in enumerate(SHAPES.values()):
        size = int(np.prod(shape))
        ours, theirs = np.asarray(directions[-1]), adam(noise())
        ours, theirs = (x[start : start + size] for x in (ours, theirs))
        start += size
        np.testing.assert_allclose(np.linalg.norm(ours), np.linalg.norm(theirs), rtol=1e-4)
        cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
        np.testing.assert_allclose(told[-1, 1, i], cosine, atol=1e-4)
        vector = len(shape) == 1 or shape[0] == 1
        assert (cosine > 0.9999) == vector  # Or it would be Adam's direction with another name.


def test_a_turned_problem_is_solved_by_turned_steps():
    """Adam has no such symmetry. The length, which is Adam's, is left out of it."""
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (6, 5))
    scales = np.outer(2.0 ** -np.arange(6), 3.0 ** -np.arange(5))
    plain = rng.normal(size=(2000, 6, 5)) * scales
    turned = left @ plain @ right.T
    with jax.enable_x64(True):
        one, other = (
            np.asarray(see(g.reshape(len(g), -1), {"g": (6, 5)})[0][-1]).reshape(6, 5)
            for g in (plain, turned)
        )
    one = left @ one @ right.T
    cosine = np.sum(one * other) / np.linalg.norm(one) / np.linalg.norm(other)
    assert cosine > 0.99
    naive = [adam(g.reshape(len(g), -1)).reshape(6, 5) for g in (plain, turned)]
    naive[0] = left @ naive[0] @ right.T
    assert np.sum(naive[0] * naive[1]) / np.prod([np.linalg.norm(x) for x in naive]) < 0.95


def test_a_loss_times_a_number_looks_the_same():
    one, other = see(noise()), see(2.0**10 * noise())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), one, other)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e15])
def test_it_is_finite_and_bounded(scale):
    gradients = scale * noise()
    gradients[:, ::3] = 0  # Dead pixels, dead units.
    gradients[:5] = 0
    directions, told = see(gradients)
    assert np.all(np.isfinite(told)) and np.max(np.abs(told)) <= 1.001
    sizes = np.sqrt(np.mean(np.square(directions), 1))
    # The first gradient after five of zero: √((1 − 0.999⁶) / 0.001) times as large as its root.
    assert np.max(sizes) < 2.5


def test_derivatives_are_finite_where_eigenvalues_meet():
    """Of the directions by the gradients, which exact meta-gradients take: at zero, at a matrix of
    rank one, and at one whose singular values are all the same."""
    for matrix in (np.zeros((4, 4)), np.ones((4, 4)), np.eye(4)):
        g = jnp.asarray(np.repeat(matrix.reshape(1, -1), 3, 0), jnp.float32)
        shapes = {"g": (4, 4)}
        slope = jax.jit(jax.grad(lambda g, s=shapes: jnp.sum(see(g, s)[0][-1] ** 2)))(g)
        assert np.all(np.isfinite(slope))


def test_untrained_it_goes_along_that_direction():
    learned = lstm(hidden_size=2, matrix_size=20, learning_rate=0.1, anneal=1.0, eps_root=ROOT)
    transform = learned.bind(learned.init(jax.random.key(0)))
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    state, steps = transform.init(params), 8
    update = jax.jit(transform.update)
    for g in noise(steps):
        updates, state = update(coordinates.unflatten(g, params), state, params, num_steps=steps)
    left = (0.5 * (1 + np.cos(np.pi * (steps - 1) / steps)) + 0.01) / 1.01
    expected = -0.1 * left * see(noise(steps))[0][-1]
    np.testing.assert_allclose(
        coordinates.flatten(updates, jnp.float32), expected, rtol=1e-4, atol=1e-7
    )
