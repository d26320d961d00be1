"""What a run says while it runs: a bar on a terminal, dated lines elsewhere, and two logs."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple


class Progress(NamedTuple):
    """say:   (sentence) -> None, at once.
    log:   (step, numbers) -> None, to metrics.jsonl and TensorBoard.
    show:  (step, meta-loss, stage, comparison) -> None: moves the bar, or prints a line.
    close: () -> None; more than once if you like.
    """

    say: Callable[[str], None]
    log: Callable[[int, dict], None]
    show: Callable[[int, float, str, str], None]
    close: Callable[[], None]


def progress(directory, steps: int, start: int = 0, stream=None) -> Progress:
    """Opens the logs of a run of `steps` meta-steps that goes on from `start`.

    Rows of metrics.jsonl beyond `start` are dropped: they will come again. On a terminal there is
    a bar; elsewhere a dated line at most every ten seconds.
    """
    import tensorboardX
    import tqdm

    stream = sys.stderr if stream is None else stream
    directory = Path(directory)
    path = directory / "metrics.jsonl"
    _rewind(path, start)
    rows = open(path, "a", encoding="utf-8")  # noqa: SIM115
    board = tensorboardX.SummaryWriter(str(directory), purge_step=start + 1 if start else None)
    terminal = stream.isatty()
    bar = None
    if terminal:
        bar = tqdm.tqdm(total=steps, initial=start, unit="step", file=stream, dynamic_ncols=True)
    # The time left is told from the pace since the first sign of life: compiling comes before it.
    marks: list[tuple[float, int]] = []
    last = [0.0]

    def say(sentence):
        if bar is not None:
            bar.write(sentence, file=stream)
        else:
            print(time.strftime("%Y-%m-%d %H:%M:%S ") + sentence, file=stream, flush=True)

    def log(step, numbers):
        rows.write(json.dumps({"step": step, **numbers}) + "\n")
        rows.flush()
        for name, value in numbers.items():
            if isinstance(value, int | float):
                board.add_scalar(name, value, step)

    def show(step, meta_loss, stage, comparison):
        if bar is not None:
            bar.set_postfix_str(f"meta-loss {meta_loss:.4f}, horizon {stage}, {comparison}")
            bar.update(step - bar.n)
            return
        now = time.monotonic()
        if not marks:
            marks.append((now, step))
        elif now - last[0] < 10 and step < steps:
            return
        last[0] = now
        began, done = marks[0][0], step - marks[0][1]
        left = f", {clock((now - began) / done * (steps - step))} left" if done else ""
        numbers = f"meta-loss {meta_loss:.4f}, horizon {stage}, {comparison}{left}"
        say(f"meta-step {step}/{steps}, {numbers}")

    def close():
        if rows.closed:
            return
        if bar is not None:
            bar.close()
        rows.flush()
        os.fsync(rows.fileno())
        rows.close()
        board.close()

    return Progress(say, log, show, close)


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
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.replace(path)
