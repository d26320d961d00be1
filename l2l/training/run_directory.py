"""A run directory belongs to one configuration and to one run at a time, and survives signals."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np

from l2l.cluster import collectives
from l2l.console import errors
from l2l.console.errors import UserError
from l2l.evaluation import report
from l2l.storage import files
from l2l.training.sections import filled

START = "start.safetensors"  # A copy of the export that a run's theta begins with.
PROVENANCE = "provenance.json"  # What it was made of besides its configuration.
# What a run has made by the time it begins to train.
_BEGUN = (
    *("config.json", "lock", START, PROVENANCE),
    *("metrics.jsonl", "checkpoints", "events.out.tfevents.*"),
)


@contextlib.contextmanager
def entered(directory: Path, config: dict):
    """Holds a directory, made if need be, for a run of this configuration. A start that fails
    before anything is logged or saved leaves nothing behind, so that the next may be of another
    configuration.

    Raises:
      UserError: it cannot be made, another run holds it, or it is another configuration's.
    """
    made = [place for place in (directory, *directory.parents) if not place.exists()]
    files.folder(directory)
    with errors.naming(directory):
        before = set(os.listdir(directory))
    with lock(directory):
        try:
            claim(directory, config)
            yield
        except BaseException:
            if "config.json" not in before and not _trained(directory):
                _leave(directory, before, made)
            raise


def _trained(directory: Path) -> bool:
    """Whether a meta-step has been logged or saved."""
    with contextlib.suppress(OSError):  # What is wrong with the directory is being told already.
        if (directory / "metrics.jsonl").stat().st_size:
            return True
    return any(path.name.isdigit() for path in directory.glob("checkpoints/*"))


def _leave(directory: Path, before: set[str], made: list[Path]) -> None:
    """Removes what a start has made: of what a run begins with, what was not there before."""
    with contextlib.suppress(OSError):  # What is wrong with the directory is being told already.
        for path in [path for name in _BEGUN for path in directory.glob(name)]:
            if path.name in before:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        for place in made:
            place.rmdir()


def claim(directory: Path, config: dict) -> None:
    """Makes the directory this configuration's, or refuses to."""
    path = directory / "config.json"
    if path.exists():
        check(directory, config)
    elif _trained(directory):
        raise UserError(
            f"{directory} holds a run, and no config.json that says of which configuration: put "
            "that back, or choose another --workdir."
        )
    else:
        files.write(path, json.dumps(_written(config), indent=2).encode() + b"\n")


def check(directory: Path, config: dict) -> None:
    """Refuses a directory that holds a run of another configuration, or whose own is damaged.

    Raises:
      UserError: it does, or is.
    """
    path = directory / "config.json"
    with errors.naming(path):
        content = path.read_bytes() if path.exists() else None
    if content is None:
        return
    try:
        theirs = json.loads(content)
        if not isinstance(theirs, dict):
            raise UserError("it is not a table")
    except (RecursionError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}): restore it, or choose another directory."
        ) from error
    # Filled in as well: earlier versions wrote down only what was typed.
    if different := differences(_written(theirs), _written(config)):
        raise UserError(
            f"{directory} holds a run of another configuration ({'; '.join(different[:8])}). "
            "Choose another --workdir, or remove that directory; to go on in it, use its settings."
        )


def _written(config: dict) -> dict:
    """A configuration as config.json gives it back: with the defaults of today, so that a later
    l2l with others does not go on with them without a word."""
    return json.loads(json.dumps(report.plain(filled(config)), allow_nan=False))


def shared(directory: Path, config: dict) -> None:
    """Refuses a directory or a configuration that is not the same for all processes of a run.

    Raises:
      UserError: on all of them.
    """
    if collectives.count() == 1:
        return
    collectives.alike(
        [json.dumps(config, sort_keys=True).encode()],
        "The processes were started with different configurations: give all the same command.",
    )
    # A network file system may show another host's file late.
    names = ["config.json", START] if config.get("start") else ["config.json"]
    deadline = time.monotonic() + 20
    while not (seen := all((directory / name).exists() for name in names)):
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if collectives.largest(np.int32(not seen)):
        raise UserError(
            f"Not every process sees what process 0 wrote in {directory}: choose a --workdir on a "
            "file system that all hosts share."
        )


def differences(theirs, mine, path="") -> list[str]:
    """Where two pieces of plain data differ, in words: "meta.steps is 9 there, 8 here". Of sections
    of two kinds, whose names differ, the names alone. path: of the keys above both."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        out, keys = [], {*theirs, *mine}
        if "name" in theirs and "name" in mine and theirs["name"] != mine["name"]:
            keys = {"name"}
        for key in sorted(keys):
            out += differences(theirs.get(key), mine.get(key), f"{path}.{key}" if path else key)
        return out
    return [] if theirs == mine else [f"{path} is {theirs} there, {mine} here"]


@contextlib.contextmanager
def lock(directory):
    """Holds a directory for one run; the system lets go of it when the process ends, however.

    Raises:
      UserError: another run holds it.
    """
    with errors.naming(directory):
        file = open(Path(directory) / "lock", "a+")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"Another run is at work in {directory}: wait for it, or choose another --workdir."
            ) from error
        except OSError as error:  # Of a file system without locks.
            raise errors.about(directory, error) from error
        yield


class Signals:
    """Notes SIGINT and SIGTERM in `got`; a second one has the effect that it had before.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self):
        self.got = 0
        self.before = {}

    def _note(self, number, frame):
        self.got = number
        self.release()

    def release(self):
        """From here on signals have the effect that they had before."""
        for number, before in self.before.items():
            # None is a handler that was not installed from Python.
            signal.signal(number, signal.SIG_DFL if before is None else before)

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # Python allows it only there.
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        self.release()
