"""The trees and settings a loop hands to an optimizer: taken as Adam takes them, or refused in one
sentence that names what does not fit."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import l2l
from l2l.console.errors import UserError
from l2l.optimizers import coordinates, leaves
from l2l.optimizers.guard import guard
from l2l.optimizers.published import dm

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
LEARNED = dm(hidden_size=2)
THETA = LEARNED.init(jax.random.key(0))
WIDER = dm(hidden_size=3).init(jax.random.key(0))


@pytest.fixture(scope="module", params=["plain", "guarded"])
def transform(request):
    bound = LEARNED.bind(THETA)
    return guard(bound) if request.param == "guarded" else bound


def refused(call) -> str:
    with pytest.raises(UserError) as error:
        call()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def test_a_layer_added_after_init_is_named(transform):
    more = {**PARAMS, "head": {"bias": jnp.ones(4)}}
    told = refused(lambda: transform.update(more, transform.init(PARAMS), more))
    assert "params has ['head']['bias'] of shape (4,)" in told and "`init` again" in told


def test_a_state_of_unknown_parameters_is_refused_by_its_numbers():
    """That of another process: nothing is known of the tree it was made for."""
    state = LEARNED.bind(THETA).init(PARAMS)
    told = refused(lambda: LEARNED.bind(THETA).update({"w": 1.0}, state, {"w": 1.0}))
    # Two layers of hidden and cell, two numbers each for 8 and for 1 coordinates; and the step.
    assert "holds 65 numbers" in told and "would make 9" in told


def test_a_state_of_another_optimizer_is_called_that():
    """The parameters are those of `init`: they are not to blame."""
    transform = LEARNED.bind(THETA)
    transform.init(PARAMS)
    for state in (optax.adam(1e-3).init(PARAMS), dm(hidden_size=3).bind(WIDER).init(PARAMS)):
        told = refused(lambda state=state: transform.update(PARAMS, state, PARAMS))
        assert "by an optimizer of another kind or other settings: it holds" in told


@pytest.mark.parametrize(
    "gradients, words",
    [
        ({**PARAMS, "w": PARAMS["w"].T}, ("(2, 3) at ['w']", "(3, 2)")),
        ({"w": PARAMS["w"]}, ("params has ['b'] of shape (2,)",)),
        ({**PARAMS, "c": 1.0}, ("the gradients have ['c'] of shape ()",)),
        ({"w": PARAMS["w"], "c": 1.0}, ("['b'] of shape (2,)", "['c'] of shape ()")),
        ({**PARAMS, "b": {"x": PARAMS["b"]}}, ("have a dict at ['b']", "(2,)")),
        ([PARAMS["b"], PARAMS["w"]], ("['b'] of shape (2,)", "[0] of shape (2,)")),
        ({**PARAMS, "b": 1j * PARAMS["b"]}, ("have complex64 numbers at ['b']", "real ones")),
    ],
)
def test_gradients_of_another_tree_are_named(transform, gradients, words):
    told = refused(lambda: transform.update(gradients, transform.init(PARAMS), PARAMS))
    assert all(word in told for word in words), told


def test_python_numbers_are_taken_as_arrays(transform):
    params, gradients = {"a": 1.0, "b": 0.5}, {"a": 0.5, "b": -0.1}
    arrays = [jax.tree.map(jnp.float32, tree) for tree in (params, gradients)]
    ours, state = transform.update(gradients, transform.init(params), params)
    theirs, _ = transform.update(arrays[1], transform.init(arrays[0]), arrays[0])
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    transform.update(gradients, state, optax.apply_updates(params, ours))


def test_shapes_in_shapes_out(transform):
    abstract = jax.eval_shape(lambda: PARAMS)
    for state in (transform.init(abstract), jax.eval_shape(transform.init, abstract)):
        jax.tree.map(
            lambda x, y: np.testing.assert_equal((x.shape, x.dtype), (y.shape, y.dtype)),
            state,
            transform.init(PARAMS),
        )


def test_equinox_trees(transform):
    """Functions are None in them, and so may be gradients of what is frozen: that stays."""
    model = eqx.nn.MLP(2, 1, 3, 1, activation=jnp.tanh, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    gradients = jax.tree.map(jnp.sin, params)
    frozen = eqx.tree_at(lambda m: m.layers[0].weight, gradients, None)
    updates, state = transform.update(frozen, transform.init(params), params)
    assert updates.layers[0].weight is None
    moved = eqx.apply_updates(model, updates)
    np.testing.assert_array_equal(moved.layers[0].weight, model.layers[0].weight)
    assert not np.array_equal(moved.layers[1].weight, model.layers[1].weight)
    adams = optax.adam(1e-3).update(gradients, optax.adam(1e-3).init(params), params)[0]
    ours = transform.update(gradients, state, params)[0]
    assert jax.tree.structure(ours) == jax.tree.structure(adams)


@pytest.mark.parametrize("leaf", [jnp.tanh, jax.nn.relu, jnp.arange(3), 7, "text"], ids=range(5))
@pytest.mark.parametrize("make", [lambda: LEARNED.bind(THETA), lambda: l2l.soap(1e-2, b1=0.9)])
@pytest.mark.parametrize("wrap", [lambda x: x, guard], ids=["plain", "guarded"])
def test_a_whole_model_may_be_given_where_init_had_its_arrays(make, wrap, leaf):
    """As in `opt.update(gradients, state, model)`, which AdamW takes: what has no gradient and
    could not have one is left alone. JAX gives whole numbers float0 for a gradient."""
    transform, whole = wrap(make()), {**PARAMS, "odd": leaf}
    arrays = {**PARAMS, "odd": None}
    wanted, expected = transform.update(arrays, transform.init(arrays), arrays)
    none = [None]
    if isinstance(leaf, jax.Array):
        none += [np.zeros(leaf.shape, jax.dtypes.float0)]
    for gradient in none:
        gradients = {**PARAMS, "odd": gradient}
        updates, state = transform.update(gradients, transform.init(arrays), whole)
        assert updates["odd"] is None
        jax.tree.map(np.testing.assert_array_equal, (updates, state), (wanted, expected))


def test_numbers_for_storage_are_refused(transform):
    told = refused(lambda: transform.init({"w": jnp.ones(3, jnp.float8_e4m3fn)}))
    assert "Parameter ['w'] is float8_e4m3fn" in told and "bfloat16 or wider" in told


def test_a_gradient_that_is_none_counts_as_zero(transform):
    state = transform.init(PARAMS)
    ours, after = transform.update({**PARAMS, "b": None}, state, PARAMS)
    theirs, expected = transform.update({**PARAMS, "b": jnp.zeros(2)}, state, PARAMS)
    assert ours["b"] is None
    np.testing.assert_array_equal(ours["w"], theirs["w"])
    jax.tree.map(np.testing.assert_array_equal, after, expected)


@pytest.mark.parametrize("leaf", [3, True, "text", 1j, jnp.arange(2)])
def test_leaves_that_cannot_be_trained(leaf):
    told = refused(lambda: LEARNED.bind(THETA).init({"odd": leaf}))
    assert "Parameter ['odd'] is" in told and "optax.masked" in told


@pytest.mark.parametrize(
    "num_steps", ["100", -5, 2.7, 100.0, True, np.True_, 1 << 31, jnp.ones(()), [100], [[1], 2]]
)
def test_a_horizon_that_is_no_number_of_steps(transform, num_steps):
    state = transform.init(PARAMS)
    told = refused(lambda: transform.update(PARAMS, state, PARAMS, num_steps=num_steps))
    assert told.startswith("num_steps=") and "whole number" in told
    if not isinstance(num_steps, jax.Array):
        assert told == refused(lambda: l2l.load("dm", num_steps=num_steps))


def test_a_horizon_beyond_the_limit_is_told_the_limit(transform):
    state = transform.init(PARAMS)
    for steps in (2**31, 10**12, np.int64(10**12)):
        told = refused(lambda steps=steps: transform.update(PARAMS, state, PARAMS, num_steps=steps))
        assert told.startswith(f"num_steps={steps} is above the limit of 2147483647 ")
    assert int(leaves.horizon(2**31 - 1)) == 2**31 - 1


@pytest.mark.parametrize("num_steps", [None, 0, 7, np.int64(7), np.asarray(7), jnp.asarray(7)])
def test_horizons(num_steps):
    out = leaves.horizon(num_steps)
    assert out.dtype == jnp.int32 and out.shape == () and int(out) == int(num_steps or 0)
    assert int(jax.jit(leaves.horizon)(jnp.int16(7))) == 7


@pytest.mark.parametrize("state_dtype", [jnp.int8, "int32", bool, complex, "nothing", 3])
def test_a_state_dtype_that_holds_no_state(state_dtype):
    told = refused(lambda: l2l.load("dm", state_dtype=state_dtype))
    assert told.startswith("state_dtype=") and "bfloat16" in told
    assert told == refused(lambda: coordinates.bind(LEARNED.rule, THETA, state_dtype=state_dtype))


def test_outside_of_jit_a_step_is_one_program(caplog):
    """Which is compiled once, whatever the horizon and the loss."""

    def compiled(call):
        caplog.clear()
        with jax.log_compiles():
            call()
        return [line for line in caplog.messages if line.startswith("Compiling")]

    learned = dm(hidden_size=2)  # One that no other test has compiled.
    for transform in (learned.bind(THETA), guard(learned.bind(THETA))):
        state = transform.init(PARAMS)

        def step(i, transform=transform, state=state):
            transform.update(PARAMS, state, PARAMS, num_steps=i, value=1.0 / i)

        assert len(compiled(lambda: step(3))) == 1
        assert not compiled(lambda: step(4))
