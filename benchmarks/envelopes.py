"""Any optimizer on two MNIST tasks, beside the published envelope of tuned Adam.

    python benchmarks/envelopes.py --optimizer=lstm,"adam(1e-3)" [--steps 1000,2000] [--seeds 2]

The envelope is the lower one over Adam, two decays of its rate and RAdam, each with 15 rates and 5
seeds, from the curves that google/learned_optimization publishes with its tasks
`ImageMLP_Mnist_128x128x128_Relu` (cross-entropy) and `ImageMLPAE_Mnist_128x32x128_bs128` (squared
error through a sigmoid, mean over pixels). Pixels in [0, 1], batches of 128, weights of haiku's
MLP: normal, cut at two deviations, with the deviation 1/√inputs; biases of zero.

    loss       of training batches, each before its step: there the loss on 5 batches, smoothed
               over some 200 steps; here the mean over the last 200 steps, which are as many fresh
               batches; mean over seeds
    envelope   the published one after as many steps
    speed-up   the steps at which the envelope is where the optimizer ends, over the optimizer's;
               interpolated between the published steps in the logarithms of steps and losses,
               and a bound where the loss is outside

Every horizon is a run of its own, which is told it. The envelope's curves ran to their ends, so
that its short runs had no rate that falls to zero where they end: an optimizer that is told the
horizon has that advantage.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from l2l import tasks
from l2l.console.configuration import split
from l2l.core import base
from l2l.data import datasets
from l2l.evaluation import cache, entries, report
from l2l.evaluation.cells import Cell
from l2l.evaluation.curves import Problems
from l2l.tasks.mlp import dense

KEY = 47
WINDOW = 200
STEPS = (1_000, 2_000, 5_000, 10_000, 30_000, 100_000)
ENVELOPES = {
    "classifier": (0.1069, 0.0498, 0.0106, 4.7e-4, 7.9e-7, 6.9e-10),
    "autoencoder": (0.01666, 0.01113, 0.00793, 0.00673, 0.00560, 0.00495),
}


def classifier() -> base.TaskFamily:
    """784-128-128-128-10, ReLU."""
    family = tasks.mlp(
        dataset="mnist",
        hidden=(128, 128, 128),
        activations=("relu",),
        initial_scale=(1.0, 1.0),
        subset=(1.0, 1.0),
    )
    return family._replace(init=truncated(family.init))


def autoencoder() -> base.TaskFamily:
    """784-128-32-128-784, ReLU, with a sigmoid at the end."""
    family = tasks.autoencoder(
        dataset="mnist",
        hidden=(128, 32, 128),
        activations=("relu",),
        initial_scale=(1.0, 1.0),
        subset=(1.0, 1.0),
    )
    forward = dense(("relu",))

    def loss(params, problem, batch):
        images = batch.inputs.reshape(len(batch.inputs), -1)
        pixels = jax.nn.sigmoid(forward(params, problem.activation, images))
        return jnp.mean((pixels - images) ** 2)

    return family._replace(init=truncated(family.init), loss=loss)


def truncated(init: Callable) -> Callable:
    """An initialisation with the matrices of `haiku.nets.MLP` in place of its own."""

    def initialise(key, problem):
        leaves, tree = jax.tree.flatten(init(key, problem))
        for i, leaf in enumerate(leaves):
            if leaf.ndim > 1:
                draw = jax.random.truncated_normal(jax.random.fold_in(key, i), -2, 2, leaf.shape)
                leaves[i] = draw / np.sqrt(leaf.shape[0])
        return jax.tree.unflatten(tree, leaves)

    return initialise


class SpeedUp(NamedTuple):
    """`bound` is "" for a value between published steps, ">" or "<" for one beyond them."""

    value: float
    bound: str

    def __str__(self):
        return f"{self.bound} {self.value:.3g}".strip()


def speed_up(name: str, steps: int, loss: float) -> SpeedUp:
    """How many times more steps the envelope `name` takes to a loss; see the top of this file."""
    envelope = ENVELOPES[name]
    if not loss <= envelope[0]:  # NaN is above, too.
        return SpeedUp(STEPS[0] / steps, "<")
    if loss < envelope[-1]:
        return SpeedUp(STEPS[-1] / steps, ">")
    # np.interp wants increasing losses.
    where = np.interp(np.log(loss), np.log(envelope[::-1]), np.log(STEPS[::-1]))
    return SpeedUp(float(np.exp(where)) / steps, "")


def published(name: str, steps: int) -> float:
    """The envelope after so many steps, interpolated likewise; NaN outside."""
    if not STEPS[0] <= steps <= STEPS[-1]:
        return float("nan")
    return float(np.exp(np.interp(np.log(steps), np.log(STEPS), np.log(ENVELOPES[name]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", default="lstm", help="whatever l2l.evaluate takes")
    parser.add_argument("--steps", default="1000,2000", help="runs of these lengths")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", default="classifier,autoencoder")
    parser.add_argument("--cache", default="envelopes", help="keeps what was measured")
    flags = parser.parse_args()
    if not datasets.present("mnist"):
        print(f"MNIST is not present below {datasets.data_dir()}: it is what both tasks are of.")
        return
    field = [entries.read(text) for text in split(flags.optimizer)]
    makers = {"classifier": classifier, "autoencoder": autoencoder}
    rows, problems = [], Problems(jax.random.key(KEY), flags.seeds)
    for name in flags.only.split(","):
        # Whole splits are not looked at: a sample of them is enough.
        family, data = Cell(name, makers[name](), scored=1_000).load()
        for steps in map(int, flags.steps.split(",")):
            for entry in field:
                where = (family, data, problems, steps, flags.cache)
                run = cache.trained(*entry.at(steps), *where)
                loss = float(np.mean(run.losses[:, -WINDOW:], dtype=float))
                row = {"task": name, "steps": steps, "optimizer": entry.name, "loss": loss}
                row |= {"envelope": published(name, steps)}
                rows.append(row | {"speed-up": str(speed_up(name, steps, loss))})
                print(rows[-1], flush=True)
    print(f"\n{report.table(rows)}")


if __name__ == "__main__":
    main()
