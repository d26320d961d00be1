"""Networks for the released optimizer on two axes, quality and cost, at equal meta-training time.

    python benchmarks/networks.py [--seconds 240] [--only "8;8 + tensors 16"] [--output networks]
    python benchmarks/networks.py --judge lstm,mlp

Every network is meta-trained on the same small mixture (four families of `configs/release.py`) for
the same processor time, compilation left out, on one device and with the schedule of the release
fitted to the meta-steps that this allows. It is then judged on tasks that are neither in the
mixture nor in the scorecard, beside Adam tuned for each task and horizon (those on MNIST are left
out, and it says so, where MNIST is not present). A network's export is kept in --output, so that an
interrupted comparison goes on where it was. With --judge nothing is trained: released names or
exports are judged.

    loss, test     final training and test loss over tuned Adam's, geometric mean over the cells
    no worse       the share of cells with a training loss no worse than tuned Adam's
    step           one update of 100,000 parameters over that of `optax.adam` (median of pairs)
"""

import argparse
import functools
import os
import re
import statistics
import time
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import jax.numpy as jnp
import optax

from l2l.console.progress import Bar
from l2l.core import base
from l2l.data import datasets
from l2l.evaluation import comparison, curves, report
from l2l.evaluation import statistics as means
from l2l.evaluation.cells import Cell
from l2l.evaluation.comparison import Entry
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid
from l2l.storage import exports, loading
from l2l.tasks import registry
from l2l.training.experiment import build_experiment
from l2l.training.loop import start

SOAP = dict(matrix_size=256, anneal=1.0, learning_rate=0.04)
NETWORKS = {
    "8, Adam's directions": dict(hidden_size=8),
    "8 + tensors 16, Adam's directions": dict(hidden_size=8, tensor_size=16),
    "4": dict(hidden_size=4, **SOAP),
    "8": dict(hidden_size=8, **SOAP),
    "16": dict(hidden_size=16, **SOAP),
    "32": dict(hidden_size=32, **SOAP),
    "2 x 8": dict(hidden_size=8, layers=2, **SOAP),
    "4 + tensors 16": dict(hidden_size=4, tensor_size=16, **SOAP),
    "8 + tensors 16": dict(hidden_size=8, tensor_size=16, **SOAP),
    "16 + tensors 16": dict(hidden_size=16, tensor_size=16, **SOAP),
}
RANGES = dict(initial_scale=(0.5, 2.0), subset=(0.25, 1.0))
MIXTURE = (
    dict(name="mlp", hidden=(32,), batch_size=128, **RANGES),
    dict(name="logistic", batch_size=64, init=0.0, **RANGES),
    dict(name="regression", inputs=10, hidden=(32,), batch_size=64, initial_scale=(0.5, 2.0)),
    dict(name="autoencoder", hidden=(32, 8, 32), batch_size=64, **RANGES),
)
WHOLE = dict(initial_scale=(1.0, 1.0), subset=(1.0, 1.0))
RELU = dict(activations=("relu",), batch_size=64, **WHOLE)
JUDGES = (
    dict(RELU, name="mlp", hidden=(64,), activations=("tanh",)),
    dict(RELU, name="mlp", dataset="mnist14", hidden=(32, 32)),
    dict(WHOLE, name="logistic", dataset="mnist14", batch_size=64),
    dict(
        name="regression",
        inputs=20,
        hidden=(64,),
        noise=(0.1, 0.1),
        activations=("relu",),
        batch_size=64,
        initial_scale=(1.0, 1.0),
    ),
    dict(RELU, name="autoencoder", hidden=(16,), objective="bce", activations=("sigmoid",)),
    dict(RELU, name="conv", channels=(8, 8, 8), dense=(), batch_size=32),
    dict(RELU, name="mlp", hidden=(16,) * 5, activations=("gelu",)),
    dict(RELU, name="mlp", hidden=(32,), batch_size=128, initial_scale=(4.0, 4.0)),
)
HORIZONS = (200, 1000)
KEY = functools.partial(jax.random.key, 77)
GROUP = 10


def config(network: dict, steps: int) -> dict:
    rate = dict(name="cosine_decay_schedule", init_value=2e-3)
    return dict(
        task=MIXTURE,
        augmentations=(dict(name="rescale", per="tensor", magnitude=1.0, probability=0.5),),
        optimizer={"name": "lstm", "learning_rate": 3e-3, "eps_root": 1e-12, **network},
        objective=dict(on="both", form="log", validation_weight=0.9, floor=3e-5, emphasis=1.0),
        inner=dict(length=100, hide_horizon_probability=0.25),
        horizon=dict(name="log_uniform", shortest=100, longest=1000),
        meta=dict(
            steps=steps,
            num_problems=2,
            group=GROUP,
            optimizer=dict(name="adam", learning_rate=rate),
        ),
    )


