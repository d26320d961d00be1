"""Derivatives through updates and through whole runs, of every optimizer there is, in float64.

They are held to central differences: of one update in its gradient, and of the loss after an inner
run in the parameters it started from, as MAML takes it. Inputs are dead, gradients and parameters
zero, from the first step on. SOAP's bases are constants to a derivative (`soap_coordinates.py`), so
they are held where they are while a difference is taken.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.optimizers import features, registry, soap_coordinates, soap_directions
from l2l.optimizers.guard import guard
from l2l.optimizers.per_tensor import PerTensorState
from l2l.storage import exports, loading

STEPS = 3
# Settings beside the defaults of what `registry.OPTIMIZERS` names; one without any needs no entry.
SECTIONS = {
    # With nothing to learn its arithmetic is the same, but float32: theta says in which dtype.
    "adam": [{"learned": True}],
    "by_parameter": [
        {
            "parts": {"one": {"name": "lstm", "hidden_size": 2}, "rest": {"name": "adam"}},
            "labels": [("w", "one"), ("*", "rest")],
        }
    ],
    "lstm": [
        {},
        {"hidden_size": 2, "tensor_size": 3},
        {
            "hidden_size": 2,
            "tensor_size": 3,
            "matrix_size": 9,
            "anneal": 1.0,
            "weight_decay": 0.1,
        },
        {"hidden_size": 2, "matrix_size": 3, "weight_decay": 0.1},
        {
            "hidden_size": 2,
            "layers": 2,
            "output": "residual",
            "inputs": ("momentum", "gradient", "parameter", "scale"),
        },
        {"hidden_size": 2, "output": "scale"},
    ],
    "per_tensor": [
        # Slopes at gradients of zero that differences can measure.
        {"hidden_size": 2, "bound": 0.1, "eps_root": 1e-12},
        {
            "hidden_size": 2,
            "eps_root": 1e-12,
            "decays": (0.9, 0.99),
            "mixture": True,
            "weight_decay": 0.1,
            "warm_up": 2.0,
            "block_size": 3,
        },
    ],
}
MADE = {
    f"{name} {i}": {"name": name, **settings}
    for name in registry.OPTIMIZERS
    for i, settings in enumerate(SECTIONS.get(name, [{}]))
}
GUARDED = "guarded lstm"
# All that these do, others that are not slow do as well.
SLOW = ("lstm", "lstm 0", "lstm 1", "lstm 3", "lstm 5", "per_tensor 0", "mlp")
CASES = [
    pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case
    for case in (*loading.released(), *MADE)
]


def transformation(case):
    """A fresh one, in float64, whose rule no other has traced; of what is not released theta has no
    zeros."""
    registry._made.cache_clear()
    registry._together.cache_clear()
    if case in loading.released():
        with jax.enable_x64(False):
            optimizer, theta, _ = exports.read(loading.locate(case))
    else:
        optimizer = registry.optimizer(MADE["lstm 1" if case == GUARDED else case])
        theta = jax.tree.map(
            lambda x: x + 0.1 * np.cos(np.arange(1.0, x.size + 1)).reshape(x.shape),
            optimizer.init(jax.random.key(0)),
        )
    bound = optimizer.bind(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), theta))
    return guard(bound) if case == GUARDED else bound


def parameters():
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.normal(size=(4, 3))),
        "b": jnp.zeros(3),
        "out": jnp.asarray(rng.normal(size=(3, 2))),
        "unused": jnp.zeros((3, 2)),
        "unused vector": jnp.ones(2),
    }


def loss(params):
    """Of a network whose second input is always 0 and that ignores two of its tensors."""
    rng = np.random.default_rng(1)
    inputs = jnp.asarray(rng.normal(size=(5, 4)) * [1.0, 0.0, 1.0, 1.0])
    hidden = jnp.tanh(inputs @ params["w"] + params["b"][None])
    return jnp.mean((hidden @ params["out"] - jnp.asarray(rng.normal(size=(5, 2)))) ** 2)


def trained(transform, params):
    """The loss after `STEPS` steps of `scan`, and the states after each."""

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = transform.update(gradient, state, params, value=value, num_steps=9)
        return (optax.apply_updates(params, updates), state), state

    start = (params, transform.init(params))
    (params, _), states = jax.lax.scan(step, start, None, STEPS)
    return loss(params), states


def with_bases(states, function):
    """function(), in which the bases after each step are those of `states`, leaves [steps, ...]."""
    known = getattr(getattr(states, "matrices", None), "bases", ())
    soaps = states.accumulators.soap.bases if isinstance(states, PerTensorState) else ()

    def sizes(pair, lead):
        return [x.shape[lead:] for x in jax.tree.leaves(pair)]

    def held(gradients, pair, step):
        del gradients
        pair = next(kept for kept in known if sizes(kept, 1) == sizes(pair, 0))
        return jax.tree.map(lambda x: x[step], pair)

    def held_soap(settings, g, pair, sides, mu, step):
        del settings, g, sides
        kept = next(kept for kept in soaps if sizes(kept, 1) == sizes(pair, 0))
        after = jax.tree.map(lambda x: x[step], kept)
        return after, soap_directions._rotated(
            mu, *([side and side.vectors for side in x] for x in (pair, after))
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soap_coordinates, "_follow", held)
        patch.setattr(soap_directions, "_follow", held_soap)
        return function()


def direction(like):
    rng = np.random.default_rng(2)
    return {key: jnp.asarray(rng.normal(size=x.shape)) for key, x in like.items()}


def along(function, at, towards, size):
    """The central difference of a function of a pytree along a direction."""

    def moved(by):
        return function(jax.tree.map(lambda x, d: x + by * d, at, towards))

    return jax.tree.map(lambda a, b: (a - b) / (2 * size), moved(size), moved(-size))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("case", [*CASES, GUARDED])
def test_the_loss_after_an_inner_run_by_its_first_parameters(case):
    params = parameters()
    towards = direction(params)
    transform, held = transformation(case), transformation(case)  # Each keeps what it traced.
    run = partial(trained, transform)
    slope = jax.jit(lambda p, d: jax.jvp(run, (p,), (d,), has_aux=True)[1:])
    forward, states = slope(params, towards)
    fixed = jax.jit(lambda states, p: with_bases(states, lambda: trained(held, p)[0]))
    expected = along(partial(fixed, states), params, towards, 1e-7)
    assert abs(expected) > 1e-3
    np.testing.assert_allclose(forward, expected, rtol=1e-5)
    if case == GUARDED:
        return  # Its loops of one round have no reverse mode, as it says.
    gradient = jax.jit(jax.grad(lambda p: trained(transform, p)[0]))(params)
    assert all(np.all(np.isfinite(x)) for x in gradient.values())
    np.testing.assert_allclose(optax.tree.vdot(gradient, towards), expected, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_the_first_update_by_its_gradient(case):
    """Where some tensors have no gradient, and where none has."""
    params = parameters()
    transform, held = transformation(case), transformation(case)  # Each keeps what it traced.
    state = transform.init(params)

    def update(transform, gradients):
        return transform.update(gradients, state, params, num_steps=9)

    @jax.jit
    def slopes(gradients, towards):
        """The update's derivative along a direction, the pull of `params` through it, the state."""
        own = partial(update, transform)
        _, along_it, after = jax.jvp(own, (gradients,), (towards,), has_aux=True)
        _, pull, _ = jax.vjp(own, gradients, has_aux=True)
        return along_it, pull(params)[0], jax.tree.map(lambda x: x[None], after)

    @jax.jit
    def fixed(states, gradients):
        return with_bases(states, lambda: update(held, gradients)[0])

    some = jax.grad(loss)(params)
    # A very short way where a whole tensor has no gradient: there logarithms see 1e-10 of it. To a
    # rule that does not count such tensors they are others as soon as they have one: none at all.
    least = 0.0 if isinstance(state, PerTensorState) else 1e-6
    for gradients in (some, jax.tree.map(jnp.zeros_like, some)):
        towards = {
            key: d * (1.0 if np.any(gradients[key]) else least)
            for key, d in direction(params).items()
        }
        found, back, states = slopes(gradients, towards)
        assert all(np.all(np.isfinite(x)) for x in back.values())
        expected = along(partial(fixed, states), gradients, towards, 1e-9)
        for key, x in expected.items():
            size = np.max(np.abs(x))
            np.testing.assert_allclose(found[key], x, atol=1e-4 * size + 1e-8, err_msg=key)
        np.testing.assert_allclose(
            optax.tree.vdot(back, towards), optax.tree.vdot(params, found), rtol=1e-9, atol=1e-12
        )


