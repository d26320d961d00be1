"""Yardsticks: digits 64-32-10 ReLU and MNIST 784-20-10 sigmoid, and digits in large batches.

    python benchmarks/yardsticks.py [--load lstm] [--seeds 5] [--only digits,mnist,batches]

digits: the mean of the last ten batch losses, the mean batch loss over the run, and the test loss,
after 200, 1,000 and 2,000 steps, beside Adam and NAdamW, each the best of 30 trials
(`tuning.Grid`) for the horizon by its mean final training loss over the split.
mnist: the mean loss over the whole training split (the task of Andrychowicz et al. 2016) after 100
to 10,000 steps; skipped where MNIST is not present.
batches: digits MLPs with batches of 1,024, 1,000 steps: the speed-up over tuned Adam in steps to
the same loss (`statistics.speed_up`, geometric mean),
what a training step costs in Adam's (with JAX's own
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
from l2l.evaluation import cache, comparison, report, suites
from l2l.evaluation.cells import Cell
from l2l.evaluation.comparison import Entry
from l2l.evaluation.curves import Problems
from l2l.evaluation.tuning import Grid
from l2l.storage import exports, loading

KEY = 31
DIGITS = (200, 1_000, 2_000)
MNIST = (100, 200, 500, 1_000, 2_000, 5_000, 10_000)


def digits(optimizer, theta, seeds: int, directory: Path) -> list[dict]:
    rows = comparison.measure(
        *([Entry("learned", optimizer, theta)], [suites.CELLS["mlp"]], DIGITS),
        Problems(jax.random.key(KEY), seeds),
        grids=(Grid("adam"), Grid("nadamw")),
        cache_dir=directory,
    )
    return [
        {
            "steps": row.steps,
            "optimizer": row.optimizer,
            "last ten": float(np.mean(row.curves.losses[:, -10:])),
            "mean": row.area,
            "train": row.train,
            "test": row.test,
        }
        for row in rows
    ]


def mnist(optimizer, theta, seeds: int, directory: Path) -> list[dict]:
    family, data = suites.CELLS["mnist"].load()
    problems, rows = Problems(jax.random.key(KEY), seeds), []
    for steps in MNIST:
        run = cache.trained(optimizer, theta, family, data, problems, steps, directory)
        loss = run.train_loss[:, -1]
        error = float(np.std(loss, ddof=1) / math.sqrt(seeds)) if seeds > 1 else math.nan
        row = {"steps": steps, "train": float(np.mean(loss)), "standard error": error}
        rows.append(row | {"test": float(np.mean(run.test_loss[:, -1]))})
        print(row, flush=True)
    return rows


def batches(optimizer, theta, seeds: int, directory: Path) -> list[dict]:
    task, rows = suites.CELLS["mlp"].task, []
    cells = [
        Cell("-".join(map(str, hidden)), dict(task, hidden=hidden, batch_size=1024))
        for hidden in ((32,), (128,), (64, 64))
    ]
    measured = comparison.measure(
        *([Entry("learned", optimizer, theta)], cells, (1_000,)),
        Problems(jax.random.key(KEY), seeds),
        grids=(Grid("adam"),),
        timed=True,
        cache_dir=directory,
    )
    for row in measured:
        if row.optimizer == "learned":
            steps, time = (row.sooner["adam"][name] for name in ("steps", "time"))
            rows.append({"hidden": row.cell, "steps": steps, "cost": steps / time, "time": time})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", default="lstm", help="a released name, a run or an export")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="digits,mnist,batches")
    parser.add_argument("--cache", default="yardsticks", help="keeps what was measured")
    flags = parser.parse_args()
    optimizer, theta, _ = exports.read(loading.locate(flags.load))
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
