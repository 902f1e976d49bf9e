"""The lines of `metrics.jsonl`: read whole or refused, appended whole or kept for later."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import write_text
from protoclip_jax.storage.paths import AnyPath

METRICS_FILE = "metrics.jsonl"


def read_metrics(workdir: AnyPath) -> list[dict]:
    """The lines of `metrics.jsonl`; a last line cut by a kill is left out.

    Raises:
      ValueError: another line is damaged; names file and line.
    """
    return [json.loads(line) for line in _lines(workdir / METRICS_FILE)]


def _lines(path: AnyPath) -> list[str]:
    """Whole lines, each a JSON object with a step."""
    try:
        whole = objects.read_text(path)
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: byte {error.start} is no text") from error
    *lines, _ = whole.split("\n")  # what follows the last end of a line is not whole
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            intact = isinstance(found, dict) and isinstance(found.get("step"), int)
        except ValueError:
            intact = False
        if not intact:
            raise ValueError(
                f"{path} is damaged: line {number} is not one of a run's numbers: {line[:60]!r}. "
                "Mend or remove that line"
            )
    return lines


class MetricFile:
    """Appends lines. What a full or failing disk does not take waits for the next line.

    The run is worth more than its log: it goes on, and says so once.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]):
        """Opens the file, without the lines of steps after `step` and without a torn last one.

        Raises:
          ValueError: a line is damaged.
          OSError: it cannot be written.
        """
        self._path, self._say = folder / METRICS_FILE, say
        lines = _lines(self._path)
        kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step)
        if self._path.exists() and self._path.read_bytes() != kept.encode():
            write_text(self._path, kept)
        self._waiting = b""
        self._failing = False
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def write(self, line: dict) -> None:
        """Appends a line, and what waits."""
        self._waiting += (json.dumps(line) + "\n").encode()
        self.flush()

    def flush(self) -> None:
        """Writes what waits, if it can be written."""
        try:
            while self._waiting:  # a disk that becomes full may take a part
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._failing:
                self._say(
                    f"  {self._path} cannot be written ({error.strerror}): the run goes on, and "
                    "tries it again with the next numbers. Make room"
                )
            self._failing = True
            return
        if self._failing:
            self._say(f"  {self._path} is written again")
        self._failing = False

    def close(self) -> None:
        """Writes what waits; says so where it is lost."""
        self.flush()
        if self._waiting:
            self._say(f"  {self._waiting.count(10)} lines of {self._path} are lost")
        os.close(self._file)
