"""A first-order meta-gradient: the blocked engine beside plain automatic differentiation.

    python benchmarks/engine.py [--json] [--rounds 5] [--lengths 20,200]

L2L's 784-20-10 network (15,910 coordinates) on random images, two problems, one CPU device of one
thread. Memory is what the compiler reserves for temporaries; speeds are medians over interleaved
rounds, in coordinate-steps a second: coordinates x inner steps x problems over the time of a
meta-gradient, the inner gradients included. Plain autodiff is only compiled, not run, where its
temporaries pass 4 GB.
"""

import argparse
import json
import os
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=1"
)
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np

from l2l import base, tasks, unroll
from l2l.datasets import Dataset, Split
from l2l.estimators.autodiff import truncated
from l2l.estimators.first_order import first_order
from l2l.estimators.objective import objective
from l2l.optimizers.lstm import dm, lstm

PROBLEMS = 2
LARGEST = 4e9  # Bytes of temporaries above which nothing is run.
OPTIMIZERS = {"lstm (1x8)": lstm, "2xLSTM-20 (dm)": dm}
ESTIMATORS = {
    "blocked": lambda inner, loss: first_order(inner, loss),
    "autodiff": lambda inner, loss: truncated(inner, loss, order="first", segments=False),
    "checkpointed": lambda inner, loss: truncated(inner, loss, order="first", segments=True),
}


def random_images() -> Dataset:
    """MNIST's shapes with nothing to download: the cost does not depend on what is in an image."""
    random = np.random.default_rng(0)
    split = Split(
        random.integers(0, 256, (2048, 28, 28, 1), dtype=np.uint8),
        random.integers(0, 10, 2048, dtype=np.int32),
    )
    return Dataset(split, split, split)


def prepare(optimizer, estimator, length, data):
    """(compiled estimate, its arguments, coordinate-steps a call, bytes of temporaries)."""
    inner = unroll.Inner(tasks.mnist(), optimizer, length)
    gradient = estimator(inner, objective(on="train", form="log"))
    stage = base.Stage(*(jnp.float32(x) for x in (length, length, 0.0)))
    theta = optimizer.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), PROBLEMS)
    state = jax.jit(gradient.init)(keys, theta, stage)
    arguments = (theta, state, data, stage)
    compiled = jax.jit(gradient.estimate).lower(*arguments).compile()
    run = state.inner if hasattr(state, "inner") else state
    coordinates = base.count(run.params)
    return compiled, arguments, coordinates * length, temporaries(compiled)


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def seconds(compiled, arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - began


def measure(lengths, rounds) -> list[dict]:
    data = jax.device_put(random_images())
    rows = []
    for name, make in OPTIMIZERS.items():
        for length in lengths:
            programs = {
                kind: prepare(make(), estimator, length, data)
                for kind, estimator in ESTIMATORS.items()
            }
            small = {k: p for k, p in programs.items() if p[3] < LARGEST and length <= 50}
            for program in small.values():
                seconds(*program[:2])
            times = {kind: [] for kind in small}
            for _ in range(rounds):
                for kind, program in small.items():
                    times[kind].append(seconds(*program[:2]))
            for kind, (_, _, work, memory) in programs.items():
                row = dict(
                    optimizer=name, steps=length, estimator=kind, temporaries_mb=memory / 1e6
                )
                row["memory, autodiff over this"] = programs["autodiff"][3] / memory
                if kind in times:
                    row["M coordinate-steps/s"] = work / np.median(times[kind]) / 1e6
                    pairs = np.divide(times["autodiff"], times[kind]) if "autodiff" in times else []
                    row["speed over autodiff"] = float(np.median(pairs)) if len(pairs) else None
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", default="20,200", help="inner steps of a window")
    flags = parser.parse_args()
    rows = measure([int(x) for x in flags.lengths.split(",")], flags.rounds)
    if flags.json:
        print(json.dumps(rows))
        return
    for row in rows:
        print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()))


if __name__ == "__main__":
    main()
