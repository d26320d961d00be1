"""Every family keeps the contract of `base.TaskFamily`, and the closed forms hold."""

import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from l2l import tasks
from l2l.console.errors import UserError
from l2l.data import datasets
from l2l.tasks import supervised

needs_files = pytest.mark.skipif(
    not os.path.isdir(os.environ.get("L2L_DATA_DIR", "")),
    reason="L2L_DATA_DIR holds no data sets",
)
FAMILIES = [
    tasks.simple(),
    tasks.simple_multi(),
    tasks.quadratic(dimension=3, batch_size=4),
    tasks.mlp(),
    tasks.mlp(dataset="diabetes", hidden=(4, 4), activations="silu", name="small"),
    tasks.logistic(dataset="wine"),
    tasks.conv(channels=(3, 2), dense=(5,), activations=("relu", "tanh")),
    tasks.conv(channels=(3,), dense=(4,), batch_norm=True, activations="sin"),
    tasks.autoencoder(),
    tasks.autoencoder(objective="bce", hidden=(4,)),
    tasks.regression(rows=200),
    tasks.transformer(width=8, layers=1, context=8),
    tasks.gru(width=8, context=8),
    tasks.residual(width=8, blocks=2),
    tasks.residual(dataset="diabetes", width=4, blocks=1),
    tasks.mixer(width=4, layers=1),
    tasks.row_lstm(width=4),
    tasks.mlp(hidden=(5, 4), layer_norm=True),
    tasks.resnet(dataset="digits", channels=(4, 8), groups=2),
    tasks.vit(dataset="digits", width=8, layers=1, heads=2),
    tasks.vae(dataset="digits", hidden=(8,), latent=3),
    tasks.char_lstm(embedding=4, width=8, context=8),
    tasks.nanogpt(dataset="pydoc", width=8, layers=1, heads=2, context=8),
    tasks.rescale(tasks.noise(tasks.convex(tasks.mlp(hidden=(4,))))),
    pytest.param(tasks.mnist(), marks=needs_files),
    pytest.param(tasks.mlp(dataset="mnist14"), marks=needs_files),
    pytest.param(tasks.cifar(channels=(4,)), marks=needs_files),
    pytest.param(tasks.gru(dataset="tinyshakespeare", width=4), marks=needs_files),
]


def name(family):
    return family.name


@pytest.mark.parametrize("family", FAMILIES, ids=name)
def test_contract(family):
    data = family.data()
    keys = jax.random.split(jax.random.key(0), 2)

    @jax.jit
    def start(keys):
        problems = jax.vmap(family.sample)(keys)
        return problems, jax.vmap(family.init)(keys, problems)

    @jax.jit
    def step(keys, problems, params, data):
        def one(key, problem, params):
            batch = family.batch(key, problem, data, "train")
            return jax.value_and_grad(family.loss)(params, problem, batch)

        return jax.vmap(one)(keys, problems, params)

    problems, params = start(keys)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves((problems, params)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))
    losses, gradients = step(keys, problems, params, data)
    assert losses.shape == (2,) and losses.dtype == jnp.float32
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((losses, gradients)))
    assert jax.tree.map(jnp.shape, gradients) == jax.tree.map(jnp.shape, params)

    again, _ = step(keys, *start(keys), data)
    np.testing.assert_array_equal(again, losses)

    @jax.jit
    def whole(problem, params, data):
        batch = family.batch(None, problem, data, "validation")
        score = family.accuracy and family.accuracy(params, problem, batch)
        return family.loss(params, problem, batch), score

    loss, score = whole(*jax.tree.map(lambda leaf: leaf[0], (problems, params)), data)
    assert loss.shape == () and np.isfinite(loss)
    assert (score is None) == (family.accuracy is None)
    assert score is None or (score.shape == () and 0 <= score <= 1)


@pytest.mark.parametrize("family", FAMILIES[:24], ids=name)
def test_keeps_float64(family):
    def step(key, data):
        problem = family.sample(key)
        params = jax.tree.map(lambda p: p.astype(jnp.float64), family.init(key, problem))
        batch = family.batch(key, problem, data, "train")
        return jax.value_and_grad(family.loss)(params, problem, batch)

    with jax.enable_x64(True):  # Shapes and types alone: nothing is compiled.
        loss, gradients = jax.eval_shape(step, jax.random.key(2), family.data())
    assert loss.dtype == jnp.float64
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(gradients))


def test_alone_as_among_others():
    family, keys = tasks.mlp(), jax.random.split(jax.random.key(0), 3)
    data = family.data()

    def run(key):
        problem = family.sample(key)
        params = family.init(key, problem)
        return family.loss(params, problem, family.batch(key, problem, data, "train"))

    together = jax.jit(jax.vmap(run))(keys)
    np.testing.assert_allclose(jax.jit(run)(keys[1]), together[1], rtol=1e-5)


