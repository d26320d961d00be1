"""The meta-step of a config: what it takes to compile, and what a second device is worth.

    python benchmarks/devices.py [--config configs/mlp.py] [--rounds 7] [--json]

Compiles the program that `python -m l2l.launch --config=…` runs, in two fresh processes that share
an empty compilation cache: cold, then from the cache. Then runs it on one device and on all of them
(one a core on a CPU, forced; else the accelerators) in turns, the same problems and numbers.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import statistics
import tempfile
import time

from l2l import host


def compile_seconds(config: str, cache: str, queue) -> None:
    """Seconds to lower and compile the meta-step in this process, on all devices."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    _, program, arguments = prepare(config)
    began = time.perf_counter()
    program.lower(*arguments).compile()
    queue.put(time.perf_counter() - began)


def prepare(config: str, count: int | None = None):
    """(devices, the meta-step over them, its arguments) of an experiment's first meta-steps."""
    settings = runpy.run_path(config)["get_config"]()
    host.prepare(settings.meta.num_problems)

    import jax
    import jax.numpy as jnp
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from l2l import build, meta

    experiment = build.experiment(settings)
    devices = meta.devices_for(experiment.running.num_problems, jax.devices()[:count])
    mesh = Mesh(devices, (meta.AXIS,))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(meta.AXIS))
    plan = experiment.curriculum
    theta = experiment.optimizer.init(jax.random.key(0))
    stage = jax.tree.map(jnp.float32, plan.stage(plan.start(theta), 0)[0])
    state = meta.meta_init(jax.random.key(0), experiment.meta, stage)
    state = meta.spread(state, len(devices))
    layout = jax.tree.map(lambda _: everywhere, state)
    layout = layout._replace(estimator=jax.tree.map(lambda _: split, state.estimator))
    arguments = (
        jax.device_put(state, layout),
        jax.device_put(experiment.data(), everywhere),
    )
    program = meta.compile_steps(experiment.meta, experiment.running.group, devices)
    return devices, program, arguments


def in_fresh_process(function, *arguments):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    answer = queue.get()
    process.join()
    return answer


def compare(config: str, rounds: int) -> dict:
    """Seconds of a group of meta-steps on one device and on all, in turns."""
    import jax

    ready = {}
    for count in (1, None):
        devices, program, arguments = prepare(config, count)
        ready[len(devices)] = (program, arguments)
    times = {count: [] for count in ready}
    for _ in range(rounds + 1):
        for count, (program, arguments) in ready.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            times[count].append(time.perf_counter() - began)
    times = {count: x[1:] for count, x in times.items()}  # The first round compiles.
    most = max(times)
    return {
        "device": jax.devices()[0].device_kind,
        "devices": most,
        "seconds a call, one device": statistics.median(times[1]),
        "seconds a call, all devices": statistics.median(times[most]),
        "speed-up": statistics.median(a / b for a, b in zip(times[1], times[most], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mlp.py")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (in_fresh_process(compile_seconds, flags.config, cache) for _ in range(2))
    row = {"compile seconds, cold": cold, "compile seconds, from the cache": warm}
    row |= compare(flags.config, flags.rounds)
    if flags.json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        print(f"{name:35} {value:.3g}" if isinstance(value, float) else f"{name:35} {value}")


if __name__ == "__main__":
    main()
