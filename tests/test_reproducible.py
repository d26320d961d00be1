"""The same run on one device and with its batch split over eight: how far rounding carries it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import l2l
from l2l.storage import loading

STEPS = 100


def digits():
    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images[:128] / 16.0, jnp.float32), jnp.asarray(labels[:128])


def network():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "w1": jax.random.normal(keys[0], (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(keys[1], (32, 10)) / 6,
        "b2": jnp.zeros(10),
    }


def loss(params, images, labels):
    hidden = jnp.tanh(images @ params["w1"] + params["b1"][None])
    logits = hidden @ params["w2"] + params["b2"][None]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def trained(optimizer, start, data):
    """The parameters after `STEPS` steps, on the devices that the arguments are on."""

    @jax.jit
    def run(params, images, labels):
        def step(carry, _):
            params, state = carry
            gradients = jax.grad(loss)(params, images, labels)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), None, STEPS)[0][0]

    return jax.device_get(run(start, *data))


# Multiples of the rate. At its own, `lstm` memorises 128 examples in 20 steps and wanders on, where
# a step is as sensitive as it is useless: it ends half of the way apart. `mlp` ends 1e-3 to 5e-2 of
# the way apart at other multiples, whichever way the bases turn.
RATES = {"lstm": 0.08, "mlp": 0.2}


# `dm` and `rnnprop` work coordinate by coordinate, and end 7e-7 of the way apart at most.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("dm", "rnnprop") else ())
        for name in loading.released()
    ],
)
def test_splitting_the_batch_moves_the_end_by_little_of_the_way(name):
    """Adam's end moves by 2e-7 of it. What sums of another order add to a gradient, 1e-7 of it, a
    preconditioner divides by the small root of a direction that has little of the gradient, and
    bases of nearly equal eigenvalues turn with it."""
    rate = RATES.get(name, 1.0)
    optimizer = l2l.load(name, num_steps=STEPS, learning_rate=rate)
    start, data = network(), digits()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in data]
    one = trained(optimizer, start, data)
    other = trained(optimizer, jax.device_put(start, NamedSharding(mesh, P())), split)
    for key, begin in start.items():
        way = np.linalg.norm(one[key] - begin)
        assert 0 < np.linalg.norm(one[key] - other[key]) < 1e-2 * way, key
    assert float(loss(other, *data)) == pytest.approx(float(loss(one, *data)), rel=1e-3)
