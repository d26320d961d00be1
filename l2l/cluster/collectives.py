"""One run in several processes: agreeing and leaving. `initialize.py` is about joining.

Whatever the host decides from what only one process has seen (a signal, a file, a clock) is first
made the same on all of them: processes that call different programs wait for each other for ever.
"""

import functools
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from l2l.console.errors import UserError

LEAVE_SECONDS = 10
WEEK = 7 * 24 * 3600
LOST = 4  # The exit code where another process is gone, or has never come.
# In what the collectives, barriers and heartbeats of JAX say then.
_LOST = ("gloo", "connection", "barrier", "heartbeat", "unavailable", "coordination", "nccl")


class Elsewhere(UserError):
    """Another process failed, and says why itself."""


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


def broadcast(value):
    """Process 0's `value`, JSON-able, on all processes."""
    if count() == 1:
        return value
    content = json.dumps(value).encode() if first() else b""
    length = int(largest(np.int32(len(content))))
    # Padded to a power of two, so that few sizes are compiled.
    padded = np.zeros(1 << length.bit_length(), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return json.loads(largest(padded)[:length].tobytes())


def together(action: Callable[[], Any]) -> Any:
    """What `action` returns, JSON-able, when process 0 calls it, however long that takes; where it
    fails, all fail.

    Raises:
      UserError: on process 0, what `action` raised; `Elsewhere` on the others.
    """
    if count() == 1:
        return action()
    result, failure = None, None
    if first():
        try:
            result = action()
        except UserError as error:
            failure = error
    _meet()
    failed, result = broadcast((failure is not None, result))
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


def alike(content: Iterable, sentence: str) -> None:
    """UserError(sentence) on all processes where they have different content: bytes, arrays."""
    if count() == 1:
        return
    # 31 bits, of which there is a negative.
    number = functools.reduce(lambda total, part: zlib.crc32(part, total), content, 0) & 0x7FFFFFFF
    high, low = largest(np.array([number, -number], np.int32))
    if high != -low:
        raise UserError(sentence)


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

    def local(x):
        replicated = x.sharding.is_fully_replicated  # Then this process has it already: no copy.
        return (x if replicated else place(x, same)).addressable_data(0)

    return jax.tree.map(local, tree)


def wait(tree) -> None:
    """Waits for arrays without holding up signals, which Python delivers between its own steps."""
    import jax

    for x in jax.tree.leaves(tree):
        while not x.is_ready():
            time.sleep(0.002)


def guard(run: Callable[[], int]) -> int:
    """run(); where it fails in one process of several, all of them end in bounded time, as
    otherwise they would wait for it. What a user can mend (UserError) is raised."""
    try:
        return run()
    except UserError:
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
