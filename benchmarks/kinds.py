"""An optimizer as loaded on twelve kinds of tasks that no suite has, beside tuned AdamW and SOAP.

    python benchmarks/kinds.py [--optimizer lstm] [--only siren,gcn] [--seeds 2] [--json]

The tasks are small networks of 200 to 2,000 steps: an image as a function (siren), noise prediction
(diffusion), a matrix of ratings (factor), a graph with 60 labels (gcn), Poisson's equation (pinn),
twelve layers without normalisation (deep), fine-tuning on 300 examples (finetune), a contrastive
encoder (contrast), a recurrent network (adding), inputs as they come (raw), a convolutional network
with instance normalisation (cifar) and a transformer (reverse). MNIST and CIFAR-10 are looked for
below L2L_DATA_DIR, and what needs them is skipped where they are missing.

The optimizer is told the steps, runs once for each seed, and nothing about it is tuned. AdamW has
six rates and `l2l.soap` five, each with a cosine decay to zero, and each is shown at its best rate,
which is chosen separately by training loss and by validation loss:

    training     mean loss of the batches of the last twentieth of the steps, each before its step
    validation   loss at the end on data, or at points, that it was not trained on; that of siren
                 is on the pixels that it was trained on

Losses are cross-entropies in nats or mean squared errors, and means over seeds. Ratios are the
optimizer's loss over the rival's, so that below 1 the optimizer is better. siren and pinn reach
losses of 1e-10, where ratios are far from 1: the geometric means are also printed without them.
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from typing import NamedTuple

# One thread: sums are then taken in the same order on every CPU, however many cores it has.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np
import optax

import l2l
from l2l.data import datasets
from l2l.evaluation import statistics

RIVALS = {
    "AdamW": (
        lambda rate: optax.adamw(rate, weight_decay=0.01),
        (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    ),
    "SOAP": (lambda rate: l2l.soap(rate), (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
}
MEASURES = ("validation", "training")
TINY = ("siren", "pinn")  # Tasks whose losses come near zero.
KEY = 11  # Of the first seed.


class Task(NamedTuple):
    """`init(key)` gives parameters; `loss(params, key)` is that of a random batch, and
    `validation(params)` the loss that is reported at the end."""

    init: Callable
    loss: Callable
    validation: Callable
    steps: int


# --- what tasks share ------------------------------------------------------------------------


def images(name: str, flat: bool = True):
    """(inputs, labels) for training and for validation; pixels in [0, 1]."""

    def floats(split):
        scale = 255 if np.asarray(split.inputs).dtype == np.uint8 else 1
        inputs = jnp.asarray(split.inputs, jnp.float32) / scale
        inputs = inputs.reshape(len(inputs), -1) if flat else inputs
        return inputs, jnp.asarray(split.labels)

    dataset = datasets.load(name)
    return floats(dataset.train), floats(dataset.validation)


def dense(key, sizes: list[int], gain: float = 1.0) -> list[dict]:
    """Layers of normal weights with the variance gain / inputs, and biases of zero."""
    keys = jax.random.split(key, len(sizes))
    return [
        {"w": jax.random.normal(k, (m, n)) * math.sqrt(gain / m), "b": jnp.zeros(n)}
        for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def linear(layer: dict, x):
    return x @ layer["w"] + layer["b"]


def mlp(layers: list[dict], x, activation: Callable = jax.nn.relu):
    for layer in layers[:-1]:
        x = activation(linear(layer, x))
    return linear(layers[-1], x)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs, targets):
    return jnp.mean((outputs - targets) ** 2)


def classifying(inputs, labels, size: int, activation: Callable = jax.nn.relu) -> Callable:
    """loss(params, key) of a network that classifies `size` random rows."""

    def loss(params, key):
        rows = jax.random.randint(key, (size,), 0, len(inputs))
        return cross_entropy(mlp(params, inputs[rows], activation), labels[rows])

    return loss


# --- tasks -----------------------------------------------------------------------------------


def siren() -> Task:
    """Sines that learn a CIFAR-10 image from coordinates, all at once (Sitzmann et al. 2020)."""
    (inputs, _), _ = images("cifar10", flat=False)
    axis = jnp.linspace(-1, 1, 32)
    places = jnp.stack(jnp.meshgrid(axis, axis), -1).reshape(-1, 2)
    colours = inputs[7].reshape(-1, 3) * 2 - 1
    sizes = [2, 128, 128, 3]

    def init(key):
        layers = []
        for i, k in enumerate(jax.random.split(key, 4)[:3]):
            m, n = sizes[i : i + 2]
            limit = 1 / m if i == 0 else math.sqrt(6 / m) / 30
            w = jax.random.uniform(k, (m, n), minval=-limit, maxval=limit)
            layers.append({"w": w, "b": jnp.zeros(n)})
        return layers

    def validation(params):
        return squared_error(mlp(params, places, lambda x: jnp.sin(30 * x)), colours)

    return Task(init, lambda params, key: validation(params), validation, 1_000)


def diffusion() -> Task:
    """An MLP that predicts the noise in noisy digits (Ho et al. 2020)."""
    (train, _), (held_out, _) = images("digits")
    train, held_out = (x / x.max() * 2 - 1 for x in (train, held_out))
    frequencies = 2 ** jnp.arange(6)

    def denoising(params, key, data, size):
        rows, times, noises = jax.random.split(key, 3)
        clean = data[jax.random.randint(rows, (size,), 0, len(data))]
        time = jax.random.uniform(times, (size, 1))
        noise = jax.random.normal(noises, clean.shape)
        noisy = jnp.cos(time * jnp.pi / 2) * clean + jnp.sin(time * jnp.pi / 2) * noise
        waves = [jnp.sin(time * frequencies), jnp.cos(time * frequencies)]
        inputs = jnp.concatenate([noisy, jnp.concatenate(waves, 1)], 1)
        return squared_error(mlp(params, inputs, jax.nn.silu), noise)

    return Task(
        lambda key: dense(key, [76, 256, 256, 256, 64]),
        lambda params, key: denoising(params, key, train, 128),
        lambda params: denoising(params, jax.random.key(5), held_out, 4096),
        2_000,
    )


def factor() -> Task:
    """A fifth of the ratings of 300 films by 500 critics, factored; they have rank 8 and noise."""
    random = np.random.default_rng(0)
    critics = jnp.asarray(random.normal(size=(500, 8)) / 8**0.25)
    films = jnp.asarray(random.normal(size=(300, 8)) / 8**0.25)
    ratings = critics @ films.T + jnp.asarray(random.normal(size=(500, 300))) * 0.3
    order = random.permutation(150_000)
    train, held_out = jnp.asarray(order[:30_000]), jnp.asarray(order[30_000:40_000])

    def init(key):
        other = jax.random.fold_in(key, 1)
        return {
            "critics": jax.random.normal(key, (500, 16)) * 0.1,
            "films": jax.random.normal(other, (300, 16)) * 0.1,
            "bias_critics": jnp.zeros(500),
            "bias_films": jnp.zeros(300),
        }

    def error(params, places):
        critic, film = places // 300, places % 300
        rating = jnp.sum(params["critics"][critic] * params["films"][film], -1)
        rating = rating + params["bias_critics"][critic] + params["bias_films"][film]
        return squared_error(rating, ratings.reshape(-1)[places])

    def loss(params, key):
        return error(params, train[jax.random.randint(key, (256,), 0, 30_000)])

    return Task(init, loss, lambda params: error(params, held_out), 2_000)


def gcn() -> Task:
    """A graph of 600 nodes in 4 classes, 60 of them labelled (Kipf & Welling 2017)."""
    random = np.random.default_rng(0)
    nodes, classes, labelled = 600, 4, 60
    labels = random.integers(0, classes, nodes)
    chances = np.where(labels[:, None] == labels[None], 0.03, 0.006)
    edges = np.triu(random.random((nodes, nodes)) < chances, 1)
    edges = edges + edges.T + np.eye(nodes)
    scale = 1 / np.sqrt(edges.sum(1))
    spread = jnp.asarray(scale[:, None] * edges * scale, jnp.float32)
    centres = np.eye(classes)[labels] @ random.normal(size=(classes, 32)) * 0.5
    features = jnp.asarray(centres + random.normal(size=(nodes, 32)), jnp.float32)
    labels = jnp.asarray(labels)

    def logits(params, key=None):
        """With a key, for dropout, those of training."""
        hidden = spread @ (features @ params[0]["w"]) + params[0]["b"]
        hidden = jax.nn.relu(hidden)
        if key is not None:
            hidden = hidden * jax.random.bernoulli(key, 0.5, hidden.shape) * 2
        return spread @ (hidden @ params[1]["w"]) + params[1]["b"]

    def loss(params, key):
        return cross_entropy(logits(params, key)[:labelled], labels[:labelled])

    def validation(params):
        return cross_entropy(logits(params)[labelled:], labels[labelled:])

    return Task(lambda key: dense(key, [32, 32, classes]), loss, validation, 300)


def pinn() -> Task:
    """Poisson's equation on the unit square, 0 at its edges (Raissi et al. 2019)."""

    def bump(points, height=1.0):
        """Of height 1 the solution."""
        return height * jnp.sin(jnp.pi * points[..., 0]) * jnp.sin(jnp.pi * points[..., 1])

    def value(params, point):
        return mlp(params, point[None], jnp.tanh)[0, 0]

    def loss(params, key):
        inner, outer = jax.random.split(key)

        def residual(point):
            curvature = jax.hessian(lambda point: value(params, point))(point)
            return curvature[0, 0] + curvature[1, 1] + bump(point, 2 * jnp.pi**2)

        residuals = jax.vmap(residual)(jax.random.uniform(inner, (128, 2)))
        along, zero, one = jax.random.uniform(outer, (64,)), jnp.zeros(64), jnp.ones(64)
        sides = [(along, zero), (along, one), (zero, along), (one, along)]
        edges = jnp.concatenate([jnp.stack(side, 1) for side in sides])
        values = jax.vmap(lambda point: value(params, point))(edges)
        return jnp.mean(residuals**2) + 10 * jnp.mean(values**2)

    points = jax.random.uniform(jax.random.key(9), (500, 2))

    def validation(params):
        values = jax.vmap(lambda point: value(params, point))(points)
        return squared_error(values, bump(points))

    return Task(lambda key: dense(key, [2, 32, 32, 32, 1]), loss, validation, 2_000)


