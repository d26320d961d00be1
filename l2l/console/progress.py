"""How far along something is: a bar on a terminal, dated lines elsewhere."""

import math
import sys
import time

EVERY = 10  # Seconds between lines where there is no bar.


class Bar:
    """A bar on a terminal; elsewhere a dated line at most every ten seconds, and one at the end.

    Args:
      total: what `show` is given when all is done.
      unit: what is counted; "" where only the share of it means anything.
      start: what was done before.
      stream: standard error unless given.
    """

    def __init__(self, total: float, unit: str = "", start: float = 0, stream=None):
        self.stream = sys.stderr if stream is None else stream
        self.total, self.unit = total, unit
        self.last = -math.inf
        self.bar = None
        if self.stream.isatty():
            import tqdm

            shape = None if unit else "{percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self.bar = tqdm.tqdm(
                total=total, initial=start, unit=unit, bar_format=shape, file=self.stream,
                dynamic_ncols=True,
            )  # fmt: skip
        self.resume(start)

    def say(self, sentence: str) -> None:
        """Says a sentence at once, above the bar."""
        if self.bar is not None:
            self.bar.write(sentence, file=self.stream)
        else:
            when = time.strftime("%Y-%m-%d %H:%M:%S ")
            print(when + sentence, file=self.stream, flush=True)

    def resume(self, done: float) -> None:
        """The pace is told from here."""
        self.began = time.monotonic(), done
        if self.bar is not None:
            self.bar.unpause()

    def show(self, done: float, text: str) -> None:
        """Moves the bar, or prints a line."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            self.bar.update(done - self.bar.n)
            return
        now = time.monotonic()
        if now - self.last < EVERY and done < self.total:
            return
        self.last = now
        began, before = self.began
        left = ""
        if done > before:
            left = f", {clock((now - began) / (done - before) * (self.total - done))} left"
        where = f"{self.unit} {done}/{self.total}," if self.unit else f"{done / self.total:.0%}"
        self.say(f"{where} {text}{left}")

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
