"""Every released optimizer, alone and under guard, against what optax asks of optimizers that are
contributed to it, and under each numeric mode of JAX.

The contracts are those of optax's `contrib/_common_test.py`; `tests/test_optax_contract.py` holds
every kind of rule to the rest.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l2l
from l2l.optimizers.per_tensor import PerTensorState

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "b": jnp.asarray([0.5, -0.2])}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
TARGET = {"w": jnp.full((3, 2), 0.3), "b": jnp.asarray([0.1, 0.4])}
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]
CASES = [*sorted(l2l.released()), "guarded dm", "guarded lstm"]


@pytest.fixture(scope="module", params=CASES)
def optimizer(request):
    return loaded(request.param)


def loaded(case):
    bound = l2l.load(case.removeprefix("guarded "))
    return l2l.guard(bound) if case.startswith("guarded") else bound


def loss(params):
    return sum(jnp.sum(jnp.square(p - TARGET[name].astype(p.dtype))) for name, p in params.items())


def exact(params):
    """The loss without the rounding of half precision, in which steps this small get lost."""
    return sum(np.sum((np.asarray(p, float) - TARGET[name]) ** 2) for name, p in params.items())


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def close(tree, other, rtol=1e-5):
    """To a part of the root mean square of each tensor: what rounds to nothing is not compared."""

    def compare(a, b):
        a, b = np.asarray(a, float), np.asarray(b, float)
        np.testing.assert_allclose(a, b, rtol, atol=rtol * np.sqrt(np.mean(b**2)) + 1e-7)

    jax.tree.map(compare, tree, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_any_precision_keeps_every_dtype_and_compiles_once(optimizer, dtype):
    """Arguments that it does not know among them; updates and state through `cond`, as in loops."""
    with jax.enable_x64(dtype == jnp.float64):
        params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
        at_first, calls = exact(params), []

        @jax.jit
        def step(params, state):
            calls.append(1)
            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = jax.lax.cond(
                value > -1,
                lambda: optimizer.update(gradients, state, params, value=value, unknown=1),
                lambda: (gradients, state),
            )
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)
        before = kinds((params, state))
        for _ in range(3):
            params, state = step(params, state)
        assert kinds((params, state)) == before and len(calls) == 1
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
        assert exact(params) < at_first


@pytest.mark.parametrize("given", [jnp.bfloat16, jnp.float32])
def test_updates_are_in_the_dtypes_of_the_parameters(optimizer, given):
    """As those of optax's Adam are once they are applied, whatever the gradients come in."""
    params = {**PARAMS, "b": PARAMS["b"].astype(jnp.bfloat16)}
    gradients = jax.tree.map(lambda x: jnp.sin(x).astype(given), params)
    updates, state = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
    assert {k: x.dtype for k, x in updates.items()} == {k: x.dtype for k, x in params.items()}
    assert kinds(state) == kinds(optimizer.init(params))


def test_map_params(optimizer):
    """A state comes back as it is, and what is no parameter in it can be told apart."""
    state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)[1]
    same = optax.tree.map_params(optimizer, lambda x: x, state)
    jax.tree.map(np.testing.assert_array_equal, same, state)
    marked = optax.tree.map_params(
        optimizer, lambda x: "parameter", state, transform_non_params=lambda _: "other"
    )
    found = {str(x) for x in jax.tree.leaves(marked)}
    # Guards remember parameters, and rules of whole tensors have moments in their shapes.
    shaped = hasattr(state, "anchor") or isinstance(state, PerTensorState)
    assert found == ({"parameter", "other"} if shaped else {"other"})


def test_inject_hyperparams(optimizer):
    def scaled(rate):
        return optax.chain(optimizer, optax.scale(rate))

    injected, plain = optax.inject_hyperparams(scaled)(rate=0.5), scaled(0.5)
    outs = [jax.jit(t.update)(PARAMS, jax.jit(t.init)(PARAMS), PARAMS) for t in (injected, plain)]
    close(outs[0][0], outs[1][0])
    close(outs[0][1].inner_state, outs[1][1])