def train(network: dict, seconds: float, path: Path) -> None:
    """Meta-trains a network for that processor time and exports it."""
    probe, _ = run(network, GROUP * 1000, lambda done, spent: done < 3)
    steps = max(1, round(seconds / probe)) * GROUP
    spent, theta = run(network, steps, lambda done, spent: done * GROUP < steps)
    about = dict(meta_steps=steps, seconds=spent * steps / GROUP, config=config(network, steps))
    specification = build_experiment(config(network, steps)).specification
    exports.export(path, specification, theta, about)


def run(network: dict, steps: int, going):
    """(median processor seconds a group of meta-steps, theta) while `going` says so."""
    loop = start(build_experiment(config(network, steps)), jax.devices()[:1])
    loop.compile()
    times = []
    while going(len(times), sum(times)):
        began = time.process_time()
        loop.advance()
        times.append(time.process_time() - began)
    return statistics.median(times), loop.theta


def step_cost(optimizer, theta, rounds: int = 15) -> float:
    """Time of an update of 100,000 parameters over Adam's, in pairs."""
    params = {"w": jnp.ones((300, 333)), "b": jnp.zeros(333)}
    gradients = jax.tree.map(jnp.cos, params)

    def timed(transform):
        state = jax.jit(transform.init)(params)
        update = jax.jit(transform.update).lower(gradients, state, params).compile()

        def once():
            began = time.perf_counter()
            jax.block_until_ready(update(gradients, state, params))
            return time.perf_counter() - began

        once()
        return once

    ours, adam = timed(optimizer.bind(theta)), timed(optax.adam(1e-3))
    return statistics.median(
        min(ours() for _ in range(3)) / min(adam() for _ in range(3)) for _ in range(rounds)
    )


def cells() -> list[Cell]:
    found = []
    for section in JUDGES:
        family = registry.task(section)
        if datasets.present(section.get("dataset", "digits")):
            found.append(Cell(family.name, family))
        else:
            print(f"{family.name} is left out: its data are not present.")
    return found


def judged(name, optimizer, theta, places, seeds: int, folder: Path) -> list[dict]:
    """A row a horizon."""
    bar = Bar(1.0)
    measured = comparison.measure(
        *([Entry(name, optimizer, theta)], places, HORIZONS, Problems(KEY(), seeds)),
        grids=(Grid("adam"),),
        cache_dir=folder / "cache",
        progress=bar.show,
    )
    own = [row for row in measured if row.optimizer == name]
    bar.close()
    rows = []
    for horizon in HORIZONS:
        here = [row for row in own if row.steps == horizon]
        row = {"network": name, "weights": base.count(theta), "steps": horizon}
        row |= {
            "loss": means.geometric_mean([r.ratio for r in here]),
            "test": means.geometric_mean([r.test_ratio for r in here]),
            "no worse": sum(r.ratio <= 1 for r in here) / len(here),
            "diverged": sum(r.diverged for r in here),
        }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240.0, help="of a processor, a network")
    parser.add_argument("--only", default=";".join(NETWORKS), help="names from NETWORKS")
    parser.add_argument("--judge", default="", help="released names or exports, nothing trained")
    parser.add_argument("--output", default="networks", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    flags = parser.parse_args()
    flags.output.mkdir(parents=True, exist_ok=True)
    places = cells()
    rows = []
    for name in flags.judge.split(",") if flags.judge else flags.only.split(";"):
        path = flags.output / f"{re.sub(r'[^0-9A-Za-z+]', '', name)}-{flags.seconds:g}.safetensors"
        if flags.judge:
            path = loading.locate(name)
        elif not path.exists():
            train(NETWORKS[name], flags.seconds, path)
        optimizer, theta, about = exports.read(path)
        cost = {"meta-steps": about["meta_steps"], "step": step_cost(optimizer, theta)}
        new = judged(name, optimizer, theta, places, flags.seeds, flags.output)
        rows += [row | cost for row in new]
        print(report.table(rows[-len(new) :]), flush=True)
        curves.forget()  # Programs of five networks are more than a process may map.
    print(report.table(rows))


if __name__ == "__main__":
    main()
