"""SOAP: the paper's algorithm on small cases, and what is ours around it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l2l
from l2l.optimizers import matrices, soap, soap_directions
from l2l.optimizers.orthogonal import cholesky, gram_schmidt, orthonormal


def paper(gradients, b1, b2, eps, frequency):
    """The updates of Algorithm 3 of Vyas et al. (2024) for one matrix, in NumPy and float64, with
    Adam's corrections of the moments' bias; the first bases are the coordinates."""
    m, n = gradients[0].shape
    first, second = np.zeros((m, n)), np.zeros((m, n))
    left, right = np.zeros((m, m)), np.zeros((n, n))
    to_left, to_right = np.eye(m), np.eye(n)
    out = []
    for t, gradient in enumerate(gradients):
        turned = to_left.T @ gradient @ to_right
        first = b1 * first + (1 - b1) * gradient
        second = b2 * second + (1 - b2) * turned**2
        mean = to_left.T @ (first / (1 - b1 ** (t + 1))) @ to_right
        step = mean / (np.sqrt(second / (1 - b2 ** (t + 1))) + eps)
        out.append(to_left @ step @ to_right.T)
        left = b2 * left + (1 - b2) * gradient @ gradient.T
        right = b2 * right + (1 - b2) * gradient.T @ gradient
        if (t + 1) % frequency == 0:
            to_left = np.linalg.qr(left @ to_left)[0]
            to_right = np.linalg.qr(right @ to_right)[0]
    return out


def gradients_like(params, steps, seed=0):
    keys = jax.random.split(jax.random.key(seed), steps)
    return [
        jax.tree.map(
            lambda x, i=i: jax.random.normal(jax.random.fold_in(keys[i], x.size), x.shape, x.dtype),
            params,
        )
        for i in range(steps)
    ]


@functools.cache
def compiled(transform):
    return jax.jit(transform.init), jax.jit(transform.update)


def run(transform, params, gradients):
    init, step = compiled(transform)
    state, out = init(params), []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        out.append(updates)
    return out, state


@pytest.mark.parametrize("frequency", [1, 3])
def test_equals_the_papers_algorithm(frequency):
    with jax.enable_x64(True):
        params = jnp.zeros((5, 4), jnp.float64)
        gradients = gradients_like(params, 12)
        transform = l2l.soap(1.0, b1=0.9, b2=0.95, precondition_frequency=frequency)
        ours, _ = run(transform, params, gradients)
        theirs = paper([np.asarray(g) for g in gradients], 0.9, 0.95, 1e-8, frequency)
        # The damping of 1e-6 that keeps null spaces in place is the whole difference.
        for mine, wanted in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, -wanted, atol=2e-4)


def test_vectors_move_as_with_adam_and_decay_is_adamws():
    params = {"b": jnp.linspace(-1.0, 1.0, 7), "s": jnp.asarray(0.5)}
    gradients = gradients_like(params, 6)
    ours, _ = run(l2l.soap(0.1, b1=0.9, b2=0.99, weight_decay=0.3), params, gradients)
    theirs, _ = run(optax.adamw(0.1, b1=0.9, b2=0.99, weight_decay=0.3), params, gradients)
    for mine, wanted in zip(ours, theirs, strict=True):
        for name in params:
            np.testing.assert_allclose(mine[name], wanted[name], rtol=2e-6)


SHAPES = {
    "blocks of rows": (13, 5),
    "blocks of both sides": (11, 10),
    "a kernel": (3, 2, 4, 6),
    "one output": (7, 1),
    "empty": (0, 4),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_a_block_is_a_matrix_of_its_own(shape):
    """A tensor that is cut moves as its blocks would alone, padding or none."""
    transform = soap.scale_by_soap(soap.PUBLISHED._replace(block_size=4))
    params = jnp.zeros(shape)
    gradients = gradients_like(params, 5)
    (*_, cut), state = run(transform, params, gradients)
    assert cut.shape == shape and jax.tree.leaves(state.nu)[0].shape == shape
    m, n = matrices.matrix_of(shape)
    if min(m, n) <= 1:
        return
    rows, columns = (-(-d // -(-d // 4)) for d in (m, n))
    whole = cut.reshape(m, n)
    for i in range(0, m, rows):
        for j in range(0, n, columns):
            alone = [g.reshape(m, n)[i : i + rows, j : j + columns] for g in gradients]
            (*_, wanted), _ = run(transform, jnp.zeros_like(alone[0]), alone)
            np.testing.assert_allclose(
                whole[i : i + rows, j : j + columns], wanted, rtol=2e-4, atol=2e-5
            )


@pytest.mark.parametrize(
    "settings", [soap.PUBLISHED, soap_directions.Settings()], ids=["published", "grafted"]
)
def test_many_shapes_share_few_batches_and_move_as_alone(settings):
    shapes = tuple((5 + i, 4 + i % 3) for i in range(12))
    plan = matrices.plan(shapes, 256, 8192)
    assert len(plan.batches) <= matrices.LARGEST_NUMBER_OF_BATCHES
    assert sorted(m.leaf for batch in plan.batches for m in batch.members) == list(range(12))
    params = [jnp.zeros(shape) for shape in shapes]
    gradients = gradients_like(params, 4)
    transform = soap.scale_by_soap(settings)
    (*_, together), _ = run(transform, params, gradients)
    for i in (0, 5, 11):
        (*_, alone), _ = run(transform, params[i], [g[i] for g in gradients])
        np.testing.assert_allclose(together[i], alone, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("power", [-30, 30])
def test_bases_do_not_depend_on_the_size_of_gradients(power):
    """Gradients of 1e-9 and 1e9, whose fourth powers are no float32."""
    params = jnp.zeros((6, 4))
    gradients = gradients_like(params, 12)
    scaled = [2.0**power * g for g in gradients]
    ours = soap.scale_by_soap(soap.PUBLISHED._replace(eps=soap.PUBLISHED.eps * 2.0**power))
    found, wanted = (
        run(transform, params, given)[0]
        for transform, given in ((ours, scaled), (soap.scale_by_soap(), gradients))
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_small_matrices_join_larger_ones_and_large_ones_do_not():
    plan = matrices.plan(((64, 32), (32, 10), (200, 200), (200, 10)), 256, 8192)
    assert {b.block: [m.leaf for m in b.members] for b in plan.batches} == {
        (64, 32): [0, 1],
        (200, 200): [2],
        (200, 10): [3],
    }
    (joined,) = (batch for batch in plan.batches if batch.block == (64, 32))
    assert joined.sides == ((64, 32), (32, 10))


def test_tensors_of_one_shape_are_taken_out_at_unknown_places(monkeypatch):
    """On one device: the slices of the compiled update are dynamic, and say the same."""
    params = {"w": [jnp.zeros((6, 5))] * 5, "b": [jnp.zeros(5)] * 4, "k": jnp.zeros((9, 300))}
    gradients = [jax.tree.map(lambda x: x + 1, g) for g in gradients_like(params, 3)]
    leaves = [jax.tree.leaves(g) for g in gradients]
    scaled = [[(1 + i) * x for i, x in enumerate(one)] for one in leaves]
    gradients = [jax.tree.unflatten(jax.tree.structure(params), one) for one in scaled]
    (*_, plain), _ = run(soap.scale_by_soap(soap_directions.Settings()), params, gradients)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    # Equal settings would share what was traced for eight devices; these say the same for 3 steps.
    transform = soap.scale_by_soap(soap_directions.Settings(often=11))
    (*_, ours), _ = run(transform, params, gradients)
    text = jax.jit(transform.update).lower(params, transform.init(params)).as_text()
    assert text.count("stablehlo.dynamic_slice") >= 3 * 9
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)
    assert not np.allclose(ours["w"][0], ours["w"][1])


def test_the_rows_of_an_embedding_have_no_basis():
    plan = matrices.plan(((50_000, 8), (40, 8)), 256, 8192)
    sides = {batch.block: batch.whitened for batch in plan.batches}
    assert sides == {(50_000, 8): (False, True), (40, 8): (True, True)}


@pytest.mark.parametrize("shape", [(6, 5), (5, 6)], ids=str)
def test_turns_of_the_basis_leave_the_first_moment_what_it_is(shape):
    """Kept in a basis that moves every step, m is the average of the gradients all the same."""
    settings = soap_directions.Settings(often=100)
    params = jnp.zeros(shape)
    gradients = gradients_like(params, 9)
    _, state = run(soap.scale_by_soap(settings), params, gradients)
    (pair,) = state.bases
    wanted = jnp.zeros_like(params)
    for gradient in gradients:
        wanted = settings.decays[0] * wanted + (1 - settings.decays[0]) * gradient
    np.testing.assert_allclose(
        soap_directions.out_of(state.mu[0][None], pair)[0], wanted, atol=1e-6
    )
    for side, d in zip(pair, shape, strict=True):
        assert float(jnp.abs(side.vectors[0] - jnp.eye(d)).max()) > 0.1


def test_a_grafted_direction_is_as_long_as_steady_the_gradients_are():
    """|m̃|/√E|g|², whatever the basis: with m̃ = b1·m̂ + (1 − b1)·g."""
    gradients = [1 + g for g in gradients_like(jnp.zeros((6, 5)), 7)]
    updates, _ = run(soap.scale_by_soap(soap_directions.Settings()), gradients[0], gradients)
    m, nu = np.zeros((6, 5)), 0.0
    for t, (g, update) in enumerate(zip(gradients, updates, strict=True), start=1):
        m, nu = 0.9 * m + 0.1 * g, 0.999 * nu + 0.001 * np.mean(g**2)
        ahead = 0.9 * m / (1 - 0.9**t) + 0.1 * g
        wanted = np.sqrt(np.mean(ahead**2) / (nu / (1 - 0.999**t)))
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(update))), wanted, rtol=1e-4)


def test_directions_in_which_there_is_nothing_stay_short():
    """Of a diagonal gradient the basis is the coordinates; second moments count as at least 1e-9 of
    their mean: here ¼."""
    settings = soap_directions.Settings(graft=False, eps=0.0, eps_root=0.0)
    small = np.array([1.0, 1e-4, 1e-5])
    for number in small:
        gradient = jnp.diag(jnp.asarray([1.0, number], jnp.float32))
        (update,), _ = run(soap.scale_by_soap(settings), gradient, [gradient])
        mean = (1 + number**2) / 4
        wanted = number / np.sqrt(number**2 + 1e-9 * mean)
        np.testing.assert_allclose(np.diag(update)[1], wanted, rtol=1e-4)


def test_averages_that_are_made_less_often_remember_as_long():
    """Every third gradient counts as three: with the decay to the third power."""
    settings = soap_directions.Settings(often=2, average_every=3)
    gradients = gradients_like(jnp.zeros((4, 3)), 9)
    _, state = run(soap.scale_by_soap(settings), gradients[0], gradients)
    rows, columns = np.zeros((4, 4)), np.zeros((3, 3))
    for step, g in enumerate(np.asarray(gradients)):
        if step < 2 or step % 3 == 0:
            decay = 0.95 if step < 2 else 0.95**3
            rows = decay * rows + (1 - decay) * g @ g.T / np.mean(g**2)
            columns = decay * columns + (1 - decay) * g.T @ g / np.mean(g**2)
    (pair,) = state.bases
    for side, wanted in zip(pair, (rows, columns), strict=True):
        np.testing.assert_allclose(side.average[0], wanted, rtol=1e-4, atol=1e-5)


def test_the_bases_become_the_eigenvectors():
    settings = soap_directions.Settings(often=10**6, damping=0.0)
    key = jax.random.key(0)
    tall = jax.random.normal(key, (8, 8)) * 0.6 ** jnp.arange(8.0)[None]
    gradients = [tall @ jax.random.normal(jax.random.fold_in(key, i), (8, 5)) for i in range(150)]
    _, state = run(soap.scale_by_soap(settings), gradients[0], gradients)
    rows = state.bases[0][0]
    inside = (rows.vectors @ rows.average @ rows.vectors.mT)[0]
    off = inside - jnp.diag(jnp.diag(inside))
    assert float(jnp.linalg.norm(off)) < 0.02 * float(jnp.linalg.norm(inside))
    np.testing.assert_allclose(
        jnp.sort(jnp.diag(inside)), jnp.linalg.eigvalsh(rows.average[0]), rtol=0.05, atol=1e-3
    )


def turned(d, key):
    return jnp.linalg.qr(jax.random.normal(key, (3, d, d)))[0]


# What the bases are made of: any rows; an average of rank 1 or 5 with the damping of `per_tensor`.
GIVEN = {
    "any": lambda d, key: jax.random.normal(key, (3, d, d)) + 2 * jnp.eye(d)[None],
    "rank 1": lambda d, key: turned(d, key) @ jnp.ones((d, d)) + 0.01 * turned(d, key),
    "rank 5": lambda d, key: (
        turned(d, key) @ (lambda x: x @ x.mT)(jax.random.normal(key, (3, d, 5)))
        + 0.01 * turned(d, key)
    ),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("d, panel", [(1, 64), (7, 3), (70, 64), (130, 32)])
@pytest.mark.parametrize("how", ["by rows", "by Cholesky factors", "as here"])
def test_orthonormal_rows_span_what_they_came_from(how, d, panel, given):
    given = given(d, jax.random.key(d))
    with jax.default_matmul_precision("highest"):
        if how == "by rows":
            rows = jax.jit(gram_schmidt, static_argnums=1)(given, panel)
        else:
            rows = jax.jit(cholesky if how == "by Cholesky factors" else orthonormal)(given)
    eye = jnp.broadcast_to(jnp.eye(d), (3, d, d))
    # Gram–Schmidt loses a digit where rows are all but dependent.
    atol = 3e-6 if how == "by Cholesky factors" else 3e-5
    np.testing.assert_allclose(rows @ rows.mT, eye, atol=atol)
    lower = given @ rows.mT / jnp.max(jnp.abs(given))
    np.testing.assert_allclose(jnp.triu(lower, 1), jnp.zeros_like(lower), atol=4e-5)
    assert bool(jnp.all(jnp.diagonal(lower, axis1=1, axis2=2) > 0))


@pytest.mark.parametrize("platform, loops", [("cpu", True), ("cuda", False)])
def test_a_basis_is_made_by_what_is_fast_on_the_platform(platform, loops):
    rows = jax.ShapeDtypeStruct((3, 9, 9), jnp.float32)
    text = jax.export.export(jax.jit(orthonormal), platforms=[platform])(rows).mlir_module()
    assert ("stablehlo.while" in text) == loops
    # LAPACK in a batch can stand still for ever.
    assert ("custom_call" in text or "stablehlo.cholesky" in text) != loops


def test_a_null_space_stays_where_it_is():
    """Directions without gradients are not spanned by rounding: their rows of the basis are those
    that they began as."""
    gradients = [g.at[3:].set(0.0) for g in gradients_like(jnp.zeros((6, 5)), 30)]
    _, state = run(soap.scale_by_soap(soap_directions.Settings()), gradients[0], gradients)
    np.testing.assert_allclose(state.bases[0][0].vectors[0, 3:], jnp.eye(6)[3:], atol=3e-7)


def test_no_condition_copies_and_no_library_is_called(optimised):
    """LAPACK in a batch can stand still for ever on a CPU, and a condition copies the state."""
    params = {"a": jnp.zeros((9, 8)), "b": jnp.zeros((9, 8)), "c": jnp.zeros((6, 4))}
    transform = l2l.soap(0.1)
    state = transform.init(params)
    text = jax.jit(transform.update).lower(params, state, params).compile().as_text()
    assert " while(" in text and " conditional(" not in text
    assert "lapack_" not in text and " cholesky(" not in text


@pytest.mark.parametrize(
    "settings",
    [
        dict(b1=1.0),
        dict(b2=-0.1),
        dict(eps=-1.0),
        dict(weight_decay=-1.0),
        dict(learning_rate=-1.0),
        dict(learning_rate=float("nan")),
        dict(learning_rate="0.1"),
        dict(block_size=0),
        dict(block_size=True),
        dict(block_size=2.5),
        dict(longest=0),
        dict(precondition_frequency=0),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_one_sentence(settings):
    with pytest.raises(l2l.UserError, match=rf"{next(iter(settings))}=.*\.$"):
        l2l.soap(**{"learning_rate": 0.1, **settings})


def test_whole_numbers_may_be_numpys():
    params = jnp.zeros((5, 4))
    sizes = dict(block_size=np.int64(3), longest=np.int32(9), precondition_frequency=np.uint8(2))
    (_, theirs), _ = run(l2l.soap(0.1, **sizes), params, gradients_like(params, 2))
    sizes = {name: int(size) for name, size in sizes.items()}
    (_, ours), _ = run(l2l.soap(0.1, **sizes), params, gradients_like(params, 2))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("compile", [jax.jit, lambda f: f], ids=["compiled", "eager"])
def test_every_number_may_be_injected(compile):
    """As with `optax.adamw`: without static arguments, and one program for all values."""
    params = {"w": jnp.ones((5, 4)), "b": jnp.ones(3)}
    gradients = gradients_like(params, 4)
    plain = l2l.soap(1e-2, weight_decay=0.1)
    injected = optax.inject_hyperparams(l2l.soap)(learning_rate=1e-2, weight_decay=0.1)
    init, step = compile(injected.init), compile(injected.update)
    wanted, _ = run(plain, params, gradients)
    state = init(params)
    sizes = set()
    for gradient, update in zip(gradients, wanted, strict=True):
        ours, state = step(gradient, state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), ours, update)
        sizes.add(soap._advance._cache_size())
    assert len(sizes) == 1
    state.hyperparams.update(
        {"learning_rate": jnp.float32(0), "precondition_frequency": jnp.int32(1)}
    )
    ours, _ = step(gradients[0], state, params)
    assert not any(np.any(x) for x in jax.tree.leaves(ours))


def test_frequencies_may_be_scheduled():
    params = jnp.zeros((5, 4))
    gradients = gradients_like(params, 5)
    injected = optax.inject_hyperparams(l2l.soap)(1e-2, precondition_frequency=lambda step: 2)
    ours, wanted = (
        run(t, params, gradients)[0] for t in (injected, l2l.soap(1e-2, precondition_frequency=2))
    )
    np.testing.assert_allclose(jnp.stack(ours), jnp.stack(wanted), rtol=1e-5)


@pytest.mark.parametrize("name", ["block_size", "longest"])
def test_what_decides_shapes_is_no_number_to_inject(name):
    params = jnp.ones((5, 4))
    injected = optax.inject_hyperparams(l2l.soap)(1e-2, **{name: 4})
    with pytest.raises(l2l.UserError, match=f"{name} is traced.* static_args"):
        jax.jit(injected.init)(params)
    injected = optax.inject_hyperparams(l2l.soap, static_args=name)(1e-2, **{name: 4})
    (ours,), _ = run(injected, params, [params])
    (wanted,), _ = run(l2l.soap(1e-2, **{name: 4}), params, [params])
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_shapes_make_a_state_of_shapes():
    params = {"w": jnp.ones((5, 4), jnp.bfloat16), "b": jnp.ones(3)}
    transform = l2l.soap(1e-2)
    shapes = transform.init(jax.eval_shape(lambda: params))
    assert shapes == jax.eval_shape(transform.init, params)


def test_a_gradient_of_none_is_none_and_counts_as_zero():
    params = {"w": jnp.ones((5, 4)), "v": jnp.ones((5, 4)), "b": jnp.ones(3), "n": None}
    transform = l2l.soap(1e-2, weight_decay=0.1)
    gradient = dict(params, v=None)
    (ours,), state = run(transform, params, [gradient])
    (wanted,), same = run(transform, params, [dict(params, v=jnp.zeros((5, 4)))])
    assert ours["v"] is None and ours["n"] is None
    for name in ("w", "b"):
        np.testing.assert_array_equal(ours[name], wanted[name])
    jax.tree.map(np.testing.assert_array_equal, state, same)


def test_gradients_of_half_precision_give_updates_in_that_of_the_parameters():
    """Those that the same numbers in float32 give: Adam's and those of `lstm` are so as well."""
    params = {"w": jnp.ones((5, 4)), "b": jnp.ones(3)}
    transform = l2l.soap(1e-2, weight_decay=0.1)
    (half,) = gradients_like(jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), 1)
    (ours,), state = run(transform, params, [half])
    (wanted,), same = run(transform, params, [jax.tree.map(jnp.float32, half)])
    jax.tree.map(np.testing.assert_array_equal, (ours, state), (wanted, same))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(ours))


