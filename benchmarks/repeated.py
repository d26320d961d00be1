"""An optimizer on small data that a run goes through many times, told so and not told.

    python benchmarks/repeated.py [--optimizer lstm] [--only table,digits] [--seeds 3] [--json]

    table     breast cancer (scikit-learn), 400 rows, 30-64-64-2, 400 steps of 32 rows
    digits    128 of scikit-learn's digits, 64-32-10 with tanh, 300 steps of all of them
    finetune  300 digits 5 to 9 for a network of MNIST's 0 to 4 (`kinds.py`), 200 steps of 32
    mnist     1,000 images of MNIST at 14 × 14, 196-128-128-10, 1,000 steps of 64
    once      the same network, 200 steps of 64 from 8,500 images: here there is little to memorise

MNIST is looked for below L2L_DATA_DIR, and what needs it is skipped where it is missing. The
optimizer is told the steps and nothing else; then also how often they go through the data
(`l2l.load(…, epochs=…)`). AdamW has six rates with a cosine decay to zero, each with weight decays
of 0.01 and 0.3, and is shown at the best, by validation loss, of those twelve. Printed are
cross-entropies in nats, means over seeds: on held-out data at the end, and behind it of the batches
of the last twentieth of the steps.
"""

import itertools
import json

import jax
import jax.numpy as jnp
import kinds
import numpy as np
import optax
from sklearn.datasets import load_breast_cancer, load_digits

import l2l
from l2l.evaluation import statistics

RATES, DECAYS = kinds.RIVALS["AdamW"][1], (0.01, 0.3)


def classifier(split, sizes, batch: int, steps: int, activation=jax.nn.relu) -> kinds.Task:
    """Of rows and labels for training, and of those held out; batches are drawn with
    replacement, or are all rows if `batch` is as large."""
    (inputs, labels), (held_out, wanted) = split

    def whole(params, inputs, labels):
        return kinds.cross_entropy(kinds.mlp(params, inputs, activation), labels)

    drawn = kinds.classifying(inputs, labels, batch, activation)
    gain = 2.0 if activation is jax.nn.relu else 1.0
    return kinds.Task(
        lambda key: kinds.dense(key, sizes, gain),
        drawn if batch < len(inputs) else lambda params, key: whole(params, inputs, labels),
        lambda params: whole(params, held_out, wanted),
        steps,
    )


def halves(inputs, labels, count: int):
    """`count` rows in a fixed random order, and all others."""
    order = np.random.default_rng(0).permutation(len(inputs))
    inputs, labels = jnp.asarray(inputs[order], jnp.float32), jnp.asarray(labels[order])
    return (inputs[:count], labels[:count]), (inputs[count:], labels[count:])


def table():
    inputs, labels = load_breast_cancer(return_X_y=True)
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    return classifier(halves(inputs, labels, 400), [30, 64, 64, 2], 32, 400), 32 * 400 / 400


def digits():
    inputs, labels = load_digits(return_X_y=True)
    split = halves(inputs / 16, labels, 128)
    return classifier(split, [64, 32, 10], 128, 300, jnp.tanh), 300.0


def finetune():
    return kinds.finetune(), 32 * 200 / 300


def _mnist(count: int, steps: int):
    (inputs, labels), (held_out, wanted) = kinds.images("mnist14")
    split = (inputs[:count], labels[:count]), (held_out[:1500], wanted[:1500])
    return classifier(split, [196, 128, 128, 10], 64, steps), 64 * steps / min(count, len(inputs))


def mnist():
    return _mnist(1_000, 1_000)


def once():
    return _mnist(8_500, 200)


TASKS = {make.__name__: make for make in (table, digits, finetune, mnist, once)}


def compare(optimizer: str, name: str, seeds: int) -> dict:
    """The losses of the optimizer, of the optimizer that is told the epochs, and of AdamW."""
    task, epochs = TASKS[name]()
    knobs = {"loaded": {}, "told": {"epochs": epochs}}
    row: dict = {"task": name, "steps": task.steps, "epochs": epochs}
    for what, knob in knobs.items():
        row[what] = kinds.run(l2l.load(optimizer, num_steps=task.steps, **knob), task, seeds)
    settings = {
        (rate, decay): kinds.run(
            optax.adamw(optax.cosine_decay_schedule(rate, task.steps), weight_decay=decay),
            task,
            seeds,
        )
        for rate, decay in itertools.product(RATES, DECAYS)
    }
    rate, decay = best = kinds.best(settings, "validation")
    row["AdamW"] = settings[best] | {"rate": rate, "decay": decay}
    return row


def line(row: dict, optimizer: str) -> str:
    named = {"loaded": optimizer, "told": f"told {row['epochs']:.3g} epochs", "AdamW": "AdamW"}
    parts = [
        f"{name} {row[what]['validation']:.4g} ({row[what]['training']:.2g})"
        for what, name in named.items()
    ]
    best = row["AdamW"]
    return f"{row['task']:9}" + "; ".join(parts) + f" at {best['rate']:g}, {best['decay']:g}"


def main() -> None:
    flags, names = kinds.typed(__doc__, TASKS, seeds=3)
    rows = []
    for name in names:
        try:
            rows.append(compare(flags.optimizer, name, flags.seeds))
        except l2l.UserError as error:
            if not flags.json:
                print(f"{name:9}skipped: {error}", flush=True)
            continue
        if not flags.json:
            print(line(rows[-1], flags.optimizer), flush=True)
    if flags.json:
        print(json.dumps(rows))
    elif rows:

        def over_adamw(what: str) -> float:
            ratios = [row[what]["validation"] / row["AdamW"]["validation"] for row in rows]
            return statistics.geometric_mean(ratios)

        print(
            "Validation loss over AdamW's, geometric mean: "
            f"{over_adamw('loaded'):.3f}, told the epochs {over_adamw('told'):.3f}"
        )


if __name__ == "__main__":
    main()
