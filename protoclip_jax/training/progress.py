"""What a person sees of a run: a bar with phase, episode, loss and time left, and plain lines."""

import sys

import jax
from tqdm import tqdm


class Progress:
    """A bar over all steps of the run.

    Time left is from the pace of this process (extraction and clustering included), so that it
    is right after a restart too. Where standard error is no terminal there is no bar, and the
    lines alone tell the story.
    """

    def __init__(self, total: int, enabled: bool = True):
        self._quiet = jax.process_index() > 0  # one process tells the story
        self._bar = tqdm(
            total=total,
            disable=self._quiet or not (enabled and sys.stderr.isatty()),
            smoothing=0,  # the mean pace: an episode's extraction comes in bursts
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}"
            " [{elapsed}<{remaining}]{postfix}",
        )

    def start(self, done: int) -> None:
        """Begins at a step: what was done by an earlier process is not in the pace."""
        self._bar.reset()
        # Both, or the pace would be that of all steps in the time of the last few.
        self._bar.initial = self._bar.n = self._bar.last_print_n = done
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._quiet:
            return
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