def test_gradients_that_do_not_fit_are_one_sentence():
    params = {"w": jnp.ones((5, 4)), "b": jnp.ones(3)}
    transform = l2l.soap(1e-2)
    state = transform.init(params)
    for odd in ({"w": params["w"]}, dict(params, w=jnp.ones((4, 5)))):
        with pytest.raises(l2l.UserError, match=r"gradients .*[;:] give `update` the gradients"):
            transform.update(odd, state, params)


def test_a_state_of_other_parameters_is_one_sentence():
    state = l2l.soap(1e-2).init({"w": jnp.ones((5, 4))})
    params = {"w": jnp.ones((4, 5))}
    with pytest.raises(l2l.UserError, match=r"moments have shape \(5, 4\) .*`init`"):
        l2l.soap(1e-2).update(params, state, params)


@pytest.mark.parametrize(
    "before, after, words",
    [
        ({"block_size": 4}, {"block_size": 8}, "its arrays have other shapes"),
        # The count, two moments of 131 numbers, an average and a basis of the side of 8; and of 16.
        ({}, {"longest": 8}, "holds 903 numbers, and `init` of params would make 391"),
        ({"longest": 8}, {}, "holds 391 numbers, and `init` of params would make 903"),
    ],
)
def test_a_state_of_other_settings_is_one_sentence(before, after, words):
    params = {"w": jnp.ones((16, 8)), "b": jnp.ones(3)}
    state = l2l.soap(1e-2, **before).init(params)
    with pytest.raises(l2l.UserError, match=f"another kind or other settings: .*{words}"):
        l2l.soap(1e-2, **after).update(params, state, params)


