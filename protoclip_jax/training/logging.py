"""Where the numbers of a run go: metrics.jsonl, TensorBoard events, Weights & Biases."""

import json
import math
from pathlib import Path

import jax
from tensorboardX import SummaryWriter

from protoclip_jax.config import Config, ConfigError
from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import write_text
from protoclip_jax.storage.paths import AnyPath


class MetricLog:
    """Writes one line a call to `metrics.jsonl`, and the same numbers as TensorBoard events.

    Lines of steps after `step` are dropped at the start: a run that resumes writes them again.
    """

    def __init__(self, folder: Path, config: Config, step: int, run: str | None = None):
        """Args:
        folder: where to write: the workdir, or what is mirrored there.
        config: the recipe.
        step: finished steps.
        run: name of the run; none = the folder's.
        """
        self._file = self._events = self._wandb = None
        if jax.process_index():
            return  # the numbers are the same on every process: the first one writes them
        path, lines = folder / "metrics.jsonl", read_metrics(folder)
        kept = [line for line in lines if line["step"] <= step]
        if len(kept) < len(lines):
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a")
        if config.log.tensorboard:
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if config.log.wandb_project:
            self._wandb = _start_wandb(config, folder, run or folder.name)

    def write(self, step: int, episode: int, phase: str, values: dict[str, float]) -> None:
        """Records numbers of a step; values that are not finite become null in the JSON."""
        if self._file is None:
            return
        line = {"step": step, "episode": episode, "phase": phase}
        line |= {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(values | {"episode": episode}, step=step)

    def flush(self) -> None:
        """Writes what is still in memory; of the lines nothing is."""
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


def read_metrics(workdir: AnyPath) -> list[dict]:
    """The lines of `metrics.jsonl`; a last line cut by a kill is left out."""
    try:
        whole = objects.read_text(workdir / "metrics.jsonl")
    except FileNotFoundError:
        return []
    lines = []
    for text in whole.splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


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