def test_gradient_accumulation(optimizer):
    """Whose branches have to agree on a dtype."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    every = optax.MultiSteps(optimizer, every_k_schedule=2)
    update, state = jax.jit(every.update), jax.jit(every.init)(params)
    first, state = update(params, state, params)
    assert all(np.all(np.asarray(x, float) == 0) for x in jax.tree.leaves(first))
    second, state = update(params, state, params)
    alone = jax.jit(optimizer.update)(params, optimizer.init(params), params)[0]
    close(second, alone, rtol=1e-2)


def test_a_part_of_the_parameters(optimizer):
    """Masked, partitioned: what an optimizer does to a part is what it does to that part alone."""
    labels = {"w": "ours", "b": "sgd"}
    part = optax.partition({"ours": optimizer, "sgd": optax.sgd(1.0)}, labels)
    masked = optax.masked(optimizer, {"w": True, "b": False})
    only = {"w": PARAMS["w"]}
    alone = jax.jit(optimizer.update)(only, jax.jit(optimizer.init)(only), only)[0]["w"]
    for transform, rest in ((part, -PARAMS["b"]), (masked, PARAMS["b"])):
        updates, state = jax.jit(transform.update)(PARAMS, jax.jit(transform.init)(PARAMS), PARAMS)
        close(updates["w"], alone)
        np.testing.assert_array_equal(updates["b"], rest)
        optax.tree.map_params(transform, lambda x: x, state)


def test_gradients_vmap_and_scan_outside_of_jit(optimizer):
    """The program inside leaks nothing, and says what it says under `jit`."""
    state = optimizer.init(PARAMS)

    def moved(scale):
        gradients = jax.tree.map(lambda x: scale * jnp.sin(x), PARAMS)
        return optimizer.update(gradients, state, PARAMS)[0]

    scales = jnp.asarray([1.0, 0.5])
    with jax.checking_leaks():
        both = jax.vmap(moved)(scales)
        one = jax.lax.scan(lambda carry, x: (carry, moved(x)), None, scales)[1]
    close(both, one)
    close(jax.tree.map(lambda x: x[1], both), moved(0.5))


def test_reaches_the_minimum_of_a_parabola(optimizer):
    """As optax asks: of a run in one `scan`. A known horizon is what lets a rate fall."""

    def step(carry, _):
        params, state = carry
        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradients, state, params, value=value, num_steps=400)
        return (optax.apply_updates(params, updates), state), None

    def run(params):
        return jax.lax.scan(step, (params, optimizer.init(params)), None, 400)[0][0]

    assert float(loss(jax.jit(run)(PARAMS))) < 0.02 * float(loss(PARAMS))


MODES = {
    "x64 before": {"jax_enable_x64": True},
    "x64 after": {"jax_enable_x64": True},
    "debug_nans": {"jax_debug_nans": True},
    "rank_promotion": {"jax_numpy_rank_promotion": "raise"},
    "transfer_guard": {"jax_transfer_guard": "disallow"},
    "disable_jit": {"jax_disable_jit": True},
}


def two_updates(optimizer):
    state, out = optimizer.init(PARAMS), []
    for gradients in (ZEROS, PARAMS):
        updates, state = optimizer.update(gradients, state, PARAMS)
        out.append(updates)
    return out


@pytest.fixture(scope="module")
def usual(optimizer):
    """The updates without any mode."""
    return two_updates(optimizer)


@pytest.mark.parametrize("mode", MODES)
def test_numeric_modes(request, optimizer, usual, mode):
    """Two steps outside of `jit`, the first with gradients of zero, are those without the mode."""
    case = request.node.callspec.params["optimizer"]
    before = {name: getattr(jax.config, name) for name in MODES[mode]}
    try:
        for name, value in MODES[mode].items():
            jax.config.update(name, value)
        got = two_updates(optimizer if mode == "x64 after" else loaded(case))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert kinds(got) == kinds(usual)
    # Bias corrections round otherwise where Python's numbers are float64.
    close(got, usual, rtol=5e-3)


def test_float64_parameters_are_computed_in_float64(optimizer):
    """Not in float32 and then cast: central differences with a step of 1e-6 see a smooth update."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
        update = jax.jit(lambda g: optimizer.update(g, optimizer.init(params), params)[0]["b"][0])

        def slope(step):
            moved = [{**params, "b": params["b"].at[0].add(s * step)} for s in (1, -1)]
            return (float(update(moved[0])) - float(update(moved[1]))) / (2 * step)

        assert slope(1e-6) == pytest.approx(slope(1e-4), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("name", ["lstm", "mlp"])
def test_a_loss_may_be_multiplied_by_anything(name):
    def updates(factor):
        transform = l2l.load(name, num_steps=100)
        state, out = transform.init(PARAMS), []
        for i in range(12):
            turned = jax.tree.map(lambda x, i=i: factor * jnp.cos(i + 9 * x), PARAMS)
            update, state = transform.update(turned, state, PARAMS)
            out.append(update)
        return out

    for power in (-30, 30):  # Powers of two are not rounded.
        close(updates(2.0**power), updates(1.0), rtol=1e-4)
