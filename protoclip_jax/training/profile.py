"""A trace of some steps, for TensorBoard's profiler or Perfetto."""

from pathlib import Path

import jax

from protoclip_jax.config import ConfigError


class Profile:
    """Writes a trace of the steps [first, last) to `workdir/profile`."""

    def __init__(self, steps: str | None, workdir: Path, total_steps: int):
        """Args:
          steps: "first:last", or none for no trace.
          workdir: of the run.
          total_steps: of the run.

        Raises:
          ConfigError: not a range of steps, or none of this run.
        """
        self._folder, self._on = workdir / "profile", False
        self._first = self._last = -1
        if steps is not None:
            first, colon, last = steps.partition(":")
            if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
                raise ConfigError(f"--profile={steps}: write FIRST:LAST, for example 100:110")
            self._first, self._last = int(first), int(last)
            if self._first >= total_steps:
                raise ConfigError(
                    f"--profile={steps}: the run has {total_steps} steps, so that none is traced"
                )

    def before(self, step: int) -> None:
        """Starts or ends the trace where it is due."""
        if step == self._first and not self._on:
            jax.profiler.start_trace(str(self._folder))
            self._on = True
        elif step >= self._last:
            self.close()

    def close(self) -> None:
        """Ends a trace that is being written."""
        if self._on:
            jax.profiler.stop_trace()
            self._on = False
