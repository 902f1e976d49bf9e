"""How far a long work is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time

from tqdm import tqdm

_FIRST = 10.0  # seconds until the first line; the next ones come after twice as long each
_LONGEST = 600.0  # seconds between two lines at most


def counted(total: int, unit: str, *, done: int = 0, what: str = "", shown: bool = True):
    """Shows how many of `total` things are done; a context with `update(count)` and `n`.

    Args:
      total: how many there are.
      unit: what one is called, such as "pair".
      done: how many were done before.
      what: the work, in a word.
      shown: False shows nothing.
    """
    if shown and not sys.stderr.isatty():
        return PlainLines(total, unit, done, what)
    return tqdm(
        total=total, initial=done, desc=what or None, unit=unit, smoothing=0.1, disable=not shown
    )


class PlainLines:
    """Lines for a file or a pipe, where a bar would be written anew thousands of times.

    Attributes:
      n: how many are done.
    """

    def __init__(self, total: int, unit: str, done: int = 0, what: str = ""):
        self.n = done
        self._total, self._unit, self._what = total, unit, what
        self._first, self._start = done, time.monotonic()
        self._wait, self._next = _FIRST, self._start + _FIRST

    def update(self, count: int = 1) -> None:
        """Counts more of them, and says how far it is when it is time."""
        self.n += count
        now = time.monotonic()
        if now >= self._next:
            self._say(now)
            self._wait = min(2 * self._wait, _LONGEST)
            self._next = now + self._wait

    def _say(self, now: float) -> None:
        what = f"{self._what}: " if self._what else ""
        left = ""
        if self.n > self._first:
            seconds = (now - self._start) / (self.n - self._first) * (self._total - self.n)
            left = f", {spoken(seconds)} left"
        print(
            f"  {what}{self.n:,} of {self._total:,} {self._unit}s "
            f"({self.n / max(1, self._total):.0%}){left}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing to put back: a context because tqdm's bar is one."""


def spoken(seconds: float) -> str:
    """A time in one unit, as "40 s", "12 min" or "3.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