def deep() -> Task:
    """Twelve hidden layers of ReLU and no normalisation, on 8,000 images of MNIST, 14x14."""
    (inputs, labels), (held_out, wanted) = images("mnist14")
    sizes = [196] + [64] * 12 + [10]
    return Task(
        lambda key: dense(key, sizes, 2.0),
        classifying(inputs[:8000], labels[:8000], 64),
        lambda params: cross_entropy(mlp(params, held_out[:2000]), wanted[:2000]),
        1_000,
    )


def finetune() -> Task:
    """A network of MNIST's digits 0 to 4 learns 5 to 9 from 300 examples."""
    (inputs, labels), (held_out, wanted) = images("mnist14")
    before = np.flatnonzero(np.asarray(labels) < 5)
    after = np.flatnonzero(np.asarray(labels) >= 5)[:300]
    new = np.flatnonzero(np.asarray(wanted) >= 5)
    held_out, wanted = held_out[new], wanted[new]
    pretraining = classifying(inputs[before], labels[before], 128)
    adam = optax.adam(1e-3)

    def init(key):
        params = dense(key, [196, 128, 128, 10], 2.0)

        def step(carry, key):
            params, state = carry
            updates, state = adam.update(jax.grad(pretraining)(params, key), state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key, 500)
        return jax.lax.scan(step, (params, adam.init(params)), keys)[0][0]

    def validation(params):
        return cross_entropy(mlp(params, held_out), wanted)

    return Task(init, classifying(inputs[after], labels[after], 32), validation, 200)


