"""Several processes, one run: joining it, agreeing within it, leaving it.

    arguments = find({"num_processes": 2, "process_id": 0, "coordinator_address": "host:1234"})
    join(arguments)  # Before any other use of JAX; None joins nothing.

Whatever the host decides from what only one process has seen (a signal, a file, a clock) is first
made the same on all of them: processes that call different programs wait for each other for ever.
"""

import functools
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

# JAX reads the first of these variables itself; the others follow the names of its arguments.
VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
JOIN_SECONDS = 300  # Hosts of a batch job do not start together.
HEARTBEAT_SECONDS = 30  # Until a process that says nothing counts as dead, and the run ends.
LEAVE_SECONDS = 10
WEEK = 7 * 24 * 3600
LOST = 4  # The exit code where another process is gone, or has never come.
# In what the collectives, barriers and heartbeats of JAX say then.
_LOST = ("gloo", "connection", "barrier", "heartbeat", "unavailable", "coordination", "nccl")


class Elsewhere(ValueError):
    """Process 0 failed, and says why itself."""


def find(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> dict | None:
    """The arguments of `jax.distributed.initialize`, or None for a run of one process.

    From `flags` (names of VARIABLES; None where not given), else VARIABLES, else Slurm's or Open
    MPI's variables; on a Cloud TPU JAX finds all of them, and the result is {}.

    Raises:
      ValueError: they contradict each other, or one is missing.
    """
    launcher, alone = _launcher(environment)
    found: dict[str, Any] = dict(launcher)
    for name, variable in VARIABLES.items():
        value = environment.get(variable) if flags.get(name) is None else flags[name]
        if value not in (None, ""):
            found[name] = value if name == "coordinator_address" else _whole(name, value)
    if not found:
        return {} if _on_tpu(environment) else None
    count, number = found.get("num_processes"), found.get("process_id")
    if count == 1 and not number:
        return None
    known = {"SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri"} & set(environment) if launcher else ()
    missing = [name for name in VARIABLES if name not in found]
    if missing and not (known and missing == ["coordinator_address"]):
        given = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(
            f"{given} says that this run has several processes, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: add "
            + ", ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
            + "."
        )
    if not 0 <= number < count:
        raise ValueError(
            f"process_id={number} is not one of num_processes={count}: give each process its own "
            f"number from 0 to {count - 1}."
        )
    address = found.get("coordinator_address")
    if address and not re.fullmatch(r"\S+:\d+", address):
        raise ValueError(f"coordinator_address={address!r} has no port: write host:port.")
    if alone:  # JAX would take one device a task; a process alone on its host takes all.
        found["local_device_ids"] = []
    return found


def _launcher(environment) -> tuple[dict, bool]:
    """(number and id of processes, whether each is alone on its host), from Slurm or Open MPI. A
    job that Slurm started as one task, such as an interactive shell, is a run of one process."""
    for count, number, hosts, one in (
        ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE", r"1(\(x\d+\))?"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "1"),
    ):
        if int(environment.get(count, 1)) > 1 and number in environment:
            found = {"num_processes": int(environment[count])}
            found["process_id"] = int(environment[number])
            return found, bool(re.fullmatch(one, environment.get(hosts, "")))
    return {}, False


def _on_tpu(environment) -> bool:
    wanted = environment.get("JAX_PLATFORMS", "")
    if wanted and "tpu" not in wanted:
        return False
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and importlib.util.find_spec("libtpu") is not None


def _whole(name: str, value) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} is not a whole number.") from error


