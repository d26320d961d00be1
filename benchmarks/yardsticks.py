"""Yardsticks: digits 64-32-10 ReLU and MNIST 784-20-10 sigmoid, and digits in large batches.

    python benchmarks/yardsticks.py [--load lstm] [--seeds 5] [--only digits,mnist,batches]

digits: the mean of the last ten batch losses, the mean batch loss over the run, and the test loss,
after 200, 1,000 and 2,000 steps, beside Adam and NAdamW, each the best of 15 rates × {constant,
cosine} for the horizon by its mean final training loss over the split.
mnist: the mean loss over the whole training split (the task of Andrychowicz et al. 2016) after 100
to 10,000 steps; skipped where MNIST is not present.
batches: digits MLPs with batches of 1,024, 1,000 steps: the speed-up over tuned Adam in steps to
the same loss (`speed.speed_up`, median), what a training step costs in Adam's (with JAX's own
settings, on all cores), and their ratio, the speed-up in time.

Batches of 128 otherwise. Every run is told its horizon. Means over all seeds, which are none of the
training's.
"""

import argparse
import math
from pathlib import Path

import jax
import numpy as np

from l2l.data import datasets
from l2l.evaluation import baselines, cache, report, tuning
from l2l.evaluation import suites as suite
from l2l.evaluation import timing as speed
from l2l.storage import exports
from l2l.tasks import registry

KEY = 31
DIGITS = (200, 1_000, 2_000)
MNIST = (100, 200, 500, 1_000, 2_000, 5_000, 10_000)


def digits(optimizer, theta, seeds: int, directory: Path) -> list[dict]:
    key, (family, data) = jax.random.key(KEY), suite.load("mlp")
    tuned = {
        kind: tuning.tune(key, kind, family, data, seeds, DIGITS, cache_dir=directory)
        for kind in ("adam", "nadamw")
    }
    rows = []
    for steps in DIGITS:
        field = {"learned": (optimizer, theta)}
        for kind, found in tuned.items():
            best = found.by_train_loss[steps]
            field[f"{kind}, tuned"] = baselines.grid(kind), tuning.point_setting(best)
        for name, (own, setting) in field.items():
            run = cache.curves(key, own, setting, family, data, seeds, steps, directory)
            row = {
                "steps": steps,
                "optimizer": name,
                "last ten": float(np.mean(run.losses[:, -10:])),
                "mean": float(np.mean(run.losses)),
                "train": float(np.mean(run.train_loss[:, -1])),
                "test": float(np.mean(run.test_loss[:, -1])),
            }
            rows.append(row)
    return rows


def mnist(optimizer, theta, seeds: int, directory: Path) -> list[dict]:
    key, (family, data) = jax.random.key(KEY), suite.load("mnist")
    rows = []
    for steps in MNIST:
        run = cache.curves(key, optimizer, theta, family, data, seeds, steps, directory)
        loss = run.train_loss[:, -1]
        error = float(np.std(loss, ddof=1) / math.sqrt(seeds)) if seeds > 1 else math.nan
        row = {"steps": steps, "train": float(np.mean(loss)), "standard error": error}
        rows.append(row | {"test": float(np.mean(run.test_loss[:, -1]))})
        print(row, flush=True)
    return rows


def batches(optimizer, theta, seeds: int, directory: Path) -> list[dict]:
    key, rows = jax.random.key(KEY), []
    for hidden in ((32,), (128,), (64, 64)):
        task = dict(suite.CELLS["mlp"].task, hidden=hidden, batch_size=1024)
        family = registry.task(task)
        data = jax.device_put(family.data())
        tuned = tuning.tune(
            *(key, "adam", family, data, seeds, (1_000,)), eps_roots=(0.0,), cache_dir=directory
        )
        best = tuning.point_setting(tuned.by_train_loss[1_000])
        field = {"learned": (optimizer, theta), "adam": (baselines.grid("adam"), best)}
        losses = {
            name: cache.curves(key, *own, family, data, seeds, 1_000, directory).losses
            for name, own in field.items()
        }
        steps = float(np.median(speed.speed_up(losses["learned"], losses["adam"])))
        seconds = speed.step_seconds(key, field, family, data)
        cost = seconds["learned"] / seconds["adam"]
        row = {"hidden": "-".join(map(str, hidden)), "steps": steps, "cost": cost}
        rows.append(row | {"time": steps / cost})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", default="lstm", help="a released name, a run or an export")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="digits,mnist,batches")
    parser.add_argument("--cache", default="yardsticks", help="keeps what was measured")
    flags = parser.parse_args()
    optimizer, theta, _ = exports.read(exports.locate(flags.load))
    for name in flags.only.split(","):
        if name == "mnist" and not datasets.present("mnist"):
            print(f"MNIST is not present below {datasets.data_dir()}: skipped.")
            continue
        rows = {"digits": digits, "mnist": mnist, "batches": batches}[name](
            optimizer, theta, flags.seeds, Path(flags.cache)
        )
        print(f"\n{name}\n\n{report.table(rows)}")


if __name__ == "__main__":
    main()