def contrast() -> Task:
    """Two noisy views of an image find each other among 128, MNIST 14x14 (Chen et al. 2020)."""
    (train, _), (held_out, _) = images("mnist14")
    size = 128

    def embedded(params, view):
        z = mlp(params, view, jax.nn.gelu)
        return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-6)

    def contrastive(params, key, data):
        rows, *keys = jax.random.split(key, 5)
        batch = data[jax.random.randint(rows, (size,), 0, len(data))]

        def view(mask, noise):
            kept = batch * jax.random.bernoulli(mask, 0.5, batch.shape)
            return kept + 0.1 * jax.random.normal(noise, batch.shape)

        one, other = embedded(params, view(*keys[:2])), embedded(params, view(*keys[2:]))
        return cross_entropy(one @ other.T / 0.2, jnp.arange(size))

    def validation(params):
        keys = [jax.random.key(i) for i in range(4)]
        return jnp.mean(jnp.stack([contrastive(params, key, held_out) for key in keys]))

    return Task(
        lambda key: dense(key, [196, 128, 128, 32]),
        lambda params, key: contrastive(params, key, train),
        validation,
        1_000,
    )


def adding() -> Task:
    """A GRU adds the two marked ones of 40 numbers (Hochreiter & Schmidhuber 1997)."""
    length, width = 40, 32

    def draw(key, size):
        numbers, places = jax.random.split(key)
        values = jax.random.uniform(numbers, (size, length))
        places = jax.random.split(places, size)
        pairs = jax.vmap(lambda key: jax.random.permutation(key, length)[:2])(places)
        marks = jax.nn.one_hot(pairs, length).sum(1)
        return jnp.stack([values, marks], -1), (values * marks).sum(1)

    def init(key):
        gates, candidate, out = jax.random.split(key, 3)
        return {
            "gates": dense(gates, [width + 2, 2 * width])[0],
            "candidate": dense(candidate, [width + 2, width])[0],
            "out": dense(out, [width, 1])[0],
        }

    def error(params, inputs, sums):
        def step(hidden, x):
            both = jnp.concatenate([hidden, x], -1)
            gates = jax.nn.sigmoid(linear(params["gates"], both))
            reset, keep = jnp.split(gates, 2, -1)
            both = jnp.concatenate([reset * hidden, x], -1)
            candidate = jnp.tanh(linear(params["candidate"], both))
            return keep * hidden + (1 - keep) * candidate, None

        start = jnp.zeros((len(inputs), width))
        hidden, _ = jax.lax.scan(step, start, inputs.swapaxes(0, 1))
        return squared_error(linear(params["out"], hidden)[:, 0], sums)

    held_out = draw(jax.random.key(77), 1000)
    return Task(
        init,
        lambda params, key: error(params, *draw(key, 64)),
        lambda params: error(params, *held_out),
        2_000,
    )


