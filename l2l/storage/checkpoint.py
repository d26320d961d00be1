"""The checkpoints (Orbax) that a run resumes from.

A checkpoint holds the whole `MetaState`, free of the number of devices and processes, and what else
the loop needs; a checksum of all of it is read before it is trusted. What a run gives away in the
end is an export (`exports.py`).
"""

import contextlib
import errno
import itertools
import logging
import os
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from l2l.cluster import collectives
from l2l.console import errors
from l2l.console.errors import UserError
from l2l.core import base

_TIMES = "_CHECKPOINT_METADATA"  # Orbax's name.
# A read that the system refuses is tried again after so many seconds each: network file systems
# have moments.
WAITS = (0.5, 1.0, 2.0)
# What Orbax and TensorStore raise for content that is not what was written: fields that are not
# there, text that is no JSON, blocks whose own checksums are wrong. All else is no damage.
_FORMAT = (ValueError, LookupError, AttributeError, TypeError, EOFError)
# Of the system, these say that a file is not there at all, which no second read will change.
_MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


class _Stored(NamedTuple):
    tree: Any
    checksum: Any


class _Damaged(Exception):
    """What a checkpoint holds is not what was written."""


_FINE, _DAMAGED, _REFUSED, _FAILED = range(4)  # How a process fared with a read, best to worst.


class Saver:
    """The checkpoints of one directory, which is created if missing; the last `keep` are kept.

    Args:
      say: called with a sentence about each checkpoint that was set aside.

    Raises:
      UserError: the directory cannot be written. `save` and `close` raise it too, where an earlier
        checkpoint turns out not to have been written.
    """

    def __init__(self, directory, keep: int = 3, say: Callable[[str], None] = logging.warning):
        import orbax.checkpoint as ocp  # A second and a half, which `load` does not need.

        self.directory, self.say = Path(directory).absolute(), say
        self.orbax, self.closed = ocp, False
        with errors.naming(self.directory):
            self.directory.mkdir(exist_ok=True)
        self.identity = os.stat(self.directory)
        policies = ocp.checkpoint_managers
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(1),  # The loop decides.
            preservation_policy=policies.LatestN(keep),
            enable_async_checkpointing=True,
            # Otherwise a thread of Orbax waits five minutes for a folder that cannot be created.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        with contextlib.ExitStack() as silence:
            # Orbax logs every file it writes, and its threads every error that `_writing` reports.
            silence.enter_context(_silenced(str(Path(ocp.__file__).parent.parent)))
            try:
                self.manager = ocp.CheckpointManager(self.directory, options=options)
            except OSError as error:
                raise errors.about(self.directory, error) from error
            except _FORMAT:  # Orbax can do without the times of steps, which are damaged.
                collectives.together(self._set_times_aside)
                self.manager = ocp.CheckpointManager(self.directory, options=options)
            self.silence = silence.pop_all()  # Until it is closed.

    def save(self, step: int, tree) -> None:
        """Returns once the arrays are copied; they are written in the background."""
        tree = jax.tree.map(jnp.asarray, base.raw(tree))
        stored = _Stored(tree, checksum(tree))
        with _writing(self.directory):
            # Orbax would create it again, without the run's other files.
            if not os.path.samestat(self.identity, os.stat(self.directory)):
                place = str(self.directory)
                raise FileNotFoundError(errno.ENOENT, "it was replaced by another", place)
            # Orbax knows a NamedTuple by its keys; a plain list needs no class to be read.
            self.manager.save(step, args=self.orbax.args.StandardSave(_leaves(stored)))

    def restore(self, like, shardings) -> tuple[Any, int] | None:
        """(tree, step) of the last checkpoint, or None where there is none. A damaged one
        (its format or checksum is wrong) is set aside (renamed), and the one before it is taken.

        Args:
          like, shardings: pytrees of `jax.ShapeDtypeStruct` and of NamedShardings.

        Raises:
          UserError: there are checkpoints and all are damaged, or the system refuses several times
            to read one, which says nothing of what is in it: nothing is renamed then.
        """
        failed: dict[int, Exception] = {}
        # Process 0's list: another host may see a new directory later, or an old one longer.
        for step in collectives.together(lambda: sorted(self.manager.all_steps(), reverse=True)):
            try:
                tree = self._open(step, like, shardings)
            except _Damaged as error:
                failed[step] = error
                continue
            # Only now that a good one is found: where all are damaged, nothing is moved.
            collectives.together(lambda: [self._set_aside(step) for step in failed] and None)
            for bad, reason in failed.items():
                self.say(f"Checkpoint {bad} is damaged ({reason}): set aside for that of {step}.")
            if failed:
                self.manager.reload()
            return tree, step
        if failed:
            raise UserError(
                f"No checkpoint under {self.directory} can be read ({failed[max(failed)]}). "
                "Choose another --workdir, or move that directory away to start again."
            ) from failed[max(failed)]
        return None

    def _open(self, step: int, like, shardings):
        data = jax.eval_shape(base.raw, like)
        where = jax.tree.leaves(shardings)
        same = NamedSharding(where[0].mesh, PartitionSpec())
        number = jax.ShapeDtypeStruct((), jnp.uint32, sharding=same)
        target = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
            for x, s in zip(jax.tree.leaves(data), where, strict=True)
        ]
        target = {str(i): x for i, x in enumerate([*target, number])}
        leaves = self._read(self.directory / str(step) / "default", target)
        *leaves, expected = (leaves[str(i)] for i in range(len(target)))
        tree = jax.tree.unflatten(jax.tree.structure(data), leaves)
        if int(checksum(tree)) != int(expected):
            raise _Damaged("its checksum is wrong")
        return base.typed(tree)

    def _read(self, folder: Path, target) -> dict[str, Any]:
        # Not through the manager, whose processes wait for one another, even for one that failed.
        handler = self.orbax.StandardCheckpointHandler()
        arguments = self.orbax.args.StandardRestore(target)
        for wait in (*WAITS, None):
            leaves, failure = None, None
            try:
                leaves = handler.restore(folder, args=arguments)
            except Exception as error:
                failure = _judged(error, folder)
            # The worst that any process met decides for all of them.
            worst = int(collectives.largest(np.int32(_severity(failure))))
            if worst == _FINE:
                return dict(leaves or {})
            if worst == _REFUSED and wait is not None:
                time.sleep(wait)
                continue
            if failure is not None and worst == _severity(failure):
                if isinstance(failure, OSError):
                    raise _refusal(folder, failure) from failure
                raise failure
            if worst == _DAMAGED:
                raise _Damaged("another process cannot read its part")
            break
        raise collectives.Elsewhere("Another process cannot read its part, and says why.")

    def _set_aside(self, step: int) -> None:
        name = f"damaged-{step}"  # Of a step that was damaged before, damaged-3-2 and so on.
        others = (self.directory / f"{name}-{i}" for i in itertools.count(2))
        places = itertools.chain([self.directory / name], others)
        free = next(path for path in places if not path.exists())
        (self.directory / str(step)).rename(free)

    def _set_times_aside(self) -> None:
        for file in self.directory.glob(f"*/{_TIMES}"):
            file.rename(file.with_name("damaged" + _TIMES))

    def close(self) -> None:
        """Returns when everything is on the disk. May be called more than once."""
        if self.closed:
            return
        try:
            with _writing(self.directory):
                self.manager.wait_until_finished()
                self.manager.close()
            self.closed = True
        finally:
            self.silence.close()