@pytest.mark.parametrize("family", [FAMILIES[2], FAMILIES[3], FAMILIES[6]], ids=name)
def test_unknown_split(family):
    problem = family.sample(jax.random.key(0))
    with pytest.raises(ValueError, match="did you mean 'validation'"):
        family.batch(None, problem, family.data(), "validatoin")


# --- closed forms ----------------------------------------------------------------------------


def test_squares():
    simple, multi = tasks.simple(), tasks.simple_multi()
    assert simple.loss({"x": jnp.float32(3)}, (), ()) == 9
    assert multi.loss({"x_0": jnp.float32(3), "x_1": jnp.float32(2)}, (), ()) == 13
    assert set(multi.init(jax.random.key(0), ())) == {"x_0", "x_1"}


@pytest.mark.parametrize("distribution", ["uniform", "normal"])
def test_quadratic_against_loops(distribution):
    family = tasks.quadratic(dimension=3, batch_size=4, distribution=distribution)
    problem = family.sample(jax.random.key(3))
    x = np.asarray(family.init(jax.random.key(4), problem)["x"])
    w, y = map(np.asarray, problem)
    expected = np.mean([((w[b] @ x[b] - y[b]) ** 2).sum() for b in range(4)])
    np.testing.assert_allclose(family.loss({"x": x}, problem, ()), expected, rtol=1e-5)
    # At the least-squares solution nothing is left.
    solution = {"x": jnp.asarray(np.stack([np.linalg.solve(w[b], y[b]) for b in range(4)]))}
    assert family.loss(solution, problem, ()) < 1e-6


def test_mlp_against_numpy():
    family = tasks.mlp(activations=("relu", "tanh"), hidden=(7,))
    key = jax.random.key(5)
    problem = family.sample(key)._replace(activation=jnp.int32(1))
    params = family.init(key, problem)
    batch = family.batch(key, problem, family.data(), "train")
    w0, w1 = np.asarray(params["linear_0"]["w"]), np.asarray(params["linear_1"]["w"])
    logits = np.tanh(np.asarray(batch.inputs).reshape(128, 64) @ w0) @ w1
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = np.asarray(batch.labels)
    expected = -np.log(chances[np.arange(128), labels]).mean()
    np.testing.assert_allclose(family.loss(params, problem, batch), expected, rtol=1e-5)
    score = family.accuracy(params, problem, batch)
    np.testing.assert_allclose(score, (logits.argmax(1) == labels).mean(), rtol=1e-6)


