"""The models of real size are what their papers and recipes say, in their small siblings too."""

import itertools
import math
import os

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import erf

from l2l import tasks
from l2l.data import datasets
from l2l.tasks import architectures, supervised

SMALL = [
    tasks.nanogpt(dataset="pydoc", width=16, layers=2, heads=2, context=16),
    tasks.char_lstm(embedding=8, width=16, context=16),
    tasks.resnet(dataset="digits", channels=(8, 16), groups=4),
    tasks.vit(dataset="digits", patch=2, width=16, layers=1, heads=2),
    tasks.vae(dataset="digits", hidden=(32, 16), latent=4),
    tasks.mlp(hidden=(32, 32), layer_norm=True, initial_scale=(1.0, 1.0)),
]
TEXTS = SMALL[:2]


def name(family):
    return family.name


def start(family, seed=0):
    """A problem and its parameters."""

    @jax.jit
    def both(key):
        problem = family.sample(key)
        return problem, family.init(key, problem)

    return both(jax.random.key(seed))


def loss_of(family, params, problem, batch):
    """The loss in one program: operation by operation it takes a minute on a busy machine."""
    return jax.jit(family.loss)(params, problem, batch)


def shapes_of(family):
    """The parameters' shapes by their paths; nothing is computed."""
    shapes = jax.eval_shape(lambda: start(family)[1])
    return {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(shapes)}


def count(family):
    return sum(math.prod(leaf.shape) for leaf in shapes_of(family).values())


@pytest.fixture
def shakespeare(tmp_path, monkeypatch):
    """A text of 65 different characters, as many as the real one has, in its place."""
    text = bytes(range(40, 105)) * 60
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(text)
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    return text


# --- nanoGPT ---------------------------------------------------------------------------------


def test_the_size_of_nanogpt(shakespeare):
    # Embedding and positions; of a block 3 + 1 + 4 + 4 squares and two scales; one scale more.
    V, T, W, L = 65, 64, 128, 4
    expected = V * W + T * W + L * (12 * W**2 + 2 * W) + W
    family = tasks.nanogpt()
    assert family.name == "nanogpt-tinyshakespeare-4x128"
    assert count(family) == expected
    np.testing.assert_allclose(expected, 0.8e6, rtol=0.01)


def test_nanogpt_takes_what_text_there_is_and_says_which(tmp_path, monkeypatch):
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    assert tasks.nanogpt().name == "nanogpt-pydoc-4x128"
    absent = tasks.nanogpt(dataset="tinyshakespeare")
    with pytest.raises(ValueError, match="is missing, and l2l does not download"):
        absent.data()


def test_the_initial_weights_of_nanogpt():
    family = tasks.nanogpt(dataset="pydoc", width=64, layers=3, heads=2)
    _, params = start(family)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(path)
        if leaf.ndim == 1:
            np.testing.assert_array_equal(leaf, 1)
            continue
        residual = "attended" in path or "out" in path
        np.testing.assert_allclose(leaf.std(), 0.02 / 6**0.5 if residual else 0.02, rtol=0.05)
        assert abs(leaf.mean()) < 4 * 0.02 / leaf.size**0.5


def test_nanogpt_starts_at_the_entropy_of_chance():
    family = tasks.nanogpt(dataset="pydoc")
    problem, params = start(family)
    data = family.data()
    size = len(np.unique(data.train.inputs))
    batch = family.batch(jax.random.key(1), problem, data, "train")
    # Logits of deviation .02·√128 on top add half their variance, .026.
    assert math.log(size) < loss_of(family, params, problem, batch) < math.log(size) + 0.06


