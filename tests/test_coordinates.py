"""Blocks: the layout, the loop over them, its derivatives, memory and compile time."""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base
from l2l.evaluation import curves
from l2l.optimizers import blocks, coordinates
from l2l.optimizers.adam import adam
from l2l.optimizers.by_parameter import by_parameter
from l2l.optimizers.lstm import lstm
from l2l.optimizers.published import dm
from l2l.training import meta_step

SIZE = 90
TREE = {
    "a": jnp.ones(()),
    "e": jnp.ones((0, 3)),
    "h": jnp.ones(3, jnp.bfloat16),
    "w": (jnp.ones((2, 5)),),
}


def shaken(learned, seed=0):
    """A theta with no zeros in it, so that every path through the network carries something."""
    theta = learned.init(jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(jax.tree.leaves(theta)))
    keys = jax.tree.unflatten(jax.tree.structure(theta), list(keys))
    return jax.tree.map(lambda x, k: x + 0.2 * jax.random.normal(k, x.shape), theta, keys)


LSTM = lstm(hidden_size=3)
THETA = shaken(LSTM)
PARAMS = jax.random.normal(jax.random.key(5), (SIZE,))


def run(theta, params, block, rule=LSTM.rule, steps=3, **settings):
    """Parameters after some steps down a bowl, and the state."""
    transform = coordinates.bind(rule, theta, block, **settings)

    def step(carry, _):
        params, state = carry
        updates, state = transform.update(jnp.sin(params), state, params, num_steps=10)
        return (params + updates, state), None

    return jax.lax.scan(step, (params, transform.init(params)), None, steps)[0]


@pytest.mark.parametrize("size", [1, 15, 16, 17, 33, 512, 513, 100_001])
@pytest.mark.parametrize("block", [16, 512, None])
def test_every_coordinate_is_fresh_in_one_block(size, block):
    cut = blocks.blocks_of(size, block)
    assert cut.width <= (block or size)
    assert (cut.count - 1) * cut.width < size  # None is left over.
    numbers, seen = jnp.arange(size), []
    for i in range(cut.count):
        part, fresh = cut.cut(numbers, i), cut.fresh(i)
        assert part.shape == (cut.width,)
        seen.append(np.asarray(part)[np.asarray(fresh)])
    np.testing.assert_array_equal(np.concatenate(seen), numbers)


def test_put_writes_what_is_fresh():
    cut = blocks.blocks_of(44, 16)
    rows = jnp.arange(88.0).reshape(2, 44)
    got = cut.put(rows, -jnp.ones((2, 16)), 2)
    np.testing.assert_array_equal(got[:, :32], rows[:, :32])
    np.testing.assert_array_equal(got[:, 32:], -1)


def test_blocks_of_the_way_back_shrink_with_the_recurrent_state():
    """Of 8 units (16 numbers a coordinate), of two layers of 20 (80), and of none."""
    widths = [
        blocks.width(learned.rule.hidden(learned.init(jax.random.key(0)), 1))
        for learned in (lstm(), dm(), adam())
    ]
    assert widths == [512, 128, 512] and blocks.width() == 512


def test_flatten_and_back():
    flat = coordinates.flatten(TREE, jnp.float32)
    assert flat.shape == (base.count(TREE),) and flat.dtype == jnp.float32
    back = coordinates.unflatten(flat, TREE)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), back) == jax.tree.map(
        lambda x: (x.shape, x.dtype), TREE
    )
    jax.tree.map(np.testing.assert_array_equal, back, TREE)


def test_result_does_not_depend_on_the_block():
    whole = jax.jit(lambda: run(THETA, PARAMS, 512)[0])()
    for block in (16, 48):
        blocked = jax.jit(lambda block=block: run(THETA, PARAMS, block)[0])()
        np.testing.assert_allclose(blocked, whole, rtol=1e-6, atol=1e-7)


def test_neighbours_touch_nobody():
    short = jax.jit(lambda: run(THETA, PARAMS[:33], 16)[0])()
    whole = jax.jit(lambda: run(THETA, PARAMS, 16)[0])()
    np.testing.assert_allclose(short, whole[:33], rtol=1e-6, atol=1e-7)


def gradients_through(loop, rule, theta, cotangent):
    """Of a linear function of two steps' updates, in theta and in the observed gradient."""

    def value(theta, gradient):
        state = coordinates.start(rule, theta, PARAMS)
        total = 0.0
        for step in range(2):
            context = rule.context(jnp.int32(step), jnp.int32(9))
            arrays = (gradient, PARAMS, (), state.accumulators, state.hidden)
            u, accumulators, hidden = loop(theta, context, jnp.int32(step), (), arrays)
            state = coordinates.LearnedState(state.step + 1, accumulators, hidden)
            total = total + jnp.vdot(u, cotangent)
        return total

    @jax.jit
    def both(*arguments):
        ways = jax.tree.map(jnp.ones_like, arguments)
        return jax.grad(value, (0, 1))(*arguments), jax.jvp(value, arguments, ways)[1]

    return both(theta, jnp.sin(PARAMS))