def test_a_state_of_another_transformation_is_one_sentence():
    params = {"w": jnp.ones((5, 4))}
    state = (optax.scale_by_adam().init(params), *l2l.soap(1e-2).init(params)[1:])
    with pytest.raises(l2l.UserError, match="is a ScaleByAdamState, and not that of SOAP"):
        l2l.soap(1e-2).update(params, state, params)


@pytest.mark.parametrize("leaf", [1j * jnp.ones(3), jnp.arange(3), 2, "text"], ids=str)
def test_parameters_without_a_real_gradient_are_one_sentence(leaf):
    """Of complex numbers it took g² for |g|², and so it did not descend."""
    params = {"w": jnp.ones((5, 4)), "odd": leaf}
    with pytest.raises(l2l.UserError, match=r"Parameter \['odd'\] is .* optax\.masked"):
        l2l.soap(1e-2).init(params)
    transform = optax.masked(l2l.soap(1e-2), {"w": True, "odd": False})
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates["odd"] is leaf and np.all(updates["w"] < 0)


def test_learns_faster_than_adam_where_coordinates_hide_the_curvature():
    """½ |A (W − W*) B|² with A, B far from the axes: Adam at its best of five rates against SOAP at
    its best. With bases that stay the identity the two are equal."""
    keys = jax.random.split(jax.random.key(2), 5)
    a, b = (
        jnp.linalg.qr(jax.random.normal(k, (12, 12)))[0] * (10.0 ** -jnp.linspace(0, 2, 12))[None]
        for k in keys[:2]
    )
    target = jax.random.normal(keys[2], (12, 12))

    def loss(w):
        return 0.5 * jnp.sum(jnp.square(a.T @ (w - target) @ b))

    def best(make):
        """Of five rates, side by side."""

        def end(rate):
            def step(carry, _):
                w, state = carry
                updates, state = transform.update(jax.grad(loss)(w), state, w)
                return (optax.apply_updates(w, updates), state), None

            transform, w = make(optax.cosine_decay_schedule(rate, 200)), jnp.zeros((12, 12))
            return loss(jax.lax.scan(step, (w, transform.init(w)), None, 200)[0][0])

        return float(jnp.min(jax.jit(jax.vmap(end))(jnp.asarray([3e-3, 1e-2, 3e-2, 1e-1, 3e-1]))))

    adam = best(lambda rate: optax.adam(rate, b2=0.95))
    ours = best(lambda rate: l2l.soap(rate, b1=0.9))
    assert ours < 0.7 * adam, (ours, adam)
