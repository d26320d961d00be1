"""The blocked engine against plain automatic differentiation of the same estimator."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l.core import base, unroll
from l2l.core.unroll import Inner
from l2l.estimators import autodiff
from l2l.estimators.first_order import SEGMENT, Teacher, first_order
from l2l.estimators.objective import Objective
from l2l.optimizers import coordinates
from l2l.optimizers.lstm import lstm
from l2l.optimizers.per_tensor import per_tensor
from l2l.optimizers.published import dm, rnnprop
from l2l.tasks import augment
from l2l.training import meta_step

NUM_PROBLEMS, NUM_WINDOWS, LENGTH = 3, 3, 4

# What the others of a list hold too is checked by `pytest -m slow`.
OPTIMIZERS = {
    "lstm": lambda: lstm(hidden_size=3),
    "lstm with tensors": lambda: lstm(hidden_size=2, tensor_size=3),
    "lstm with matrices": lambda: lstm(hidden_size=2, matrix_size=4),
    "lstm with tensors and matrices": lambda: lstm(
        hidden_size=2, tensor_size=3, matrix_size=9, anneal=1.0
    ),
    "lstm two layers, scale, decayed": lambda: lstm(
        hidden_size=3, layers=2, output="scale", weight_decay=0.1, decays=(0.5, 0.9)
    ),
    "lstm residual, all inputs": lambda: lstm(
        hidden_size=3, output="residual", inputs=("momentum", "gradient", "parameter", "scale")
    ),
    "lstm decayed, gradient alone": lambda: lstm(
        hidden_size=3, weight_decay=0.1, inputs=("gradient",)
    ),
    "dm": lambda: dm(hidden_size=3),
    "rnnprop": lambda: rnnprop(hidden_size=3),
    "per_tensor": lambda: per_tensor(hidden_size=3, block_size=4, bound=0.1),
    "per_tensor, all of it": lambda: per_tensor(
        hidden_size=3,
        decays=(0.9, 0.99),
        mixture=True,
        weight_decay=0.01,
        warm_up=3.0,
        average_every=2,
        basis_every=3,
    ),
}
PLAIN = Objective("train", "log")
# Training and validation losses enter linearly: both of them, in every form, and each alone.
OBJECTIVES = [
    Objective("both", "plain"),
    Objective(
        "both", "log", validation_weight=0.8, late_validation_weight=0.3, floor=0.1, emphasis=2.0
    ),
    Objective("both", "last"),
    Objective("validation", "plain", cap=3.0),
    Objective("train", "last"),
]


def ragged() -> base.TaskFamily:
    """Regression with batch noise by 44 parameters in a scalar, an empty leaf and odd sizes.

    It draws uniform numbers, few at a time: most of a test's time goes to compiling them.
    """
    shapes = {"a": (), "b": (0,), "c": (5,), "v": (17, 1), "w": (3, 7)}

    def init(key, problem):
        flat = jax.random.uniform(key, (44,), minval=-1.0)
        return coordinates.unflatten(flat, {n: jnp.zeros(s, flat.dtype) for n, s in shapes.items()})

    def loss(params, problem, batch):
        hidden = jnp.tanh(batch @ params["w"])  # [4, 7]
        out = hidden @ params["v"][:7, 0] * params["a"] + jnp.sum(params["b"])
        rest = jnp.sum((params["c"] - problem) ** 2) + jnp.sum(params["v"][7:] ** 4)
        return jnp.mean((out - batch[:, 0] ** 2) ** 2) + 0.1 * rest

    def batch(key, problem, data, split):
        size = 1.5 if split == "train" else 2.0
        return size * jax.random.uniform(key, (4, 3), minval=-1.0)

    return base.TaskFamily(
        sample=lambda key: jnp.linspace(-1.0, 1.0, 5), init=init, batch=batch, loss=loss
    )


def thetas(optimizer, dtype):
    """Weights far from the untrained ones, so that no part of the network is silent."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(optimizer.init, jax.random.key(1))
    theta = jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), dtype), shapes)
    if "log_learning_rate" in theta:
        theta["log_learning_rate"] = jnp.asarray(np.log(0.03), dtype)
    return theta


def windows(make, optimizer, *, length=LENGTH, imitation=0.0):
    """Meta-gradients and metrics [windows, problems, ...] of runs that are cut and renewed."""

    def run(theta, keys):
        stage = base.Stage(jnp.asarray(length), jnp.asarray(3 * length), jnp.asarray(imitation))
        estimator = make(optimizer)

        def step(state, _):
            gradient, state, metrics = estimator.estimate(theta, state, (), stage)
            return state, (gradient, metrics)

        return jax.lax.scan(step, estimator.init(keys, theta, stage), None, NUM_WINDOWS)[1]

    return jax.jit(run)


