"""The meta-step of a config: its compilation, and what a second device or process is worth.

    python benchmarks/devices.py [--config configs/mlp.py] [--rounds 5] [--json]

The program that `python -m l2l.launch --config=…` runs, in fresh processes: compiled with an empty
compilation cache, then from that cache; then, in turns, on one device, on all devices of a process
(one a core on a CPU, forced; else the accelerators) and, on a CPU, on as many processes of one
device, each kept to a core of its own as `launch/cpus.sh` does. The same problems and numbers
everywhere. Seconds are those of a call of the program, a
group of meta-steps: the median of three after one that warms up, then the median over rounds.
"""

import argparse
import json
import multiprocessing
import os
import runpy
import socket
import statistics
import tempfile
import time

from l2l.cluster import environment

ALL = None  # Devices.


def prepare(config: str, devices: int | None):
    """The training loop of a configuration, before its first meta-step."""
    if devices is not ALL:
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    settings = runpy.run_path(config)["get_config"]()
    environment.prepare(settings.meta.num_problems)

    import jax

    from l2l.training.experiment import build_experiment
    from l2l.training.loop import start

    local = None if devices is ALL or jax.process_count() > 1 else jax.devices()[:devices]
    return start(build_experiment(settings), local)


def compile_seconds(queue, config: str, cache: str) -> None:
    """Seconds to lower and compile the meta-step on all devices."""
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
    loop = prepare(config, ALL)
    began = time.perf_counter()
    loop.compile()
    queue.put(time.perf_counter() - began)


def call_seconds(queue, config: str, devices: int | None, member: dict | None = None) -> None:
    """Median seconds of a call, the number of devices and their kind; of process 0 alone."""
    if member:
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[member["process_id"] % len(cores)]})
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

        from l2l.cluster import initialize

        initialize.join(member)
    loop = prepare(config, devices)

    import jax

    loop.compile()
    times = []
    for _ in range(4):
        began = time.perf_counter()
        loop.advance()
        times.append(time.perf_counter() - began)
    if jax.process_index() == 0:
        queue.put((statistics.median(times[1:]), jax.device_count(), jax.devices()[0].device_kind))


def in_fresh_processes(function, config: str, arguments: list[tuple]):
    """What the first of several processes of a function answers; one for each of `arguments`."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=function, args=(queue, config, *a)) for a in arguments]
    for process in processes:
        process.start()
    answer = queue.get(timeout=900)
    for process in processes:
        process.join()
    return answer


def processes_of(count: int) -> list[tuple]:
    """The arguments of `call_seconds` for processes of one device each."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    member = dict(coordinator_address=address, num_processes=count)
    return [(1, member | {"process_id": i}) for i in range(count)]


def measure(config: str, rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = (in_fresh_processes(compile_seconds, config, [(cache,)]) for _ in range(2))
    one, together, apart = [], [], []
    for _ in range(rounds):
        spent, _, kind = in_fresh_processes(call_seconds, config, [(1,)])
        one.append(spent)
        spent, count, _ = in_fresh_processes(call_seconds, config, [(ALL,)])
        together.append(spent)
        if kind == "cpu" and count > 1:
            apart.append(in_fresh_processes(call_seconds, config, processes_of(count))[0])
    row = {
        "device": kind,
        "compile seconds, cold": cold,
        "compile seconds, from the cache": warm,
        "seconds a call, one device": statistics.median(one),
        f"seconds a call, {count} devices": statistics.median(together),
        f"speed-up, {count} devices": ratio(one, together),
    }
    if apart:
        row[f"seconds a call, {count} processes"] = statistics.median(apart)
        row[f"speed-up, {count} processes"] = ratio(one, apart)
    return row


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/mlp.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    flags = parser.parse_args()
    row = measure(flags.config, flags.rounds)
    if flags.json:
        print(json.dumps(row))
        return
    for name, value in row.items():
        print(f"{name:35} {value:.3g}" if isinstance(value, float) else f"{name:35} {value}")


if __name__ == "__main__":
    main()
