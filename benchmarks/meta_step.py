"""The meta-step of a rule of whole tensors, family by family: its compilation and its pace.

    python benchmarks/meta_step.py [--config configs/release.py] [--families 0,3] [--calls 3]
        [--length 250] [--whole] [--json]

Of each family of the configuration, with an untrained `per_tensor` in place of its optimizer and
as many problems as it says: processor seconds to compile a meta-gradient, cold, and inner steps
a second of a processor (length of a window × problems over the processor time of a meta-gradient,
the median over calls), for the first-order engine and for the exact truncated gradient. On one core
(taskset -c 0). With --whole: processor seconds to compile the program of the whole configuration,
as `python -m l2l.launch` does, and nothing else.
"""

import argparse
import json
import os
import runpy
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import jax
import jax.numpy as jnp
import numpy as np

from l2l.core import base
from l2l.estimators.autodiff import truncated
from l2l.estimators.first_order import first_order
from l2l.estimators.objective import objective
from l2l.training.experiment import build_experiment
from l2l.training.loop import start

ESTIMATORS = {
    "first_order": first_order,
    "exact": lambda inner, losses: truncated(inner, losses, order="exact"),
}


def configuration(path: str, length: int | None, chosen: list[int] | None):
    config = runpy.run_path(path)["get_config"]()
    families = config.task if isinstance(config.task, tuple | list) else (config.task,)
    del config.task, config.optimizer  # Their types may not change while they are there.
    config.optimizer = dict(name="per_tensor", hidden_size=16)
    config.task = tuple(families[i] for i in chosen) if chosen else tuple(families)
    if length:
        config.inner.length = length
    return config


def measure(estimator, problems, theta, data, stage, calls) -> tuple[float, float]:
    """(processor seconds to compile, processor seconds of a meta-gradient)."""
    keys = jax.random.split(jax.random.key(1), problems)
    state = jax.jit(estimator.init)(keys, theta, stage)
    began = time.process_time()
    program = jax.jit(estimator.estimate).lower(theta, state, data, stage).compile()
    compiling, seconds = time.process_time() - began, []
    for _ in range(calls + 1):
        began = time.process_time()
        _, state, _ = jax.block_until_ready(program(theta, state, data, stage))
        seconds.append(time.process_time() - began)
    return compiling, float(np.median(seconds[1:]))


def by_family(config, calls):
    """Rows, one at a time."""
    made = build_experiment(config)
    theta = made.optimizer.init(jax.random.key(0))
    losses = objective(**config.objective)
    stage = base.Stage(*(jnp.float32(x) for x in (1000.0, 1000.0, 0.0)))
    problems = config.meta.num_problems
    for inner in made.inners:
        row: dict = {"family": inner.family.name}
        data = jax.device_put(inner.family.data())
        for name, make in ESTIMATORS.items():
            compiling, seconds = measure(make(inner, losses), problems, theta, data, stage, calls)
            row[f"{name}, compile seconds"] = compiling
            row[f"{name}, inner steps a second"] = inner.length * problems / seconds
        rates = (row[f"{name}, inner steps a second"] for name in ESTIMATORS)
        row["exact over first order, time"] = next(rates) / next(rates)
        yield row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default="configs/release.py")
    parser.add_argument("--families", help="their numbers in the configuration; else all")
    parser.add_argument("--calls", type=int, default=3)
    parser.add_argument("--length", type=int, help="of a window; else the configuration's")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--json", action="store_true", help="print JSON, a row a line")
    flags = parser.parse_args()
    chosen = [int(i) for i in flags.families.split(",")] if flags.families else None
    config = configuration(flags.config, flags.length, chosen)
    if flags.whole:
        loop = start(build_experiment(config))
        began = time.process_time()
        loop.compile()
        rows = iter([{"compile seconds": time.process_time() - began}])
    else:
        rows = by_family(config, flags.calls)
    for row in rows:
        if flags.json:
            print(json.dumps({"config": flags.config, **row}), flush=True)
            continue
        shown = (f"{k} {v}" if isinstance(v, str) else f"{k} {v:.2f}" for k, v in row.items())
        print("; ".join(shown), flush=True)


if __name__ == "__main__":
    main()