def test_nanogpt_against_numpy():
    W, H = 16, 2
    family = SMALL[0]
    problem, params = start(family)
    params = jax.tree.map(lambda p: p + 0.3 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), params)
    batch = family.batch(jax.random.key(1), problem, family.data(), "train")
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p[name]["scale"]

    def logits(row):
        x = p["~"]["embedding"][row] + p["~"]["positions"]
        for i in range(2):
            qkv = norm(x, f"block_{i}_norm_0") @ p[f"block_{i}_qkv"]["w"]
            heads = []
            for h in range(H):
                q, k, v = (qkv[:, j * W :][:, h * W // H : (h + 1) * W // H] for j in range(3))
                scores = np.where(np.tri(len(row)) > 0, q @ k.T / math.sqrt(W // H), -np.inf)
                weights = np.exp(scores - scores.max(1, keepdims=True))
                heads.append(weights / weights.sum(1, keepdims=True) @ v)
            x = x + np.concatenate(heads, 1) @ p[f"block_{i}_attended"]["w"]
            hidden = norm(x, f"block_{i}_norm_1") @ p[f"block_{i}_hidden"]["w"]
            hidden = hidden * (1 + erf(hidden / 2**0.5)) / 2
            x = x + hidden @ p[f"block_{i}_out"]["w"]
        return norm(x, "norm") @ p["~"]["embedding"].T

    out = np.stack([logits(row) for row in np.asarray(batch.inputs)])
    out = out - out.max(-1, keepdims=True)
    chosen = np.take_along_axis(out, np.asarray(batch.labels)[..., None], -1)[..., 0]
    expected = (np.log(np.exp(out).sum(-1)) - chosen).mean()
    np.testing.assert_allclose(loss_of(family, params, problem, batch), expected, rtol=1e-4)


@pytest.mark.parametrize("family", TEXTS, ids=name)
def test_no_place_sees_a_later_one(family):
    T = 16
    problem, params = start(family)

    @jax.jit
    def margins(row):
        """[T]: what the loss gains where one label is 1 instead of 0, which is the difference of
        two logits of that place, over T."""

        def loss(labels):
            return family.loss(params, problem, supervised.Batch(row[None], labels[None]))

        labels = jnp.zeros((T, T), jnp.int32)
        return jax.vmap(loss)(jnp.eye(T, dtype=jnp.int32)) - jax.vmap(loss)(labels)

    row = jnp.arange(T) + 5
    before = np.asarray(margins(row))
    for place in (1, 8, T - 1):
        moved = np.abs(margins(row.at[place].set(40)) - before)
        assert moved[:place].max() < 1e-6 and moved[place:].max() > 1e-5


def test_splits_of_nanogpt_are_the_text_in_order(shakespeare):
    data = tasks.nanogpt().data()
    kinds = np.unique(np.frombuffer(shakespeare, np.uint8))
    for inputs, labels in data:
        np.testing.assert_array_equal(inputs[1:], labels[:-1])
    # All characters of a split: its inputs, then its last label. None belongs to two splits.
    whole = [np.concatenate([s.inputs, s.labels[-1:]]) for s in data]
    assert kinds[np.concatenate(whole)].tobytes() == shakespeare
    lengths = [len(part) for part in whole]
    assert lengths == [int(0.9 * 3900), int(0.95 * 3900) - 3510, 3900 - int(0.95 * 3900)]


# --- the others ------------------------------------------------------------------------------


def test_the_size_of_the_others():
    # ResNet-8: a 3×3 stem, three blocks of two 3×3 and (twice) a 1×1, each with scale and offset.
    convolutions = [(3, 3, 16), (3, 16, 16), (3, 16, 16), (3, 16, 32), (3, 32, 32), (1, 16, 32)]
    convolutions += [(3, 32, 64), (3, 64, 64), (1, 32, 64)]
    expected = sum(side**2 * i * o + 2 * o for side, i, o in convolutions) + 64 * 10 + 10
    assert count(tasks.resnet()) == expected
    np.testing.assert_allclose(expected, 78_000, rtol=0.01)
    # Of a block 12 squares, 9 biases' and 4 normalisations' vectors.
    expected = 16 * 64 + 64 + 49 * 64 + 4 * (12 * 64**2 + 13 * 64) + 2 * 64 + 64 * 10 + 10
    assert count(tasks.vit()) == expected
    np.testing.assert_allclose(expected, 205_000, rtol=0.01)
    sizes = (784, 300, 100, 32), (16, 100, 300, 784)
    expected = sum(i * o + o for part in sizes for i, o in itertools.pairwise(part))
    assert count(tasks.vae()) == expected
    assert shapes_of(tasks.char_lstm())["['lstm/linear']['w']"].shape == (64 + 256, 4 * 256)


def test_a_normalised_mlp_against_numpy():
    family = tasks.mlp(hidden=(9, 7), activations="tanh", layer_norm=True)
    problem, params = start(family)
    params["norm_1"] = {
        "scale": np.linspace(0.5, 2, 7, dtype=np.float32),
        "offset": np.linspace(-1, 1, 7, dtype=np.float32),
    }
    batch = family.batch(jax.random.key(1), problem, family.data(), "train")
    x = np.asarray(batch.inputs).reshape(128, 64)
    for i in range(2):
        x = x @ np.asarray(params[f"linear_{i}"]["w"]) + np.asarray(params[f"linear_{i}"]["b"])
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        norm = jax.tree.map(np.asarray, params[f"norm_{i}"])
        x = np.tanh(x * norm["scale"] + norm["offset"])
    logits = x @ np.asarray(params["linear_2"]["w"]) + np.asarray(params["linear_2"]["b"])
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
    np.testing.assert_allclose(loss_of(family, params, problem, batch), expected, rtol=1e-4)


def test_a_resnet_sees_one_image_at_a_time_and_no_scale():
    family = SMALL[2]
    problem, params = start(family)
    batch = family.batch(jax.random.key(1), problem, family.data(), "train")
    loss = jax.jit(family.loss)
    whole = loss(params, problem, batch)
    halves = [jax.tree.map(lambda a, s=s: a[s], batch) for s in (np.s_[:32], np.s_[32:])]
    np.testing.assert_allclose(
        whole, np.mean([loss(params, problem, half) for half in halves]), rtol=1e-5
    )
    # Every convolution is normalised.
    larger = {
        k: {"w": 3 * v["w"]} if "conv" in k and "norm" not in k else v for k, v in params.items()
    }
    np.testing.assert_allclose(whole, loss(larger, problem, batch), rtol=1e-2)


@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 2)])
def test_convolutions_are_convolutions(size, stride):
    net = hk.without_apply_rng(
        hk.transform(lambda x: architectures._Convolution(5, size, stride, "conv")(x))
    )
    x = jax.random.normal(jax.random.key(0), (2, 6, 7, 4))
    params = jax.jit(net.init)(jax.random.key(1), x)
    expected = jax.lax.conv_general_dilated(
        x,
        params["conv"]["w"],
        (stride, stride),
        2 * [(size // 2, size // 2)],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(net.apply(params, x), expected, rtol=1e-4, atol=1e-5)


def test_a_vit_knows_patches_by_their_positions_alone():
    # Two patches change places, and so do their positions: the mean over patches stays.
    family = SMALL[3]
    problem, params = start(family)
    batch = family.batch(jax.random.key(1), problem, family.data(), "train")
    before = loss_of(family, params, problem, batch)
    images = np.asarray(batch.inputs).copy()
    images[:, 2:4, 2:4], images[:, 4:6, 4:6] = batch.inputs[:, 4:6, 4:6], batch.inputs[:, 2:4, 2:4]
    moved = supervised.Batch(images, batch.labels)
    assert abs(loss_of(family, params, problem, moved) - before) > 1e-5
    order = np.arange(16)
    order[[1 * 4 + 1, 2 * 4 + 2]] = 2 * 4 + 2, 1 * 4 + 1
    params["~"] = {"positions": params["~"]["positions"][order]}
    np.testing.assert_allclose(loss_of(family, params, problem, moved), before, rtol=1e-5)


def test_the_elbo_where_nothing_depends_on_the_noise():
    # A decoder of zeros gives its biases, whatever z is; an encoder of zeros its own.
    family = tasks.vae(dataset="digits", hidden=(5,), latent=2)
    problem, params = start(family)
    params = jax.tree.map(jnp.zeros_like, params)
    mean, log_var, bias = np.array([0.5, -2.0]), np.array([0.3, -1.0]), np.linspace(-2, 2, 64)
    params["encoder"]["linear_1"]["b"] = jnp.asarray([*mean, *log_var], jnp.float32)
    params["decoder"]["linear_1"]["b"] = jnp.asarray(bias, jnp.float32)
    batch = family.batch(jax.random.key(1), problem, family.data(), "train")
    x, chance = np.asarray(batch.inputs).reshape(-1, 64), 1 / (1 + np.exp(-bias))
    pixels = -(x * np.log(chance) + (1 - x) * np.log(1 - chance)).sum(1).mean()
    divergence = (mean**2 + np.exp(log_var) - log_var - 1).sum() / 2
    np.testing.assert_allclose(
        loss_of(family, params, problem, batch), pixels + divergence, rtol=1e-5
    )


def test_the_elbo_averages_over_the_posterior():
    # Without hidden layers E_q[softplus(w·z)] is one-dimensional: by Gauss-Hermite quadrature.
    family = tasks.vae(dataset="digits", hidden=(), latent=1)
    problem, params = start(family)
    params = jax.tree.map(jnp.zeros_like, params)
    params["encoder"]["linear_0"]["b"] = jnp.asarray([0.4, -0.6], jnp.float32)
    weights = np.linspace(-3, 3, 64)
    params["decoder"]["linear_0"]["w"] = jnp.asarray(weights, jnp.float32)[None]
    data = family.data()
    batch = family.batch(None, problem, data, "validation")
    again = family.batch(None, problem, data, "validation")
    assert loss_of(family, params, problem, batch) == loss_of(family, params, problem, again)
    x = np.asarray(batch.inputs).reshape(-1, 64)
    nodes, masses = np.polynomial.hermite_e.hermegauss(60)
    z = 0.4 + math.exp(-0.3) * nodes
    softplus = np.log1p(np.exp(np.outer(z, weights))).sum(1) @ masses / masses.sum()
    expected = softplus - (0.4 * x @ weights).mean()
    expected += (0.4**2 + math.exp(-0.6) + 0.6 - 1) / 2
    losses = jax.jit(jax.vmap(lambda key: family.loss(params, problem, batch._replace(key=key))))(
        jax.random.split(jax.random.key(3), 400)
    )
    error = losses.std() / 20
    np.testing.assert_allclose(losses.mean(), expected, atol=4 * error)
    assert error < 0.01 * expected


def test_the_exact_gelu():
    x = jnp.linspace(-4, 4, 41)
    exact = np.asarray(x) * (1 + erf(np.asarray(x) / 2**0.5)) / 2
    np.testing.assert_allclose(supervised.ACTIVATIONS["gelu_exact"](x), exact, atol=1e-6)


@pytest.mark.parametrize("family", SMALL, ids=name)
def test_adam_learns(family):
    problem, params = start(family)
    data, adam = family.data(), optax.adam(1e-2)

    @jax.jit
    def train(params, data):
        def step(carry, key):
            params, state = carry
            batch = family.batch(key, problem, data, "train")
            loss, gradient = jax.value_and_grad(family.loss)(params, problem, batch)
            updates, state = adam.update(gradient, state)
            return (optax.apply_updates(params, updates), state), loss

        keys = jax.random.split(jax.random.key(4), 40)
        return jax.lax.scan(step, (params, adam.init(params)), keys)[1]

    losses = np.asarray(train(params, data))
    assert losses[-5:].mean() < 0.85 * losses[:5].mean()


@pytest.mark.skipif(
    not os.path.isdir(os.environ.get("L2L_DATA_DIR", "")), reason="L2L_DATA_DIR holds no data sets"
)
def test_the_real_text_has_65_characters():
    if not datasets.present("tinyshakespeare"):
        pytest.skip("tinyshakespeare is not there")
    data = tasks.nanogpt(dataset="tinyshakespeare").data()
    assert len(np.unique(data.train.inputs)) == 65
