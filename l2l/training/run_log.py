"""What a run says while it runs: a bar on a terminal, dated lines elsewhere, and two logs."""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from l2l.console import errors
from l2l.evaluation import report
from l2l.storage import files

FLUSH = 10  # Seconds between writes of TensorBoard's file, which waits for the disk.


class Progress(NamedTuple):
    """say:   (sentence) -> None, at once.
    start: (step) -> None. The first meta-step begins: the pace is told from here.
    log:   (step, numbers) -> None, to metrics.jsonl (NaN as null, infinities as text) and
           TensorBoard.
    show:  (step, meta-loss, stage, comparison) -> None: moves the bar, or prints a line.
    close: () -> None; more than once if you like.
    """

    say: Callable[[str], None]
    start: Callable[[int], None]
    log: Callable[[int, dict], None]
    show: Callable[[int, float, str, str], None]
    close: Callable[[], None]


def progress(directory, steps: int, start: int = 0, stream=None) -> Progress:
    """Opens the logs of a run of `steps` meta-steps that goes on from `start`.

    Rows of metrics.jsonl beyond `start` are dropped: they will come again. On a terminal there is
    a bar; elsewhere a dated line at most every ten seconds.
    """
    import tqdm

    stream = sys.stderr if stream is None else stream
    directory = Path(directory)
    path = directory / "metrics.jsonl"
    with errors.naming(path):
        _rewind(path, start)
        rows = open(path, "a", encoding="utf-8")  # noqa: SIM115
    board = _board(directory, start)
    terminal = stream.isatty()
    bar = None
    if terminal:
        bar = tqdm.tqdm(total=steps, initial=start, unit="step", file=stream, dynamic_ncols=True)
    began = [time.monotonic(), start]
    last = [-math.inf]

    def say(sentence):
        if bar is not None:
            bar.write(sentence, file=stream)
        else:
            print(time.strftime("%Y-%m-%d %H:%M:%S ") + sentence, file=stream, flush=True)

    def begin(step):
        began[:] = time.monotonic(), step
        if bar is not None:
            bar.unpause()

    def log(step, numbers):
        with errors.naming(path):
            row = report.plain({"step": step, **numbers})  # JSON has no NaN.
            rows.write(json.dumps(row, allow_nan=False) + "\n")
            rows.flush()
        board.add(step, numbers)

    def show(step, meta_loss, stage, comparison):
        if bar is not None:
            bar.set_postfix_str(f"meta-loss {meta_loss:.4f}, horizon {stage}, {comparison}")
            bar.update(step - bar.n)
            return
        now = time.monotonic()
        if now - last[0] < 10 and step < steps:
            return
        last[0] = now
        left = f", {clock((now - began[0]) / (step - began[1]) * (steps - step))} left"
        numbers = f"meta-loss {meta_loss:.4f}, horizon {stage}, {comparison}{left}"
        say(f"meta-step {step}/{steps}, {numbers}")

    def close():
        if rows.closed:
            return
        if bar is not None:
            bar.close()
        with errors.naming(path):
            try:
                rows.flush()
                os.fsync(rows.fileno())
            finally:
                rows.close()
        board.close()

    return Progress(say, begin, log, show, close)


class _Board(NamedTuple):
    """add:   (step, numbers) -> None. close: () -> None."""

    add: Callable[[int, dict], None]
    close: Callable[[], None]


def _board(directory: Path, start: int) -> _Board:
    """TensorBoard's events, written by the caller's own thread: that of tensorboardX dies of a full
    disk in silence, and then whoever adds to its queue waits for ever."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

    # The name has the second of the clock, which may have been that of an earlier run too.
    before = len(list(directory.glob("events.out.tfevents.*")))
    flushed = [time.monotonic()]
    with errors.naming(directory):
        writer = EventsWriter(str(directory / "events"), f".{before}")
        if start:  # What earlier runs said of later steps is hidden.
            log = SessionLog(status=SessionLog.START)
            writer.write_event(Event(wall_time=time.time(), step=start + 1, session_log=log))
        writer.flush()

    def add(step, numbers):
        with errors.naming(directory):
            for name, value in numbers.items():
                if isinstance(value, int | float):
                    summary = scalar(name, value)
                    writer.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            if time.monotonic() - flushed[0] > FLUSH:
                flushed[0] = time.monotonic()
                writer.flush()

    def close():
        with errors.naming(directory):
            writer.close()

    return _Board(add, close)


def silence(directory, steps: int, start: int = 0) -> Progress:
    """The progress of a process that has another to speak for it."""
    del directory, steps, start
    return Progress(*(lambda *_: None for _ in Progress._fields))


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


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