def join(arguments: Mapping | None) -> None:
    """Joins the run that `find` found. Processes on CPUs talk over gloo, JAX's default.

    Raises:
      ValueError: the others are not there, or not all alike.
    """
    if arguments is None:
        return
    # Gloo writes to standard output, which is the result's: to the log with that.
    output = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(output, "w", buffering=1)
    import jax

    who = f"Process {arguments.get('process_id', '?')} of {arguments.get('num_processes', '?')}"
    where = arguments.get("coordinator_address", "the address that the launcher gave")
    failed = (
        f"{who} could not join the others at {where} within {JOIN_SECONDS:g} s: check that "
        "process 0 runs there, that its port is free and open, and that every process was started "
        "with a number of its own."
    )

    def give_up():  # JAX itself would end the process with a stack trace and no advice.
        print("l2l:", failed, file=sys.stderr, flush=True)
        os._exit(LOST)

    watch = threading.Timer(JOIN_SECONDS, give_up)
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=2 * JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{failed} ({str(error).splitlines()[0][:150]})") from error
    finally:
        watch.cancel()
    counts = [len(jax.local_devices(process)) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise ValueError(
            f"The processes have {counts} devices: all must have as many. On CPUs set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N everywhere."
        )


def count() -> int:
    import jax

    return jax.process_count()


def first() -> bool:
    """Whether this is the process that writes and speaks: process 0."""
    import jax

    return jax.process_index() == 0


def largest(numbers) -> np.ndarray:
    """The elementwise maximum over processes of a small array; waits for all of them."""
    numbers = np.asarray(numbers)
    if count() == 1:
        return numbers
    place, reduce = _maximum()
    out = reduce(place(numbers))
    wait(out)
    return np.asarray(out)


@functools.cache
def _maximum() -> tuple[Callable, Callable]:
    import jax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(jax.devices(), ("devices",))
    split = NamedSharding(mesh, P("devices"))

    def place(x):
        shape = (mesh.size, *x.shape)
        return jax.make_array_from_callback(shape, split, lambda _: x[None])

    return place, jax.jit(lambda x: x.max(0), out_shardings=NamedSharding(mesh, P()))


def told(value):
    """Process 0's `value`, JSON-able, on all processes."""
    if count() == 1:
        return value
    content = json.dumps(value).encode() if first() else b""
    length = int(largest(np.int32(len(content))))
    # Padded to a power of two, so that few sizes are compiled.
    padded = np.zeros(1 << length.bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return json.loads(largest(padded)[:length].tobytes())


def together(action: Callable[[], Any]):
    """What `action` returns, JSON-able, when process 0 calls it, however long that takes; where it
    fails, all fail.

    Raises:
      ValueError, OSError: on process 0, what `action` raised; `Elsewhere` on the others.
    """
    if count() == 1:
        return action()
    result, failure = None, None
    if first():
        try:
            result = action()
        except (ValueError, OSError) as error:
            failure = error
    _meet()
    failed, result = told((failure is not None, result))
    if failure is not None:
        raise failure
    if failed:
        raise Elsewhere("Process 0 failed and says why.")
    return result


def _meet() -> None:
    """Waits for all processes, for a week if need be; gloo gives up after half an hour."""
    from orbax.checkpoint import multihost

    meet, key = multihost.get_barrier_sync_fn(), f"l2l/{next(_meetings)}"
    # In a thread, so that signals are heard meanwhile.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(meet, key=key, timeout_ms=WEEK * 1000).result()


_meetings = itertools.count()


def stopped(got: int, turn: int) -> int:
    """The signal that any process has got by now, 0 for none; SIGTERM too where JAX's preemption
    service has a notice. Called by all, with turns that go up by one: JAX waits for the very next
    turn after the latest that any process was at."""
    if count() == 1:
        return got
    from jax.experimental import multihost_utils

    if multihost_utils.reached_preemption_sync_point(turn):
        got = max(got, signal.SIGTERM)
    return int(largest(np.int32(got)))


def alike(number: int, sentence: str) -> None:
    """ValueError(sentence) on all processes where they have different numbers of 31 bits."""
    high, low = largest(np.array([number, -number], np.int32))
    if high != -low:
        raise ValueError(sentence)


def place(tree, shardings):
    """Arrays that every process has whole, as global arrays."""
    import jax

    if count() == 1:
        return jax.device_put(tree, shardings)
    return jax.jit(lambda x: x, out_shardings=shardings)(tree)


def whole(tree, same):
    """Global arrays as arrays of this process, on its first device; `same` replicates."""
    import jax

    if count() == 1:
        return tree
    return jax.tree.map(lambda x: x.addressable_data(0), place(tree, same))


def wait(tree) -> None:
    """Waits for arrays without holding up signals, which Python delivers between its own steps."""
    import jax

    for x in jax.tree.leaves(tree):
        while not x.is_ready():
            time.sleep(0.002)


def guard(run: Callable[[], int]) -> int:
    """run(); where it fails in one process of several, all of them end in bounded time, as
    otherwise they would wait for it. What a user can mend (ValueError, OSError) is raised."""
    try:
        return run()
    except (ValueError, OSError):
        raise
    except Exception as error:
        if count() == 1:
            raise
        text = " ".join(str(error).split())
        if any(word in text.lower() for word in _LOST):
            print(
                f"l2l: Another process of this run is gone ({text[:150]}). The last finished "
                "checkpoint is kept: the same command on all hosts goes on from there.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(LOST)  # No parting from those that are gone.
        traceback.print_exc()
        leave(1)
        raise


def leave(code: int) -> None:
    """Ends this process of several after an error. Others that end too are waited for a moment; of
    those that do not, this one is missed, and JAX ends them."""
    if "jax" not in sys.modules:
        return
    import jax

    if not jax.distributed.is_initialized():
        return
    thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    thread.start()
    thread.join(LEAVE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