def check_equal(
    optimizer, dtype, *, family=None, objective=PLAIN, teacher=None, imitation=0.0, length=LENGTH
):
    inner = Inner(family or ragged(), optimizer, length, hide_horizon_probability=0.3)
    theta = thetas(optimizer, dtype)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(NUM_PROBLEMS))
    # Blocks of 16: three of them for 44 parameters, the last of which shares 4 with the second.
    ours = windows(
        lambda o: first_order(inner, objective, teacher, block=16),
        optimizer,
        length=length,
        imitation=imitation,
    )(theta, keys)
    plain = windows(
        lambda o: autodiff.truncated(inner, objective, teacher=teacher, segments=False),
        optimizer,
        length=length,
        imitation=imitation,
    )(theta, keys)
    tolerance = 1e-10 if dtype == jnp.float64 else 1e-5
    assert jax.tree.leaves(ours)[0].dtype == dtype
    # Equal zeros would prove nothing; a window whose losses are all capped has them.
    assert np.mean(np.linalg.norm(rows(plain[0]), axis=1) > 1e-4) > 0.3
    for one, other in zip(rows(ours[0]), rows(plain[0]), strict=True):
        assert np.linalg.norm(one - other) <= tolerance * np.linalg.norm(other)
    assert ours[1].keys() == plain[1].keys()
    for name, value in ours[1].items():
        np.testing.assert_allclose(value, plain[1][name], rtol=tolerance, atol=tolerance)


