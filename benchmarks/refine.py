"""The last phase of the release: a few directions of theta, judged by whole runs.

    pip install cma
    python benchmarks/refine.py runs/release runs/longer --generations 18 --output runs/refined

A truncated meta-gradient sees a window, in which a small rate pays (short-horizon bias; Wu et al.
2018): the more so the longer the runs are. Here nothing is truncated. Theta moves along nine
directions, in which CMA-ES (Hansen & Ostermeier 2001) samples candidates; each does whole runs of
the judges of `networks.py`, 200 and 1,000 steps, three seeds that those do not use, beside Adam
tuned for each. A process a core shares the judges; two minutes a generation on two cores. What is
reached is kept in --output after every generation: the same command goes on from there.
"""

import argparse
import math
import multiprocessing
import os
import pickle
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import jax
import networks
import numpy as np

from l2l import evaluate, exports, files, meta, train, tuning

SEEDS = 3
# Of the problems: the judges of networks.py have their own.
SEED = 78
# The size of a step of one, a direction.
DIRECTIONS = {
    "from the first theta on": 0.3,
    "towards the longer runs": 0.3,
    "log rate": 0.25,
    "anneal": 0.15,
    "reach of the log rate": 0.3,
    "reach of the mixture": 0.3,
    "reach of the tensors' signals": 0.3,
    "decay of the weights": 0.5,
    "log rate at the end": 0.2,
}


class Space:
    """Thetas by nine numbers; zeros are the theta of `start`."""

    def __init__(self, start, longer):
        self.optimizer, self.start, self.about = exports.read(exports.locate(start))
        key = jax.random.fold_in(jax.random.key(self.about["seed"]), train.TRAIN)
        self.first = jax.device_get(meta.first_theta(key, self.optimizer))
        self.longer, self.after = exports.read(exports.locate(longer))[1:]

    def theta(self, numbers):
        on, towards, rate, anneal, *reaches, decay, end = np.multiply(
            numbers, list(DIRECTIONS.values())
        )

        def move(first, start, longer):
            first, start, longer = (np.asarray(x, np.float64) for x in (first, start, longer))
            return np.array(start + on * (start - first) + towards * (longer - start))

        theta = jax.tree.map(move, self.first, self.start, self.longer)
        theta["log_learning_rate"] += rate
        theta["anneal"] += anneal
        own, whole = theta["network"]["out"], theta["tensors"]["out"]
        # Outputs: the log rate and the mixture; of tensors log rate, decay and signals.
        for layer, outputs, reach in (
            (own, slice(0, 1), reaches[0]),
            (whole, slice(0, 1), reaches[0]),
            (own, slice(1, None), reaches[1]),
            (whole, slice(2, None), reaches[2]),
        ):
            for weights in layer.values():
                weights[..., outputs] *= math.exp(reach)
        whole["b"][1] += decay
        own["v"][0, 0] += end
        return jax.tree.map(np.float32, theta)


def worth(logs) -> tuple[float, dict]:
    """What is to be small, and what it is made of, of rows (log training loss, log test loss), over
    tuned Adam's. Losses above Adam's weigh thrice, and below 0.2 of it (test: 0.6) all the same."""
    train_, test = np.transpose(logs)
    loss = np.maximum(train_, -1.5) + 2 * np.maximum(train_ + 0.05, 0)
    other = np.maximum(test, -0.5) + 2 * np.maximum(test, 0)
    told = {"loss": np.exp(train_.mean()), "test": np.exp(test.mean())}
    told |= {"no worse": np.mean(train_ <= 0), "test within 2 %": np.mean(test <= math.log(1.02))}
    return 0.5 * (loss.mean() + other.mean()), {k: float(v) for k, v in told.items()}


_mine: list = []


def enter(core, number, count, start, longer, cache):
    """A worker: on a core of its own, with its share of the judges and Adam tuned for them."""
    os.sched_setaffinity(0, {core})
    space = Space(start, longer)
    for cell in networks.cells()[number::count]:
        adam = tuning.tune(
            *(networks.KEY(), "adam", cell.family, cell.data, SEEDS, networks.HORIZONS),
            eps_roots=(0.0,),
            cache_dir=cache,
        ).by_train_loss
        _mine.append((space, cell, adam))


def losses(numbers, seed: int = SEED) -> list[tuple[float, float]]:
    """Of a candidate, in a worker: logarithms of its losses over tuned Adam's."""
    rows = []
    for space, cell, adam in _mine:
        for horizon in networks.HORIZONS:
            key = networks.KEY() if seed is None else jax.random.key(seed)
            ours = evaluate.evaluate(
                *(key, space.optimizer, cell.family, cell.data, SEEDS, horizon),
                theta=space.theta(numbers),
            )
            best = adam[horizon]
            rows.append(
                (_over(ours.train_loss, best.train_loss), _over(ours.test_loss, best.test_loss))
            )
    return rows


def _over(mine, adams) -> float:
    """The logarithm of a final loss over Adam's; 9 if it is not finite."""
    loss = float(mine[:, -1].mean())
    return math.log(max(loss, 1e-9) / statistics.mean(adams)) if math.isfinite(loss) else 9.0


def judge(pools, candidates, seed=SEED) -> list[tuple[float, dict]]:
    asked = [[pool.submit(losses, list(x), seed) for pool in pools] for x in candidates]
    return [worth([row for part in parts for row in part.result()]) for parts in asked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", help="a run, an export or a released name")
    parser.add_argument("longer", help="one that went on from it")
    parser.add_argument("--generations", type=int, default=18)
    parser.add_argument("--output", default="refined", type=Path)
    flags = parser.parse_args()
    import cma  # Of this command alone.

    flags.output.mkdir(parents=True, exist_ok=True)
    kept = flags.output / "search.pickle"
    cores = sorted(os.sched_getaffinity(0))
    pools = [
        ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=enter,
            initargs=(core, i, len(cores), flags.start, flags.longer, flags.output / "cache"),
        )
        for i, core in enumerate(cores)
    ]
    search = cma.CMAEvolutionStrategy(
        [0.0] * len(DIRECTIONS), 1.0, {"popsize": 10, "seed": 1, "verbose": -9}
    )
    if kept.exists():
        search = pickle.loads(kept.read_bytes())
    while search.countiter < flags.generations:
        candidates = search.ask()
        found = judge(pools, candidates)
        search.tell(candidates, [value for value, _ in found])
        files.write(kept, pickle.dumps(search))
        value, told = min(found, key=lambda x: x[0])
        print(search.countiter, f"{value:.4f}", told, flush=True)
    numbers = list(map(float, search.mean))
    # On the seeds of networks.py, which the search has not seen.
    before, after = judge(pools, [[0.0] * len(numbers), numbers], seed=None)
    print("start:", *before, "\nrefined:", *after)
    space = Space(flags.start, flags.longer)
    about = space.after | {
        "refined": {
            "directions": dict(zip(DIRECTIONS, numbers, strict=True)),
            "generations": search.countiter,
            "candidates": search.countevals,
        }
    }
    name = {"name": about["optimizer"]["name"], **about["optimizer"]["settings"]}
    print(exports.export(flags.output / exports.EXPORT, name, space.theta(numbers), about))


if __name__ == "__main__":
    main()
