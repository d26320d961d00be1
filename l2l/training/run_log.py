"""What a run reports as it goes: a bar on a terminal, dated lines elsewhere, and two logs."""

import json
import os
import time
from pathlib import Path
from typing import Any

from l2l.console import errors
from l2l.console.progress import Bar
from l2l.evaluation import report
from l2l.storage import files

FLUSH = 10  # Seconds between writes of TensorBoard's file, each of which waits for the disk.


class RunLog:
    """The logs of a run of `steps` meta-steps that goes on from `begun`: metrics.jsonl, events of
    TensorBoard, and a `Bar`.

    Rows of metrics.jsonl beyond `begun` are dropped: they will come again.
    """

    def __init__(self, directory, steps: int, begun: int = 0, stream=None):
        directory = Path(directory)
        self.path = directory / "metrics.jsonl"
        with errors.naming(self.path):
            _rewind(self.path, begun)
            self.rows = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.board = _Board(directory, begun)
        self.bar = Bar(steps, "meta-step", begun, stream)

    def say(self, sentence: str) -> None:
        """Says a sentence at once."""
        self.bar.say(sentence)

    def has_comparison(self, step: int) -> bool:
        """Whether a comparison after meta-step `step` is in metrics.jsonl."""
        with errors.naming(self.path):
            rows = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return any(
            row["step"] == step and any(name.startswith("comparison/") for name in row)
            for row in rows
        )

    def start(self, step: int) -> None:
        """The first meta-step begins: the pace is told from here."""
        self.bar.resume(step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        """Adds a row to metrics.jsonl (NaN as null, infinities as text) and to TensorBoard."""
        row = report.plain({"step": step, **numbers})  # JSON has no NaN.
        with errors.naming(self.path):
            self.rows.write(json.dumps(row, allow_nan=False) + "\n")
            self.rows.flush()
        self.board.add(step, numbers)

    def show(self, step: int, meta_loss: float, stage: str, comparison: str) -> None:
        """Moves the bar, or prints a line."""
        self.bar.show(step, f"meta-loss {meta_loss:.4f}, horizon {stage}, {comparison}")

    def close(self) -> None:
        """Puts everything on the disk. May be called more than once."""
        if self.rows.closed:
            return
        self.bar.close()
        with errors.naming(self.path):
            try:
                self.rows.flush()
                os.fsync(self.rows.fileno())
            finally:
                self.rows.close()
        self.board.close()


class Silence:
    """The log of all processes but the first, which speaks for them."""

    def __init__(self, directory, steps: int, begun: int = 0):
        del directory, steps, begun

    def _nothing(self, *_) -> None:
        pass

    say = start = log = show = close = has_comparison = _nothing


class _Board:
    """TensorBoard's events, written by the caller's own thread: that of tensorboardX dies of a full
    disk in silence, and then whoever adds to its queue waits for ever."""

    def __init__(self, directory: Path, begun: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self.directory = directory
        self.events: Any = event_pb2  # Made by protobuf, which type checkers cannot read.
        # The name has the second of the clock, which may have been that of an earlier run too.
        before = len(list(directory.glob("events.out.tfevents.*")))
        with errors.naming(directory):
            self.writer = EventsWriter(str(directory / "events"), f".{before}")
            if begun:  # What earlier runs said of later steps is hidden.
                log = self.events.SessionLog(status=self.events.SessionLog.START)
                self._write(step=begun + 1, session_log=log)
            self.writer.flush()
        self.flushed = time.monotonic()

    def _write(self, **content) -> None:
        self.writer.write_event(self.events.Event(wall_time=time.time(), **content))

    def add(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboardX.summary import scalar

        with errors.naming(self.directory):
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    self._write(step=step, summary=scalar(name, value))
            if time.monotonic() - self.flushed > FLUSH:
                self.flushed = time.monotonic()
                self.writer.flush()

    def close(self) -> None:
        with errors.naming(self.directory):
            self.writer.close()


def _rewind(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # The last line of a killed run may be half a line.
    files.write(path, "".join(kept).encode())