def rows(gradients):
    """One flat meta-gradient a window and problem."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradients)]
    return np.concatenate([x.reshape(NUM_WINDOWS * NUM_PROBLEMS, -1) for x in leaves], 1)


def quickly(values, quick):
    """`values`, of which those that are not in `quick` are slow."""
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in values]


@pytest.mark.parametrize(
    "name",
    # `per_tensor` is quick with a teacher, below.
    quickly(
        OPTIMIZERS,
        ("lstm with tensors and matrices", "lstm two layers, scale, decayed", "dm"),
    ),
)
def test_equals_autodiff_in_float64(name):
    with jax.enable_x64(True):
        check_equal(OPTIMIZERS[name](), jnp.float64)


@pytest.mark.parametrize("name", quickly(["lstm", "dm", "rnnprop"], ["lstm"]))
def test_equals_autodiff_in_float32(name):
    check_equal(OPTIMIZERS[name](), jnp.float32)


@pytest.mark.parametrize(
    "objective", quickly(OBJECTIVES, OBJECTIVES[1:4:2]), ids=lambda o: f"{o.on} {o.form}"
)
def test_equals_autodiff_for_every_meta_loss(objective):
    with jax.enable_x64(True):
        check_equal(OPTIMIZERS["dm"](), jnp.float64, objective=objective)


def test_equals_autodiff_under_augmentation():
    with jax.enable_x64(True):
        family = augment.rescale(ragged(), magnitude=1.0)
        family = augment.rescale(family, per="tensor", magnitude=1.0, probability=0.5)
        family = augment.noise(augment.convex(family, dimension=3), scale=0.1)
        check_equal(OPTIMIZERS["dm"](), jnp.float64, family=family, objective=Objective("both"))


@pytest.mark.parametrize(
    "name", quickly(["lstm", "dm", "per_tensor, all of it"], ["per_tensor, all of it"])
)
def test_equals_autodiff_with_a_teacher(name):
    """No coordinate of two blocks counts twice, or is taught twice; and the weights of validation
    losses change along a window."""
    with jax.enable_x64(True):
        check_equal(
            *(OPTIMIZERS[name](), jnp.float64),
            objective=OBJECTIVES[1],
            teacher=Teacher(learning_rate=0.03),
            imitation=0.7,
        )


def test_equals_autodiff_over_a_window_of_several_segments():
    """Two whole ones and a rest, each computed a second time on the way back."""
    length = 2 * SEGMENT + 3
    with jax.enable_x64(True):
        check_equal(
            OPTIMIZERS["dm"](), jnp.float64, length=length, teacher=Teacher(), imitation=0.5
        )


@pytest.mark.parametrize("name", quickly(["dm", "lstm"], ["dm"]))
def test_one_coordinate_in_three_has_the_whole_gradient_as_its_mean(name, monkeypatch):
    """44 parameters: the last of 15 coordinates is beyond the end for one offset of three."""
    optimizer = OPTIMIZERS[name]()
    keys = jax.vmap(jax.random.key)(jnp.arange(NUM_PROBLEMS))

    def run(every):
        return windows(lambda o: first_order(inner, PLAIN, block=8, every=every), optimizer)

    @jax.jit
    def from_offset(theta, keys, offset):
        monkeypatch.setattr(jax.random, "randint", lambda *_: offset)
        return run(3)(theta, keys)[0]

    with jax.enable_x64(True):
        inner, theta = Inner(ragged(), optimizer, LENGTH), thetas(optimizer, jnp.float64)
        thirds = [rows(from_offset(theta, keys, offset)) for offset in range(3)]
        monkeypatch.undo()
        whole, drawn = (rows(run(every)(theta, keys)[0]) for every in (1, 3))
    np.testing.assert_allclose(np.mean(thirds, 0), whole, rtol=1e-10, atol=1e-12)
    # Each window draws one of them, and not all the same.
    which = [[np.allclose(row, third[i]) for third in thirds] for i, row in enumerate(drawn)]
    assert np.all(np.sum(which, 1) == 1) and np.all(np.sum(which, 0) > 0)


def test_whole_tensors_need_every_coordinate():
    inner = Inner(ragged(), OPTIMIZERS["per_tensor"](), LENGTH)
    with pytest.raises(ValueError, match=r"every=2 leaves out .*whole tensors: set it to 1"):
        first_order(inner, PLAIN, every=2)
    inner = Inner(ragged(), OPTIMIZERS["dm"](), LENGTH)
    with pytest.raises(ValueError, match=r"every=2 leaves out .*imitated: set it to 1"):
        first_order(inner, PLAIN, Teacher(), every=2)
    with pytest.raises(ValueError, match=r"every=0 is not a whole number"):
        first_order(inner, PLAIN, every=0)
    with pytest.raises(ValueError, match=r"block=-3 is not a whole number"):
        first_order(inner, PLAIN, block=-3)


def test_an_optimizer_without_a_rule_is_refused():
    inner = Inner(ragged(), base.fixed(optax.sgd(0.1)), LENGTH)
    with pytest.raises(ValueError, match=r"no rule.*\n?.*use the estimator autodiff"):
        first_order(inner, Objective())


def noisy_bowls() -> base.TaskFamily:
    """½ Σ a x² in 8 dimensions under gradient noise: steps must be large first, then small."""

    def loss(params, problem, batch):
        x = params["x"]
        return 0.5 * jnp.sum(problem * x**2) + jnp.sum(batch * (x - jax.lax.stop_gradient(x)))

    def uniform(key):
        return jax.random.uniform(key, (8,), minval=-1.0)

    return base.TaskFamily(
        sample=lambda key: jnp.exp(uniform(key)),
        init=lambda key, problem: {"x": uniform(key)},
        batch=lambda key, problem, data, split: uniform(key),
        loss=loss,
    )


def test_learns_to_optimize():
    """150 meta-steps through windows of 8 of runs of 64: below the best constant Adam.

    Final losses, mean logarithm over 64 unseen problems: untrained -0.18, Adam at the best of six
    rates -3.37, here -3.4 to -4.6 over seeds and versions. On purpose broken it gave +13.7 with the
    sign of the gradient turned, -0.65 at best when inner states were not carried over, -0.18 with
    the gradient stopped.
    """
    horizon, optimizer = 64, lstm(hidden_size=4, learning_rate=0.003)
    stage = base.Stage(jnp.float32(horizon), jnp.float32(horizon), jnp.float32(0))
    estimator = first_order(Inner(noisy_bowls(), optimizer, 8), PLAIN)
    made = meta_step.Meta(estimator, optimizer, optax.adam(0.03), num_problems=8)

    @jax.jit
    def trained(state):
        return jax.lax.scan(lambda s, _: meta_step.meta_step(made, s, ()), state, None, 150)[0]

    @jax.jit
    def final(theta, keys):
        inner = Inner(noisy_bowls(), optimizer, horizon, stagger=False)

        def one(key):
            run = unroll.fresh(inner, key, theta, stage)
            run, _ = unroll.unroll(run, (), inner.family, optimizer.bind(theta), horizon)
            return jnp.log(inner.family.loss(run.params, run.problem, jnp.zeros(8)))

        return jnp.mean(jax.vmap(one)(keys))

    state = trained(meta_step.meta_init(jax.random.key(0), made, stage))
    assert not int(state.skipped)
    keys = jax.random.split(jax.random.key(9), 64)
    assert final(optimizer.init(jax.random.key(0)), keys) > -0.5
    assert final(state.theta, keys) < -2.5