# Of every function of `features.py` a function of three numbers, or None.
FEATURES = {
    "log_and_sign": lambda x: features.log_and_sign(x, 5.0),
    "norm": lambda x: features.norm(jnp.sum(x * x)),
    "pool": lambda x: features.pool([x * x, x], (1, 0, 2)),
    "root": lambda x: features.root(x * x, 1e-8),
    "time_context": None,  # Of numbers of steps, like all with None.
    "update_moments": lambda x: features.update_moments(
        x, features.zero_moments(2, 3, x.dtype), jnp.int32(0), decays=(0.9, 0.99), second_decay=0.9
    ),
    "weight_of": None,
    "zero_moments": None,
}


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, function in inspect.getmembers(features, inspect.isfunction)
        if function.__module__ == features.__name__
    ],
)
@pytest.mark.parametrize("at", [(0.0, 0.0, 0.0), (0.0, 2.0, -1e-3)])
def test_every_feature(name, at):
    """A feature that is new has to be added to `FEATURES`."""
    function = FEATURES[name]
    if function is None:
        return
    at, towards = jnp.asarray(at), jnp.asarray([1.0, -0.5, 0.3])
    found = jax.jvp(function, (at,), (towards,))[1]
    expected = along(function, at, towards, 1e-7)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected
    )
    back = jax.jacrev(function)(at)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(back))


def test_the_norm_of_what_is_not_finite_is_not():
    assert np.isnan(features.norm(jnp.asarray(jnp.nan)))
    assert np.isinf(features.norm(jnp.asarray(jnp.inf)))
