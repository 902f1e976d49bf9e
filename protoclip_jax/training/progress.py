"""What a person sees of a run: a bar with phase, episode, loss and time left, and plain lines."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """A bar over all steps of the run.

    Time left is from the pace of this process (extraction and clustering included), so that it
    is right after a restart too. Where standard error is no terminal there is no bar, and the
    lines alone tell the story.
    """

    def __init__(self, total: int, done: int, enabled: bool = True):
        self._bar = tqdm(
            total=total,
            initial=done,
            disable=not (enabled and sys.stderr.isatty()),
            smoothing=0,  # the mean pace: an episode's extraction comes in bursts
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"
            " [{elapsed}<{remaining}]{postfix}",
        )

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()

    def doing(self, what: str) -> None:
        """Names what goes on now, left of the bar."""
        self._bar.set_description_str(what)

    def step(self, count: int = 1) -> None:
        """Counts steps."""
        self._bar.update(count)

    def show(self, values: dict[str, float]) -> None:
        """Shows numbers right of the bar."""
        self._bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()})

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()


class Stopwatch:
    """Seconds of each named part of an episode."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def line(self) -> str:
        """The parts in one line, in the order in which they happened."""
        return ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
