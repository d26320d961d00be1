"""Every optimizer with a rule against every promise of an optax transformation: one table."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

from l2l.console.errors import UserError
from l2l.core import base
from l2l.optimizers import per_tensor_signals
from l2l.optimizers.adam import adam, learned_adam
from l2l.optimizers.adamw import learned_adamw
from l2l.optimizers.by_parameter import by_parameter
from l2l.optimizers.guard import GuardState, guard
from l2l.optimizers.lstm import lstm
from l2l.optimizers.per_tensor import PerTensorState, per_tensor
from l2l.optimizers.published import dm, rnnprop
from l2l.optimizers.sgd import sgd


def guarded(learned):
    return base.LearnedOptimizer(learned.init, lambda theta: guard(learned.bind(theta)))


LEARNED = {
    "lstm": lambda: lstm(hidden_size=3),
    "lstm with tensors": lambda: lstm(hidden_size=2, tensor_size=3),
    "lstm with matrices": lambda: lstm(hidden_size=2, tensor_size=3, matrix_size=9, anneal=1.0),
    "lstm of two layers, all inputs": lambda: lstm(
        hidden_size=2,
        layers=2,
        output="residual",
        weight_decay=0.1,
        inputs=("momentum", "gradient", "parameter", "scale"),
    ),
    "dm": lambda: dm(hidden_size=3),
    "rnnprop": lambda: rnnprop(hidden_size=3),
    "per_tensor": lambda: per_tensor(
        hidden_size=3, decays=(0.9, 0.99), mixture=True, weight_decay=0.01, bound=0.1
    ),
    "by_parameter": lambda: by_parameter(
        {"lstm": lstm(hidden_size=2), "adam": adam(1e-2)}, [("net", "lstm"), ("*", "adam")]
    ),
    "guarded": lambda: guarded(lstm(hidden_size=3)),
    "adam": lambda: adam(1e-2, learned=True),
}
PARAMS = {
    "net": (
        {"w": jnp.linspace(-1.0, 1.0, 15).reshape(3, 5), "b": jnp.full((5,), 0.5, jnp.float32)},
    ),
    "half": jnp.asarray([1.0, -2.0, 3.0], jnp.bfloat16),
    "scalar": jnp.asarray(0.3, jnp.float32),
    "empty": jnp.zeros((0, 4)),
    "nothing": {},
}
GRADIENTS = jax.tree.map(jnp.sin, PARAMS)


def steps_taken(state) -> int:
    name = "count" if isinstance(state, PerTensorState) else "step"
    return int(optax.tree.get(state, name))


@pytest.mark.parametrize("make", [learned_adam, learned_adamw, partial(sgd, learned=True)])
def test_hand_written_ones_keep_half_precision(make):
    """theta is float32, and would make updates of half precision so."""
    learned = make()
    transform = learned.bind(learned.init(jax.random.key(0)))
    params = {"half": PARAMS["half"], "none": None}
    updates, _ = transform.update(params, transform.init(params), params)
    assert updates["half"].dtype == jnp.bfloat16


@pytest.mark.parametrize("make", [learned_adam, learned_adamw, partial(sgd, learned=True)])
def test_hand_written_ones_take_python_numbers_as_arrays(make):
    learned = make()
    transform = learned.bind(learned.init(jax.random.key(0)))
    params = {"a": 1.0, "b": 0.5}
    arrays = jax.tree.map(jnp.float32, params)
    updates, _ = transform.update(params, transform.init(params), params)
    expected, _ = transform.update(arrays, transform.init(arrays), arrays)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.fixture(scope="module", params=LEARNED, ids=str)
def transform(request):
    """Bound to a theta with no zeros in it, so that its state matters to its updates."""
    learned = LEARNED[request.param]()
    theta = learned.init(jax.random.key(0))
    return learned.bind(
        jax.tree.map(
            lambda x: x + 0.1 * jnp.cos(jnp.arange(1.0, x.size + 1)).reshape(x.shape), theta
        )
    )


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.aval.weak_type), tree)


def steps(transform, params=PARAMS, num=2, gradients=GRADIENTS, **extra):
    """(the last updates, state), of one compiled step with constant gradients and parameters."""
    step = jax.jit(lambda g, s, p, e: transform.update(g, s, p, **e))
    state = jax.jit(transform.init)(params)
    for _ in range(num):
        updates, state = step(gradients, state, params, extra)
    return updates, state


def close(tree, other, rtol=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=rtol, atol=1e-7
        ),
        tree,
        other,
    )


@pytest.fixture(scope="module")
def plain(transform):
    return steps(transform)


def test_shape_and_dtype_are_those_of_the_gradients(plain):
    assert shapes(plain[0]) == shapes(jax.tree.map(jnp.asarray, GRADIENTS))
    assert all(np.any(np.asarray(x) != 0) for x in jax.tree.leaves(plain[0]) if x.size)


def test_state_keeps_its_structure_so_that_a_step_compiles_once(transform):
    calls = 0

    @jax.jit
    def step(gradients, state, params):
        nonlocal calls
        calls += 1
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, transform.init(PARAMS)
    before = shapes(state)
    for _ in range(3):
        params, state = step(GRADIENTS, state, params)
    assert calls == 1
    assert shapes(state) == before
    assert steps_taken(state) == 3


def test_scan_and_vmap(transform, plain):
    def run(gradients):
        def body(state, _):
            updates, state = transform.update(gradients, state, PARAMS)
            return state, updates

        return jax.tree.map(lambda x: x[-1], jax.lax.scan(body, transform.init(PARAMS), None, 2)[1])

    pair = jax.tree.map(lambda g: jnp.stack([g, -2 * g]), GRADIENTS)
    updates = jax.jit(jax.vmap(run))(pair)
    close(jax.tree.map(lambda x: x[0], updates), plain[0])
    other = steps(transform, gradients=jax.tree.map(lambda x: x[1], pair))[0]
    close(jax.tree.map(lambda x: x[1], updates), other)


def test_horizon_may_be_missing_or_traced_and_other_arguments_are_left_alone(transform, plain):
    close(steps(transform, num_steps=0, value=jnp.asarray(3.0), anything=jnp.zeros(2))[0], plain[0])
    traced = steps(transform, num_steps=jnp.asarray(7))[0]
    fixed = jax.jit(lambda g, s, p: transform.update(g, s, p, num_steps=7, value=1.0))
    state = fixed(GRADIENTS, transform.init(PARAMS), PARAMS)[1]
    close(traced, fixed(GRADIENTS, state, PARAMS)[0])


def test_chain(transform, plain):
    link = optax.chain(optax.identity(), transform, optax.scale(2.0))
    doubled = steps(link, value=jnp.ones(()))[0]
    close(doubled, jax.tree.map(lambda x: 2 * x, plain[0]))


def alone(transform, keep):
    """The updates of a part of the parameters that is all there is: what a rule sees of whole
    tensors depends on which there are."""
    return steps(transform, params=keep(PARAMS), gradients=keep(GRADIENTS))[0]


def test_masked(transform):
    mask = {"net": ({"w": True, "b": False},), "half": True, "scalar": True, "empty": True}
    mask["nothing"] = {}
    updates = steps(optax.masked(transform, mask))[0]
    bias = updates["net"][0].pop("b")
    np.testing.assert_array_equal(bias, GRADIENTS["net"][0]["b"])
    close(updates, alone(transform, lambda tree: {**tree, "net": ({"w": tree["net"][0]["w"]},)}))


def test_partition(transform):
    kinds = {"net": "learned", "half": "sgd", "scalar": "learned", "empty": "sgd", "nothing": "sgd"}
    both = optax.partition({"learned": transform, "sgd": optax.sgd(1.0)}, kinds)
    updates = steps(both, num_steps=jnp.asarray(0))[0]
    learned = {name: updates[name] for name in ("net", "scalar")}
    close(learned, alone(transform, lambda tree: {name: tree[name] for name in learned}))
    np.testing.assert_array_equal(updates["half"], -GRADIENTS["half"])


def test_multi_steps(transform, plain):
    updates, state = steps(optax.MultiSteps(transform, 2).gradient_transformation(), num=4)
    close(updates, plain[0], rtol=1e-2)  # It averages bfloat16 gradients in bfloat16.
    assert steps_taken(state.inner_opt_state) == 2


def test_apply_if_finite(transform, plain):
    guarded = optax.apply_if_finite(transform, 3)
    update = jax.jit(guarded.update)
    state = update(GRADIENTS, guarded.init(PARAMS), PARAMS)[1]
    broken = {**GRADIENTS, "scalar": jnp.asarray(jnp.nan)}
    updates, state = update(broken, state, PARAMS)
    assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(updates))
    close(update(GRADIENTS, state, PARAMS)[0], plain[0])


def test_inject_hyperparams(transform, plain):
    def scaled(rate):
        return optax.chain(transform, optax.scale(rate))

    close(
        steps(optax.inject_hyperparams(scaled)(rate=0.5))[0],
        jax.tree.map(lambda x: x / 2, plain[0]),
    )


def test_map_params(transform):
    state = transform.init(PARAMS)
    same = optax.tree.map_params(transform, lambda x: x, state)
    jax.tree.map(np.testing.assert_array_equal, same, state)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_every_precision_keeps_its_dtypes(transform, dtype):
    """Of gradients in others too; by shapes alone, under x64, where a number is easily widened."""
    with jax.enable_x64(True):
        for given in (dtype, jnp.bfloat16, jnp.float64):
            params = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), PARAMS)
            gradients = jax.tree.map(lambda x: jnp.zeros(x.shape, given), PARAMS)
            state = jax.eval_shape(transform.init, params)
            updates, after = jax.eval_shape(transform.update, gradients, state, params)
            assert jax.tree.map(str, updates) == jax.tree.map(str, jax.eval_shape(lambda: params))
            assert jax.tree.map(str, after) == jax.tree.map(str, state)


def test_state_survives_orbax(transform, plain, tmp_path):
    params, state = PARAMS, plain[1]
    if isinstance(state, GuardState | PerTensorState):
        # It holds arrays like the parameters, as Adam's state does, and Orbax saves no empty ones.
        params = {name: x for name, x in PARAMS.items() if name != "empty"}
        state = transform.init(params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        like = jax.eval_shape(lambda: transform.init(params))
        back = checkpointer.restore(tmp_path / "state", like)
    jax.tree.map(np.testing.assert_array_equal, back, state)


def test_parameters_missing(transform):
    with pytest.raises(
        ValueError, match=r"`params` is None: call update\(gradients, state, params"
    ):
        transform.update(GRADIENTS, transform.init(PARAMS))


@pytest.mark.parametrize("leaf", [jnp.arange(3), jnp.ones(2, jnp.complex64), jnp.asarray(True)])
def test_leaves_that_are_no_real_numbers(transform, leaf):
    with pytest.raises(UserError, match=r"Parameter \['odd'\] is \w+: .* optax.masked"):
        transform.init({**PARAMS, "odd": leaf})


def test_nothing_to_train(transform):
    state = transform.init({})
    updates, after = transform.update({}, state, {})
    assert updates == {}
    assert jax.tree.structure(after) == jax.tree.structure(state)


@pytest.mark.parametrize(
    "weight_decay, settings",
    [
        (0.0, {}),
        (0.05, {}),
        (0.05, {"layers": 2, "output": "scale"}),
        (0.0, {"output": "residual"}),
        (float(jax.nn.sigmoid(per_tensor_signals.NO_DECAY)), {"tensor_size": 3}),
    ],
)
def test_untrained_lstm_is_adam(weight_decay, settings):
    """Step by step over 100 steps of gradients of many sizes, some of them always zero."""
    own = {} if "tensor_size" in settings else {"weight_decay": weight_decay}
    learned = lstm(hidden_size=2, learning_rate=3e-3, **own, **settings)
    ours = learned.bind(learned.init(jax.random.key(0)))
    theirs = (
        optax.adamw(3e-3, eps_root=1e-8, weight_decay=weight_decay)
        if weight_decay
        else optax.adam(3e-3, eps_root=1e-8)
    )
    scales = (10.0 ** jnp.linspace(-7, 3, 20)).at[::6].set(0.0)
    params = jnp.linspace(-2.0, 2.0, 20)

    def step(carry, key):
        params, mine, other = carry
        gradient = scales * jax.random.normal(key, (20,))
        (a, mine), (b, other) = (
            ours.update(gradient, mine, params),
            theirs.update(gradient, other, params),
        )
        return (params + b, mine, other), (a, b)

    start = (params, ours.init(params), theirs.init(params))
    keys = jax.random.split(jax.random.key(1), 100)
    mine, other = jax.jit(lambda: jax.lax.scan(step, start, keys)[1])()
    np.testing.assert_allclose(mine, other, rtol=5e-6, atol=3e-9)


def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[:256] / 16.0, jnp.float32), jnp.asarray(labels[:256])


def transform_for_digits():
    learned = lstm(hidden_size=3, learning_rate=1e-2)
    return learned.bind(learned.init(jax.random.key(0)))


def test_flax_loop():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(10)(nn.relu(nn.Dense(16)(x)))

    images, labels = digits()
    network = Network()
    params = network.init(jax.random.key(0), images[:1])["params"]
    state = TrainState.create(apply_fn=network.apply, params=params, tx=transform_for_digits())

    @jax.jit
    def step(state):
        def loss(params):
            logits = state.apply_fn({"params": params}, images)
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

        value, gradients = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradients), value

    losses = []
    for _ in range(40):
        state, value = step(state)
        losses.append(float(value))
    assert losses[-1] < 0.4 * losses[0]
