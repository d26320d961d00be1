"""Finding the run of several processes that this process belongs to, and joining it.

    arguments = find({"num_processes": 2, "process_id": 0, "coordinator_address": "host:1234"})
    join(arguments)  # Before any other use of JAX; None joins nothing.

Afterwards the processes agree through `collectives.py`.
"""

import importlib.util
import os
import re
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from l2l.cluster import collectives
from l2l.console.errors import UserError

# JAX reads the first of these variables itself; the others follow the names of its arguments.
VARIABLES = {
    "coordinator_address": "JAX_COORDINATOR_ADDRESS",
    "num_processes": "JAX_NUM_PROCESSES",
    "process_id": "JAX_PROCESS_ID",
}
JOIN_SECONDS = 300  # Hosts of a batch job do not start together.
HEARTBEAT_SECONDS = 30  # Until a process that says nothing counts as dead, and the run ends.


def find(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> dict | None:
    """The arguments of `jax.distributed.initialize`, or None for a run of one process.

    From `flags` (names of VARIABLES; None where not given), else VARIABLES, else Slurm's or Open
    MPI's variables; on a Cloud TPU JAX finds all of them, and the result is {}.

    Raises:
      UserError: they contradict each other, or one is missing.
    """
    launcher, alone = _launcher(environment)
    found: dict[str, Any] = dict(launcher)
    for name, variable in VARIABLES.items():
        value = environment.get(variable) if flags.get(name) is None else flags[name]
        if value not in (None, ""):
            found[name] = value if name == "coordinator_address" else _whole(name, value)
    if not found:
        return {} if _on_tpu(environment) else None
    if found.get("num_processes") == 1 and not found.get("process_id"):
        return None
    known = {"SLURM_STEP_NODELIST", "OMPI_MCA_orte_hnp_uri"} & set(environment) if launcher else ()
    missing = [name for name in VARIABLES if name not in found]
    if missing and not (known and missing == ["coordinator_address"]):
        given = ", ".join(f"{name}={value}" for name, value in found.items())
        raise UserError(
            f"{given} says that this run has several processes, but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing: add "
            + ", ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
            + "."
        )
    count, number = found["num_processes"], found["process_id"]
    if not 0 <= number < count:
        raise UserError(
            f"process_id={number} is not one of num_processes={count}: give each process its own "
            f"number from 0 to {count - 1}."
        )
    address = found.get("coordinator_address")
    if address and not re.fullmatch(r"\S+:\d+", address):
        raise UserError(f"coordinator_address={address!r} has no port: write host:port.")
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
        raise UserError(f"{name}={value!r} is not a whole number.") from error


def join(arguments: Mapping | None) -> None:
    """Joins the run that `find` found. Processes on CPUs talk over gloo, JAX's default.

    Raises:
      UserError: the others are not there, or not all alike.
    """
    if arguments is None:
        return
    # Gloo writes to standard output, which is the result's: to the log with that.
    output = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(
        output, "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors
    )
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
        os._exit(collectives.LOST)

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
        raise UserError(f"{failed} ({str(error).splitlines()[0][:150]})") from error
    finally:
        watch.cancel()
    counts = [len(jax.local_devices(process)) for process in range(jax.process_count())]
    if len(set(counts)) > 1:
        raise UserError(
            f"The processes have {counts} devices: all must have equally many. On CPUs, set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N everywhere."
        )
