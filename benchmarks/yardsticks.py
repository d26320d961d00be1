"""Two public yardsticks: digits 64-32-10 ReLU and MNIST 784-20-10 sigmoid, batches of 128.

    python benchmarks/yardsticks.py [--load lstm] [--seeds 5] [--only digits,mnist]

digits: the mean of the last ten batch losses, the mean batch loss over the run, and the test loss,
after 200, 1,000 and 2,000 steps, beside Adam and NAdamW, each the best of 15 rates × {constant,
cosine} for the horizon by its mean final training loss over the split.
mnist:  the mean loss over the whole training split (the task of Andrychowicz et al. 2016)
after 100 to 10,000 steps; skipped where MNIST is not present. Every run is told its horizon. Means
over all seeds, which are none of the training's.
"""

import argparse
import math
import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import numpy as np

from l2l import cache, datasets, exports, report, suite, tuning
from l2l.optimizers import baselines

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--load", default="lstm", help="a released name, a run or an export")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="digits,mnist")
    parser.add_argument("--cache", default="yardsticks", help="keeps what was measured")
    flags = parser.parse_args()
    optimizer, theta, _ = exports.read(exports.locate(flags.load))
    for name in flags.only.split(","):
        if name == "mnist" and not datasets.present("mnist"):
            print(f"MNIST is not present below {datasets.data_dir()}: skipped.")
            continue
        rows = {"digits": digits, "mnist": mnist}[name](
            optimizer, theta, flags.seeds, Path(flags.cache)
        )
        print(f"\n{name}\n\n{report.table(rows)}")


if __name__ == "__main__":
    main()