@contextlib.contextmanager
def _silenced(home: str):
    """Drops what is logged from code in the folder `home`, and nothing else, while it lasts."""

    def others(record: logging.LogRecord) -> bool:
        frames = traceback.extract_tb(record.exc_info[2]) if record.exc_info else []
        places = [record.pathname, record.getMessage(), *(frame.filename for frame in frames)]
        return not any(home in place for place in places)

    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    for logger in loggers:
        logger.addFilter(others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(others)


@contextlib.contextmanager
def _writing(directory):
    """What Orbax and TensorStore raise for a checkpoint that cannot be written, as a UserError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        # The traceback keeps half-done writes alive, which would complain when the program ends.
        error.__traceback__ = None
        number = _number(error)
        if number == errno.ENOENT or not directory.is_dir():
            raise UserError(
                f"{directory} is gone: it was removed, or its file system unmounted, while the run "
                f"was at work. Bring it back if you can and {errors.AGAIN}, or from the start."
            ) from error
        if number:
            raise errors.about(directory, OSError(number, "")) from error
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"No checkpoint could be written under {directory} ({reason}). Earlier ones are "
            f"kept: remove the cause, then {errors.AGAIN}."
        ) from error


def _number(error: Exception) -> int | None:
    """The errno of an error of the system, also of one that TensorStore reports in words."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else getattr(error, "errno", None)


def _judged(error: Exception, folder: Path) -> Exception:
    """What a failed read of a checkpoint means: `_Damaged`, an OSError, or, of what is neither
    (no memory, a bug), the error itself."""
    number, judged = _number(error), error
    if number is not None:  # OSError makes the subclass that fits, such as FileNotFoundError.
        judged = OSError(number, os.strerror(number), str(folder))
    if isinstance(judged, (*_MISSING, *_FORMAT)):
        judged = _Damaged(" ".join(errors.printable(str(error)).split())[:200])
    judged.__cause__ = None if judged is error else error
    return judged


def _refusal(folder: Path, error: OSError) -> UserError:
    reason = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
    remedy = errors.REMEDIES.get(error.errno or 0, f"Mend the cause, then {errors.AGAIN}.")
    return UserError(
        f"{folder} could not be read in {len(WAITS) + 1} attempts ({errors.printable(reason)}); it "
        f"is left as it is. {remedy}"
    )


def _severity(failure: Exception | None) -> int:
    if failure is None:
        return _FINE
    if isinstance(failure, _Damaged):
        return _DAMAGED
    return _REFUSED if isinstance(failure, OSError) else _FAILED


def _leaves(tree):
    return {str(i): leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


@jax.jit
def checksum(tree) -> jax.Array:
    """Σᵢ (2i + 1) xᵢ mod 2³² over the bits of all leaves: any one flipped bit changes it, and it is
    the same however the arrays are split over devices. A uint32 scalar."""
    total = jnp.zeros((), jnp.uint32)
    for number, x in enumerate(jax.tree.leaves(tree)):
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        width = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        bits = jax.lax.bitcast_convert_type(x, width).reshape(-1).astype(jnp.uint32)
        odd = 2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1
        total += jnp.sum(odd * bits, dtype=jnp.uint32) * jnp.uint32(2 * number + 1)
    return total
