"""Where the numbers of a run go: metrics.jsonl, TensorBoard events, Weights & Biases."""

import math
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from protoclip_jax.config import Config, ConfigError
from protoclip_jax.training.events import Events
from protoclip_jax.training.metric_file import MetricFile, read_metrics

__all__ = ["Meter", "MetricLog", "check_wandb", "read_metrics"]


def _print(text: str) -> None:
    print(text, file=sys.stderr)


class MetricLog:
    """Writes one line a call to `metrics.jsonl`, and the same numbers as TensorBoard events.

    Lines of steps after `step` are dropped at the start: a run that resumes writes them again. One
    that begins measures step 0 again, too.
    """

    def __init__(
        self,
        folder: Path,
        config: Config,
        step: int,
        run: str | None = None,
        say: Callable[[str], None] = _print,
    ):
        """Args:
        folder: where to write: the workdir, or what is mirrored there.
        config: the recipe.
        step: finished steps.
        run: name of the run; none = the folder's.
        say: gets a line where something cannot be written.

        Raises:
          ConfigError: `metrics.jsonl` is damaged, or cannot be written.
        """
        self._file = self._events = self._wandb = None
        if jax.process_index():
            return  # the numbers are the same on every process: the first one writes them
        step = step or -1
        try:
            self._file = MetricFile(folder, step, say)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error
        if config.log.tensorboard:
            self._events = Events(folder / "tensorboard", step, say)
        if config.log.wandb_project:
            self._wandb = _start_wandb(config, folder, run or folder.name)

    def write(self, step: int, episode: int, phase: str, values: dict[str, float]) -> None:
        """Records numbers of a step; values that are not finite become null in the JSON."""
        if self._file is None:
            return
        line = {"step": step, "episode": episode, "phase": phase}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(line)
        if self._events is not None:
            self._events.write(step, values)
        if self._wandb is not None:
            self._wandb.log(values | {"episode": episode}, step=step)

    def flush(self) -> None:
        """Writes what is still in memory."""
        if self._file is not None:
            self._file.flush()
        if self._events is not None:
            self._events.flush()

    def close(self) -> None:
        """Flushes everything."""
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()


class Meter:
    """Means of metrics that stay on the devices until somebody asks.

    Steps whose update was skipped count in `skipped` only: their loss is no number.
    """

    def __init__(self):
        self._waiting: list[dict[str, jax.Array]] = []
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, metrics: dict[str, jax.Array]) -> None:
        """Keeps the metrics of a step without waiting for them."""
        self._waiting.append(metrics)

    def take(self, into: "Meter") -> list[dict[str, float]]:
        """Fetches what waits, step by step, and adds it to another meter."""
        rows = [
            {name: float(value) for name, value in row.items()}
            for row in jax.device_get(self._waiting)
        ]
        self._waiting = []
        for row in rows:
            into.count(row)
        return rows

    def count(self, row: dict[str, float]) -> None:
        """Adds the numbers of a step."""
        for name, value in row.items():
            if name == "skipped" or not row.get("skipped"):
                self._sums[name] = self._sums.get(name, 0.0) + value
                self._counts[name] = self._counts.get(name, 0) + 1

    def mean(self) -> dict[str, float]:
        """Mean of all that was counted."""
        return {name: value / self._counts[name] for name, value in self._sums.items()}


def check_wandb(config: Config) -> None:
    """Refuses a recipe that wants Weights & Biases where it is not installed.

    Raises:
      ConfigError: the extra is missing.
    """
    if config.log.wandb_project:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"log.wandb_project={config.log.wandb_project!r} needs the wandb extra: "
                "pip install 'protoclip_jax[wandb]'"
            ) from None


def _start_wandb(config: Config, folder: Path, run: str):
    import dataclasses

    import wandb

    # One id a workdir: a run that resumes goes on in the same chart.
    return wandb.init(
        project=config.log.wandb_project,
        id=run,
        dir=str(folder),
        resume="allow",
        config=dataclasses.asdict(config),
    )
