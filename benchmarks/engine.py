"""First-order meta-gradients: the blocked engine beside plain automatic differentiation.

    python benchmarks/engine.py [--json] [--rounds 7] [--long]

L2L's 784-20-10 network (15,910 coordinates) on random images, two problems, one CPU device of one
thread (or the accelerator that JAX finds). Memory is what the compiler reserves for temporaries;
speeds are medians over interleaved rounds, in coordinate-steps a second: coordinates x inner steps
x problems over the time of a meta-gradient, the inner gradients included. Ratios are medians over
rounds of ratios within a round. Plain autodiff differentiates the window as it stands, all
coordinates at once; it is compiled, not run, for the longer window.

The bound of a machine is the time of the network's matrix products (two forward passes and the two
products of the way back) and of its tanh and logistic functions (two passes) at the rates that this
core shows for arrays of these shapes, measured in the same run; the share is the bound's time over
that of a whole meta-gradient, inner gradients, features and all.

With --long: an untruncated window of 1,000 steps with 8 problems, and a horizon of 10,000 steps in
windows of 20.
"""

import argparse
import json
import multiprocessing
import os
import pathlib
import re
import time

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_cpu_multi_thread_eigen=false --xla_force_host_platform_device_count=1"
)
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import numpy as np

from l2l import tasks
from l2l.core import base, unroll
from l2l.data.datasets import Dataset, Split
from l2l.estimators.autodiff import truncated
from l2l.estimators.first_order import first_order
from l2l.estimators.objective import objective
from l2l.optimizers import blocks
from l2l.optimizers.lstm import lstm
from l2l.optimizers.published import dm

OPTIMIZERS = {"lstm (1x8)": lstm, "2xLSTM-20 (dm)": dm}
# Per LSTM layer (inputs, units), and the rows of the output layer.
NETWORKS = {"lstm (1x8)": ([(4, 8)], 5), "2xLSTM-20 (dm)": ([(2, 20), (20, 20)], 1)}
ESTIMATORS = {
    "blocked": first_order,
    "autodiff": lambda inner, loss: truncated(inner, loss, order="first", segments=False),
    "checkpointed": lambda inner, loss: truncated(inner, loss, order="first", segments=True),
}
SHORT, LONG = 20, 200


def random_images() -> Dataset:
    """MNIST's shapes with nothing to download: the cost does not depend on what is in an image."""
    random = np.random.default_rng(0)
    split = Split(
        random.integers(0, 256, (2048, 28, 28, 1), dtype=np.uint8),
        random.integers(0, 10, 2048, dtype=np.int32),
    )
    return Dataset(split, split, split)


def prepare(optimizer, estimator, length, data, problems=2, horizon=None):
    """(compiled estimate, its arguments, coordinate-steps a call)."""
    inner = unroll.Inner(tasks.mnist(), optimizer, length, stagger=False)
    gradient = estimator(inner, objective(on="train", form="log"))
    stage = base.Stage(*(jnp.float32(x) for x in (horizon or length, horizon or length, 0.0)))
    theta = optimizer.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), problems)
    state = jax.jit(gradient.init)(keys, theta, stage)
    arguments = (theta, state, data, stage)
    compiled = jax.jit(gradient.estimate).lower(*arguments).compile()
    coordinates_ = base.count(state.inner.params) // problems
    return compiled, arguments, coordinates_ * length * problems


def temporaries(compiled) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def seconds(function, *arguments) -> float:
    began = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    return time.perf_counter() - began


def compare(name, rounds, data) -> dict:
    """One optimizer: memory of every estimator at both lengths, speeds and the bound at one."""
    make = OPTIMIZERS[name]
    programs = {kind: prepare(make(), e, SHORT, data) for kind, e in ESTIMATORS.items()}
    memory = {kind: temporaries(program[0]) for kind, program in programs.items()}
    longer = {
        kind: temporaries(prepare(make(), ESTIMATORS[kind], LONG, data)[0])
        for kind in ("blocked", "autodiff")
    }
    pieces = network(name)
    times = {kind: [] for kind in [*programs, "bound"]}
    for _ in range(rounds + 1):
        for kind, (compiled, arguments, _) in programs.items():
            times[kind].append(seconds(compiled, *arguments))
        times["bound"].append(sum(count * seconds(*call) for count, call in pieces))
    times = {kind: np.array(x[1:]) for kind, x in times.items()}  # The first round warms up.
    work = programs["blocked"][2]
    bound = times["bound"] * work  # One coordinate-step's worth, scaled to the window.
    ours = times["blocked"]
    return {
        "optimizer": name,
        f"memory at {SHORT} steps, MB": {k: x / 1e6 for k, x in memory.items()},
        f"memory at {SHORT} steps, autodiff / blocked": memory["autodiff"] / memory["blocked"],
        f"memory at {LONG} steps, MB": {k: x / 1e6 for k, x in longer.items()},
        f"memory at {LONG} steps, autodiff / blocked": longer["autodiff"] / longer["blocked"],
        "M coordinate-steps/s": {k: work / np.median(times[k]) / 1e6 for k in ESTIMATORS},
        "M coordinate-steps/s, best round": work / ours.min() / 1e6,
        "speed, blocked / autodiff": float(np.median(times["autodiff"] / ours)),
        "speed, blocked / checkpointed": float(np.median(times["checkpointed"] / ours)),
        "bound, M coordinate-steps/s": float(work / np.median(bound) / 1e6),
        "share of the bound": float(np.median(bound / ours)),
    }