def test_conv_against_loops():
    # One filter of ones, no bias, ReLU, pooling: a local sum of the image, then its maximum.
    family = tasks.conv(channels=(1,), kernel=3, dense=(), activations="relu")
    params = family.init(jax.random.key(0), family.sample(jax.random.key(0)))
    params["conv_0"] = {"w": jnp.ones((3, 3, 1, 1)), "b": jnp.zeros(1)}
    params["linear_0"] = {"w": jnp.eye(16, 10), "b": jnp.zeros(10)}
    image = np.asarray(datasets.load("digits").train.inputs[:1])
    padded = np.pad(image[0, :, :, 0], 1)
    sums = np.array([[padded[i : i + 3, j : j + 3].sum() for j in range(8)] for i in range(8)])
    logits = sums.reshape(4, 2, 4, 2).max((1, 3)).reshape(16)[:10]
    expected = np.log(np.exp(logits).sum()) - logits[3]
    batch = supervised.Batch(image, np.array([3]))
    loss = family.loss(params, supervised.Problem(0, 1, 1, 0), batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_batch_norm_ignores_the_scale_of_weights():
    family = tasks.conv(channels=(3,), dense=(), batch_norm=True, activations="relu")
    key = jax.random.key(6)
    problem = family.sample(key)
    params = family.init(key, problem)
    batch = family.batch(key, problem, family.data(), "train")
    larger = params | {"conv_0": {"w": 100 * params["conv_0"]["w"], "b": params["conv_0"]["b"]}}
    once, twice = (family.loss(p, problem, batch) for p in (params, larger))
    np.testing.assert_allclose(once, twice, rtol=1e-2)  # The variance has a floor of 1e-3.


def test_perfect_autoencoder_has_no_loss():
    family = tasks.autoencoder(hidden=(), activations="relu")
    params = {"linear_0": {"w": jnp.eye(64), "b": jnp.zeros(64)}}
    problem = family.sample(jax.random.key(0))
    assert family.loss(params, problem, family.batch(None, problem, family.data(), "test")) == 0


def test_the_teacher_knows_the_answer_up_to_noise():
    family = tasks.regression(hidden=(16,), activations="tanh", noise=(0.3, 0.3), rows=4096)
    problem = family.sample(jax.random.key(7))
    losses = {}
    for split in ("train", "validation"):
        batch = family.batch(None, problem, (), split)
        losses[split] = family.loss(problem.teacher, problem, batch)
        np.testing.assert_allclose(losses[split], 0.09, rtol=0.1)
    assert losses["train"] != losses["validation"]
    # Drawn rows are rows of the whole.
    drawn = family.batch(jax.random.key(8), problem, (), "train").labels
    assert set(np.asarray(drawn)) <= set(
        np.asarray(family.batch(None, problem, (), "train").labels)
    )


# --- batches ---------------------------------------------------------------------------------


def test_a_batch_of_few_distinct_rows_has_the_gradient_of_a_small_one():
    """Each problem has as many different rows as its share says, from the range, in every batch;
    validation batches are whole."""
    family = tasks.mlp(batch_size=64, distinct=(1 / 16, 1.0), subset=(1.0, 1.0))
    data = family.data()
    numbered = data._replace(
        train=data.train._replace(inputs=np.arange(len(data.train.labels), dtype=np.float32)),
        validation=data.validation._replace(
            inputs=np.arange(len(data.validation.labels), dtype=np.float32)
        ),
    )
    counts = []
    for i in range(20):
        problem = family.sample(jax.random.key(i))
        rows, whole = (
            np.asarray(family.batch(jax.random.key(99 + i), problem, numbered, split).inputs)
            for split in ("train", "validation")
        )
        wanted = round(float(problem.distinct) * 64)
        # Drawn with replacement from some 1,200, so that a few may be alike.
        assert 0.8 * wanted <= len(np.unique(rows)) <= wanted
        np.testing.assert_array_equal(rows[:wanted][: 64 - wanted], rows[wanted:][:wanted])
        assert len(np.unique(whole)) > 0.7 * 64
        counts.append(wanted)
    assert min(counts) < 10 and max(counts) > 40


@pytest.mark.parametrize("fraction, offset", [(0.25, 0.0), (0.3, 0.9), (1.0, 0.5), (1e-4, 0.999)])
def test_training_rows_come_from_the_window(fraction, offset):
    rows = 1000
    problem = supervised.Problem(0, 1, jnp.float32(fraction), jnp.float32(offset))
    draw = jax.jit(lambda key: supervised.draw(key, problem, 20_000, rows, "train"))
    seen = set(np.asarray(draw(jax.random.key(0))).tolist())
    start = math.floor(np.float32(offset) * np.float32(rows))
    window = {(start + i) % rows for i in range(max(1, round(fraction * rows)))}
    assert seen == window
    others = supervised.draw(jax.random.key(0), problem, 20_000, rows, "validation")
    assert set(np.asarray(others).tolist()) == set(range(rows))


def test_labels_stay_with_their_inputs():
    family, data = tasks.mlp(), datasets.load("digits")
    known = {row.tobytes(): label for row, label in zip(*data.train, strict=True)}
    batch = family.batch(
        jax.random.key(9), family.sample(jax.random.key(9)), family.data(), "train"
    )
    for row, label in zip(*map(np.asarray, batch), strict=True):
        assert known[row.tobytes()] == label


def test_whole_split_is_in_order():
    family, data = tasks.mlp(), datasets.load("digits")
    batch = family.batch(None, family.sample(jax.random.key(0)), family.data(), "train")
    np.testing.assert_array_equal(batch.inputs, data.train.inputs)
    np.testing.assert_array_equal(batch.labels, data.train.labels)


def test_text_rows_are_stretches_of_the_text():
    family, data = tasks.gru(context=16, batch_size=5), datasets.load("pydoc")
    batch = family.batch(
        jax.random.key(1), family.sample(jax.random.key(1)), family.data(), "train"
    )
    np.testing.assert_array_equal(batch.inputs[:, 1:], batch.labels[:, :-1])
    text = data.train.inputs.tobytes()
    assert all(np.asarray(row, np.uint8).tobytes() in text for row in batch.inputs)
    whole = family.batch(None, None, family.data(), "test")
    np.testing.assert_array_equal(
        whole.inputs.ravel(), data.test.inputs[: len(data.test.inputs) // 16 * 16]
    )


def test_text_rows_begin_at_every_place_that_a_row_fits():
    family, data = tasks.gru(context=16, width=2, batch_size=100), datasets.load("pydoc")
    text = data.validation.inputs[:19]
    short = data._replace(validation=datasets.Split(text[:18], text[1:]))
    batch = family.batch(jax.random.key(1), None, short, "validation")
    found = {np.asarray(row, np.uint8).tobytes() for row in batch.labels}
    assert found == {text[1 + i : 17 + i].tobytes() for i in range(3)}


@pytest.mark.parametrize("make", [tasks.nanogpt, tasks.gru])
def test_a_split_shorter_than_a_row_is_one_sentence(make, tmp_path, monkeypatch):
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_bytes(bytes(range(40, 104)) * 20)
    monkeypatch.setenv("L2L_DATA_DIR", str(tmp_path))
    # 1,280 characters and their labels: a tenth of them, or with nanoGPT's cuts a twentieth.
    most = 63 if make is tasks.nanogpt else 127
    for context in (most, most + 1):
        family = make(dataset="tinyshakespeare", context=context)
        problem, data = family.sample(jax.random.key(0)), family.data()
        assert family.batch(jax.random.key(0), problem, data, "train").labels.shape[1] == context
        for key in (None, jax.random.key(0)):
            if context == most:
                assert np.size(family.batch(key, problem, data, "validation").labels)
                continue
            with pytest.raises(UserError, match=f"validation split .*, of {most} characters"):
                family.batch(key, problem, data, "validation")


def test_transformer_sees_no_future():
    family = tasks.transformer(width=8, layers=1, context=8)
    problem = family.sample(jax.random.key(0))
    params = family.init(jax.random.key(0), problem)
    inputs = jnp.arange(8)[None] + 60

    @jax.jit
    def loss(labels, inputs):
        return family.loss(params, problem, supervised.Batch(inputs, labels))

    # The loss is linear in what each position predicts: change the last character alone, and the
    # share of the last label is all that may move.
    labels = jnp.stack([inputs[0], inputs[0].at[-1].set(3)])
    before = loss(labels[:1], inputs) - loss(labels[1:], inputs)
    changed = inputs.at[0, -1].set(5)
    after = loss(labels[:1], changed) - loss(labels[1:], changed)
    assert before != after
    labels = jnp.stack([inputs[0], inputs[0].at[:-1].set(3)])
    before = loss(labels[:1], inputs) - loss(labels[1:], inputs)
    after = loss(labels[:1], changed) - loss(labels[1:], changed)
    np.testing.assert_allclose(before, after, rtol=1e-4)


def test_a_residual_network_starts_as_its_linear_parts():
    # Blocks whose last matrix is zero add nothing: logits are linear(norm(linear(x))).
    family = tasks.residual(width=8, blocks=2)
    problem = family.sample(jax.random.key(0))
    params = family.init(jax.random.key(0), problem)
    params = {
        k: jax.tree.map(jnp.zeros_like, v) if k.endswith("_1") and "block" in k else v
        for k, v in params.items()
    }
    batch = family.batch(jax.random.key(1), problem, family.data(), "test")
    x = np.asarray(batch.inputs).reshape(64, -1) @ np.asarray(params["linear_0"]["w"])
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    truth = optax.softmax_cross_entropy_with_integer_labels(
        x @ params["linear_1"]["w"], batch.labels
    ).mean()
    np.testing.assert_allclose(family.loss(params, problem, batch), truth, rtol=1e-4)


def test_chunks_are_invisible():
    inputs = jnp.arange(25.0).reshape(25, 1)
    for rows in (1, 4, 5, 25, 100):
        np.testing.assert_array_equal(supervised.in_chunks(lambda x: x**2, inputs, rows), inputs**2)
    # What depends on the whole chunk sees one of full length at the end too.
    centred = supervised.in_chunks(lambda x: x - x.mean(), inputs, 10)
    np.testing.assert_array_equal(centred[20:], inputs[20:] - inputs[15:].mean())


# --- problems --------------------------------------------------------------------------------


def test_problems_fill_their_ranges():
    family = tasks.mlp(initial_scale=(0.5, 2.0), subset=(0.25, 1.0))
    problems = jax.vmap(family.sample)(jax.random.split(jax.random.key(0), 2000))
    assert set(np.asarray(problems.activation).tolist()) == {0, 1, 2, 3}
    for drawn, (low, high) in ((problems.scale, (0.5, 2)), (problems.fraction, (0.25, 1))):
        assert low <= drawn.min() < low * 1.01 and high * 0.99 < drawn.max() <= high * 1.00001
        # Log-uniform: the median is the geometric mean of the ends.
        np.testing.assert_allclose(np.median(drawn), math.sqrt(low * high), rtol=0.05)


@pytest.mark.parametrize("init, std", [("lecun", 1 / 8), ("he", 2**0.5 / 8), (0.01, 0.01)])
def test_initial_weights(init, std):
    family = tasks.mlp(hidden=(500,), init=init, initial_scale=(2.0, 2.0))
    layer = family.init(jax.random.key(0), family.sample(jax.random.key(0)))["linear_0"]
    np.testing.assert_allclose(layer["w"].std(), 2 * std, rtol=0.02)
    np.testing.assert_allclose(layer["b"].std(), std if init == 0.01 else 0, rtol=0.1)


def test_original_sizes():
    # 784·20 + 20 + 20·10 + 10 coordinates, as in the paper's MNIST problem.
    family = tasks.mnist()
    shapes = jax.eval_shape(lambda key: family.init(key, family.sample(key)), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 15_910
    family = tasks.cifar()
    shapes = jax.eval_shape(lambda key: family.init(key, family.sample(key)), jax.random.key(0))
    assert shapes["conv_0"]["w"].shape == (5, 5, 3, 16)
    assert shapes["linear_0"]["w"].shape == (4 * 4 * 16, 32)


def test_adam_learns():
    family = tasks.mlp(activations="relu", initial_scale=(1.0, 1.0), subset=(1.0, 1.0))
    data, adam = family.data(), optax.adam(1e-2)
    key = jax.random.key(0)
    problem = family.sample(key)
    params = family.init(key, problem)

    def step(carry, key):
        params, state = carry
        batch = family.batch(key, problem, data, "train")
        updates, state = adam.update(jax.grad(family.loss)(params, problem, batch), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(key, 200)
    (params, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, keys))((params, adam.init(params)))
    assert family.accuracy(params, problem, family.batch(None, problem, data, "test")) > 0.93


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tasks.mlp(dataset="digit"), "did you mean 'digits'"),
        (lambda: tasks.mlp(dataset="pydoc"), "no vector data set named 'pydoc'"),
        (lambda: tasks.mlp(activations=("relu", "thanh")), "did you mean 'tanh'"),
        (lambda: tasks.mlp(activations=()), "name at least one"),
        (lambda: tasks.mlp(subset=(0.5, 2.0)), "subset=.*<= 1"),
        (lambda: tasks.mlp(initial_scale=(0.0, 2.0)), "0 < low <= high"),
        (lambda: tasks.mlp(hidden=(0,)), "linear_0 of shape"),
        (lambda: tasks.mlp(init="lecunn"), "did you mean 'lecun'"),
        (lambda: tasks.mlp(init=-1.0), "below zero"),
        (lambda: tasks.mlp(batch_size=0), "batch_size=0"),
        (lambda: tasks.conv(dataset="wine"), "no image data set named 'wine'"),
        (lambda: tasks.conv(channels=(2, 2, 2, 2)), "give 1 to 3"),
        (lambda: tasks.conv(kernel=0), "kernel=0"),
        (lambda: tasks.gru(dataset="digits"), "no text data set"),
        (lambda: tasks.gru(context=0), "context=0"),
        (lambda: tasks.transformer(width=10, heads=3), "divides the width"),
        (lambda: tasks.autoencoder(objective="mes"), "did you mean 'mse'"),
        (lambda: tasks.quadratic(distribution="gaussian"), "choose from normal, uniform"),
        (lambda: tasks.quadratic(dimension=0), "dimension=0"),
        (lambda: tasks.regression(rows=0), "rows=0"),
        (lambda: tasks.residual(blocks=0), "blocks=0"),
        (lambda: tasks.mixer(dataset="wine"), "no image data set named 'wine'"),
        (lambda: tasks.row_lstm(width=0), "width=0"),
        (lambda: tasks.resnet(channels=()), "channels=0"),
        (lambda: tasks.resnet(depth=0), "depth=0"),
        (lambda: tasks.resnet(channels=(16, 36), groups=8), "groups=8 do not divide"),
        (lambda: tasks.vit(patch=5), "patch=5 does not divide the 28×28 images of mnist"),
        (lambda: tasks.vit(width=10, heads=3), "divides the width"),
        (lambda: tasks.vae(latent=0), "latent=0"),
        (lambda: tasks.vae(dataset="wine"), "no image data set named 'wine'"),
        (lambda: tasks.char_lstm(embedding=0), "embedding=0"),
        (lambda: tasks.char_lstm(dataset="digits"), "no text data set"),
        (lambda: tasks.nanogpt(heads=3), "divides the width"),
        (lambda: tasks.nanogpt(dataset="digits"), "no text data set"),
    ],
)
def test_bad_settings_get_one_clear_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