def test_derivatives_are_those_of_all_coordinates_at_once():
    """Of the loop that writes in place: reverse and forward mode, integers in the state."""
    parts = {"x": lstm(hidden_size=2), "y": adam(learned=True)}
    learned = by_parameter(parts, [("no such", "y"), ("", "x")])
    theta, cotangent = shaken(learned), jnp.cos(PARAMS)
    loops = (
        partial(coordinates._through, learned.rule, ((SIZE,),), 48),
        partial(coordinates._whole, learned.rule, ((SIZE,),)),
    )
    ours, plain = (gradients_through(loop, learned.rule, theta, cotangent) for loop in loops)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), ours, plain)
    assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(ours[0][0]["x"]))


def test_half_of_the_hidden_state_and_nearly_the_same_run():
    (full, wide), (half, narrow) = (
        jax.jit(lambda dtype=dtype: run(THETA, PARAMS, 48, state_dtype=dtype, steps=20))()
        for dtype in (None, jnp.bfloat16)
    )
    dtypes = {x.dtype for x in jax.tree.leaves(narrow.hidden)}
    assert dtypes == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(narrow.accumulators)} == {jnp.dtype(jnp.float32)}
    assert jax.tree.map(jnp.shape, wide) == jax.tree.map(jnp.shape, narrow)
    moved = np.abs(full - PARAMS)
    assert np.mean(np.abs(full - half)) < 0.01 * np.mean(moved)


@pytest.mark.parametrize("state_dtype, most", [(None, 96), (jnp.bfloat16, 48)])
def test_bytes_of_state(state_dtype, most):
    learned = lstm()
    theta = learned.init(jax.random.key(0))
    params = jax.ShapeDtypeStruct((200 * blocks.FORWARD_BLOCK,), jnp.float32)
    transform = coordinates.bind(learned.rule, theta, state_dtype=state_dtype)
    state = jax.eval_shape(transform.init, params)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state) if x.ndim)
    assert size / params.size <= most


def test_memory_of_a_step_beside_the_state_is_two_flat_copies_and_one_block():
    """Gradient (which becomes the updates) and parameters, end to end: 8 bytes a coordinate."""

    def temporary(size):
        learned = lstm()
        transform = learned.bind(learned.init(jax.random.key(0)))
        params = [jax.ShapeDtypeStruct((size // 2,), jnp.float32)] * 2
        state = jax.eval_shape(transform.init, params)
        step = jax.jit(lambda g, s, p: transform.update(g, s, p), donate_argnums=(0, 1))
        return step.lower(params, state, params).compile().memory_analysis().temp_size_in_bytes

    small, large = 64 * 512, 512 * 512
    assert temporary(large) - temporary(small) <= 8 * (large - small)


def test_five_hundred_tensors_compile_in_seconds():
    params = {f"t{i:03d}": jnp.zeros((1 + i % 5,)) for i in range(500)}
    learned = dm(hidden_size=2)
    transform = learned.bind(learned.init(jax.random.key(0)))
    begun = time.process_time()
    step = jax.jit(transform.update).lower(params, transform.init(params), params)
    step.compile()
    assert time.process_time() - begun < 20


def test_the_devices_that_are_given_decide_the_layout(monkeypatch):
    """On a machine with an accelerator, what is compiled for its CPU is laid out for a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert blocks.platform() == "gpu" and blocks.width() is None
    for device in ("cpu", jax.devices()[1]):
        with jax.default_device(device):
            assert blocks.platform() == "cpu"
            assert blocks.width() == blocks.FORWARD_BLOCK

    seen = []

    def bind(theta):
        def update(updates, state, params=None):
            seen.append(blocks.platform())
            return updates, state

        return optax.GradientTransformation(lambda params: (), update)

    family = base.TaskFamily(
        sample=lambda key: (),
        init=lambda key, problem: jnp.ones(2),
        batch=lambda key, problem, data, split: (),
        loss=lambda x, problem, batch: jnp.sum(x**2),
    )
    optimizer = base.lift(lambda key: jnp.zeros(()), bind)
    run = curves.compile_evaluation(optimizer, family, 1, 1, devices=jax.devices()[:1])
    run(jnp.zeros(()), jax.random.key(0), ())
    assert seen and set(seen) == {"cpu"}

    def estimate(theta, state, data, stage):
        seen.append(blocks.platform())
        rows = jnp.zeros(len(state))
        return rows, state, {"meta_loss": rows, "loss": rows, "lowest": rows}

    seen.clear()
    estimator = base.MetaGradient(lambda keys, theta, stage: jnp.zeros(len(keys)), estimate)
    made = meta_step.Meta(estimator, optimizer, optax.sgd(1.0), num_problems=2)
    stage = base.Stage(jnp.float32(4), jnp.float32(8), jnp.float32(0))
    state = meta_step.spread(meta_step.meta_init(jax.random.key(0), made, stage), 2)
    meta_step.compile_steps(made, 1, jax.devices()[:2])(state, ())
    assert seen and set(seen) == {"cpu"}