def network(name) -> list:
    """What the bound consists of: (times a coordinate-step, (function, arguments)) per call, the
    function repeated over many blocks so that dispatch does not count."""
    layers, outputs = NETWORKS[name]
    hidden = jax.ShapeDtypeStruct((2 * sum(units for _, units in layers), 1), jnp.float32)
    width = blocks.width(hidden) or 1 << 16
    repeats = max(1, (1 << 18) // width)
    random = np.random.default_rng(0)
    pieces = []

    def add(count, function, *shapes):
        arrays = [jnp.asarray(random.normal(size=s), jnp.float32) for s in shapes]

        def loop(*arrays):
            def body(_, arrays):
                # Each round depends on the one before: nothing can be left out or moved.
                out = function(*arrays)
                first = arrays[0].at[0, 0].add(1e-20 * out[0, 0])
                return jax.lax.optimization_barrier((first, *arrays[1:]))

            return jax.lax.fori_loop(0, repeats, body, arrays)

        compiled = jax.jit(loop).lower(*arrays).compile()
        pieces.append((count / (width * repeats), (compiled, *arrays)))

    def product(rows, columns):
        add(2, lambda w, x: w @ x, (rows, columns), (columns, width))
        add(1, lambda z, x: z @ x.T, (rows, width), (columns, width))
        add(1, lambda w, z: w.T @ z, (rows, columns), (rows, width))

    for inputs, units in layers:
        product(4 * units, inputs + units + 1)
        add(2, jax.nn.sigmoid, (3 * units, width))
        add(2, jnp.tanh, (2 * units, width))
    product(outputs, layers[-1][1])
    return pieces


def peak(name, queue) -> None:
    """Peak memory in MB of a process that does nothing but our meta-gradients."""
    compiled, arguments, _ = prepare(OPTIMIZERS[name](), first_order, SHORT, random_images())
    for _ in range(3):
        seconds(compiled, *arguments)
    # Not getrusage: its maximum includes that of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    queue.put(int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024 / 1e6)


def peak_in_fresh_process(name) -> float:
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=peak, args=(name, queue))
    process.start()
    answer = queue.get(timeout=600)
    process.join()
    return answer


def long_windows(data) -> list[dict]:
    """An untruncated window of 1,000 steps, and 10,000 steps in windows of 20."""
    rows = []
    for name, make in OPTIMIZERS.items():
        compiled, arguments, work = prepare(make(), first_order, 1000, data, problems=8)
        spent = seconds(compiled, *arguments)
        rows.append(
            {
                "optimizer": name,
                "window": "1,000 steps, untruncated, 8 problems",
                "seconds": spent,
                "M coordinate-steps/s": work / spent / 1e6,
                "temporaries, MB": temporaries(compiled) / 1e6,
            }
        )
    compiled, (theta, state, data, stage), work = prepare(
        lstm(), first_order, SHORT, data, problems=1, horizon=10_000
    )
    began = time.perf_counter()
    for _ in range(10_000 // SHORT):
        gradient, state, metrics = compiled(theta, state, data, stage)
    finite = bool(base.finite(gradient))
    rows.append(
        {
            "optimizer": "lstm (1x8)",
            "window": f"{SHORT} steps, inner step {int(state.inner.step[0])} of 10,000",
            "seconds": time.perf_counter() - began,
            "finite": finite,
            "loss": float(metrics["loss"][0]),
        }
    )
    return rows


def shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(x)}" for name, x in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--long", action="store_true", help="the long windows instead")
    flags = parser.parse_args()
    data = jax.device_put(random_images())
    if flags.long:
        rows = long_windows(data)
    else:
        rows = [compare(name, flags.rounds, data) for name in OPTIMIZERS]
        for row in rows:
            row["peak memory of a process, MB"] = peak_in_fresh_process(row["optimizer"])
    if flags.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "rows": rows}))
        return
    for row in rows:
        print()
        for name, value in row.items():
            print(f"{name:45} {shown(value)}")


if __name__ == "__main__":
    main()