def raw() -> Task:
    """Digits with pixels of 0 to 16 as they come, which nobody normalised."""
    (inputs, labels), (held_out, wanted) = images("digits")
    return Task(
        lambda key: dense(key, [64, 64, 10]),
        classifying(inputs * 16, labels, 64),
        lambda params: cross_entropy(mlp(params, held_out * 16), wanted),
        500,
    )


def cifar() -> Task:
    """Three convolutions with instance normalisation on CIFAR-10, with mirror images."""
    (inputs, labels), (held_out, wanted) = images("cifar10", flat=False)
    channels = [3, 16, 32, 64]

    def init(key):
        keys = jax.random.split(key, 5)
        layers = []
        for k, m, n in zip(keys, channels, channels[1:], strict=False):
            w = jax.random.normal(k, (3, 3, m, n)) * math.sqrt(2 / (9 * m))
            layers.append({"w": w, "scale": jnp.ones(n), "b": jnp.zeros(n)})
        return {"conv": layers, "out": dense(keys[4], [64, 10])[0]}

    def logits(params, x):
        for layer in params["conv"]:
            x = jax.lax.conv_general_dilated(
                x, layer["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            mean, variance = (f((1, 2, 3), keepdims=True) for f in (x.mean, x.var))
            x = (x - mean) / jnp.sqrt(variance + 1e-5)
            x = jax.nn.relu(x * layer["scale"] + layer["b"])
        return linear(params["out"], x.mean((1, 2)))

    def loss(params, key):
        draw, flip = jax.random.split(key)
        rows = jax.random.randint(draw, (64,), 0, len(inputs))
        batch, mirrored = inputs[rows], jax.random.bernoulli(flip, 0.5, (64, 1, 1, 1))
        batch = jnp.where(mirrored, batch[:, :, ::-1], batch)
        return cross_entropy(logits(params, batch), labels[rows])

    def validation(params):
        return cross_entropy(logits(params, held_out[:1000]), wanted[:1000])

    return Task(init, loss, validation, 1_000)


def reverse() -> Task:
    """A transformer of two layers reverses sequences of 12 out of 16 symbols."""
    vocabulary, length, width, heads, separator = 18, 12, 64, 4, 16

    def draw(key, size):
        sequence = jax.random.randint(key, (size, length), 0, 16)
        middle = jnp.full((size, 1), separator)
        return jnp.concatenate([sequence, middle, sequence[:, ::-1]], 1)

    def init(key):
        keys = iter(jax.random.split(key, 40))

        def normal(*shape):
            return jax.random.normal(next(keys), shape) * 0.02

        def block():
            return {
                "qkv": normal(width, 3 * width),
                "out": normal(width, width),
                "mlp_in": normal(width, 4 * width),
                "mlp_out": normal(4 * width, width),
                "norm1": jnp.ones(width),
                "norm2": jnp.ones(width),
            }

        return {
            "embedding": normal(vocabulary, width),
            "positions": normal(2 * length + 1, width),
            "blocks": [block(), block()],
            "norm": jnp.ones(width),
            "head": normal(width, vocabulary),
        }

    def norm(x, scale):
        mean, variance = (f(-1, keepdims=True) for f in (x.mean, x.var))
        return (x - mean) / jnp.sqrt(variance + 1e-5) * scale

    def split(x):
        """[rows, places, width] to [rows, heads, places, width of a head]."""
        return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)

    def attention(block, x):
        q, k, v = map(split, jnp.split(norm(x, block["norm1"]) @ block["qkv"], 3, -1))
        past = jnp.tril(jnp.ones((x.shape[1], x.shape[1])))
        weights = q @ k.swapaxes(-1, -2) / math.sqrt(width // heads)
        weights = jax.nn.softmax(jnp.where(past > 0, weights, -1e9))
        return (weights @ v).swapaxes(1, 2).reshape(x.shape) @ block["out"]

    def error(params, tokens):
        given, wanted = tokens[:, :-1], tokens[:, length + 1 :]
        x = params["embedding"][given] + params["positions"][: given.shape[1]]
        for block in params["blocks"]:
            x = x + attention(block, x)
            hidden = jax.nn.gelu(norm(x, block["norm2"]) @ block["mlp_in"])
            x = x + hidden @ block["mlp_out"]
        logits = norm(x, params["norm"]) @ params["head"]
        return cross_entropy(logits[:, length:], wanted)

    held_out = draw(jax.random.key(3), 500)
    return Task(
        init,
        lambda params, key: error(params, draw(key, 32)),
        lambda params: error(params, held_out),
        1_500,
    )


TASKS = {
    maker.__name__: maker
    for maker in (
        *(siren, diffusion, factor, gcn, pinn, deep),
        *(finetune, contrast, adding, raw, cifar, reverse),
    )
}


# --- measuring -------------------------------------------------------------------------------


def run(optimizer, task: Task, seeds: int) -> dict[str, float]:
    """The losses of `MEASURES`, means over seeds."""

    @jax.jit
    def trained(key):
        params = task.init(jax.random.fold_in(key, 0))

        def step(carry, t):
            params, state = carry
            key_of_step = jax.random.fold_in(key, t + 1)
            loss, gradient = jax.value_and_grad(task.loss)(params, key_of_step)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), loss

        start = (params, optimizer.init(params))
        (params, _), losses = jax.lax.scan(step, start, jnp.arange(task.steps))
        return losses, task.validation(params)

    ends = [jax.device_get(trained(jax.random.key(KEY + i))) for i in range(seeds)]
    losses, validation = (np.mean(x, 0) for x in zip(*ends, strict=True))
    training = losses[-task.steps // 20 :].mean()
    return {"validation": float(validation), "training": float(training)}


def best(runs: dict, measure: str):
    """The setting of the lowest loss, of {setting: losses}; one that diverged comes last."""
    return min(runs, key=lambda setting: statistics.or_infinite(runs[setting][measure]))


def compare(optimizer: str, name: str, task: Task, seeds: int) -> dict:
    """The optimizer's losses, and for each rival its own, their rates and the ratios."""
    own = run(l2l.load(optimizer, num_steps=task.steps), task, seeds)
    row: dict = {"task": name, "steps": task.steps, **own}
    for rival, (make, rates) in RIVALS.items():
        runs = {
            rate: run(make(optax.cosine_decay_schedule(rate, task.steps)), task, seeds)
            for rate in rates
        }
        row[rival] = {}
        for measure in MEASURES:
            rate = best(runs, measure)
            loss = runs[rate][measure]
            with np.errstate(divide="ignore"):  # SOAP reaches 0 on `reverse`.
                ratio = float(np.divide(own[measure], loss))
            row[rival][measure] = {"loss": loss, "rate": rate, "ratio": ratio}
    return row


def line(row: dict, optimizer: str) -> str:
    """Every loss; behind a rival's in brackets the rate and the ratio."""
    parts = []
    for measure in MEASURES:
        text = f"{measure}: {optimizer} {row[measure]:.4g}"
        for rival in RIVALS:
            found = row[rival][measure]
            text += f", {rival} {found['loss']:.4g} ({found['rate']:g}; {found['ratio']:.3f})"
        parts.append(text)
    return f"{row['task']:9} {'; '.join(parts)}"


def means(rows: list[dict]) -> dict:
    """Geometric means of the ratios, by measure and rival."""

    def mean(measure: str, rival: str) -> float:
        return statistics.geometric_mean([row[rival][measure]["ratio"] for row in rows])

    return {measure: {rival: mean(measure, rival) for rival in RIVALS} for measure in MEASURES}


def summary(rows: list[dict]) -> dict[str, dict]:
    """The means over all tasks and, where that differs, over those with losses worth the name."""
    groups = {"all tasks": rows}
    others = [row for row in rows if row["task"] not in TINY]
    if len(others) < len(rows):
        groups["without siren and pinn"] = others
    return {name: means(group) for name, group in groups.items() if group}


def typed(described: str | None, tasks: dict, seeds: int) -> tuple[argparse.Namespace, list[str]]:
    """(the flags of a benchmark of such tasks, the names of those that are asked for)."""
    parser = argparse.ArgumentParser(description=(described or "").split("\n")[0])
    parser.add_argument("--optimizer", default="lstm", help="a released name, a run or an export")
    parser.add_argument("--only", default=",".join(tasks), help="tasks, with commas between them")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    flags = parser.parse_args()
    names = flags.only.split(",")
    if unknown := [name for name in names if name not in tasks]:
        parser.error(f"no task {', '.join(unknown)}: choose from {', '.join(tasks)}")
    return flags, names


def main() -> None:
    flags, names = typed(__doc__, TASKS, seeds=2)
    if not flags.json:
        print("Losses; in brackets a rival's best rate and the optimizer's loss over the rival's.")
    rows, skipped = [], {}
    for name in names:
        try:
            task = TASKS[name]()
        except l2l.UserError as error:
            skipped[name] = str(error)
            if not flags.json:
                print(f"{name:9} skipped: {error}", flush=True)
            continue
        rows.append(compare(flags.optimizer, name, task, flags.seeds))
        if not flags.json:
            print(line(rows[-1], flags.optimizer), flush=True)
    ratios = summary(rows)
    if flags.json:
        about = {"optimizer": flags.optimizer, "seeds": flags.seeds, "skipped": skipped}
        print(json.dumps({**about, "tasks": rows, "means": ratios}))
        return
    for group, found in ratios.items():
        texts = [
            f"{measure} {ratio:.3f} of {rival}"
            for measure, by_rival in found.items()
            for rival, ratio in by_rival.items()
        ]
        print(f"geometric means, {group}: {', '.join(texts)}")


if __name__ == "__main__":
    main()
