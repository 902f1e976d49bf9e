"""The processes of `check`: one a part, within its time, and what became of it."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from protoclip_jax.benchmark.check_plan import ROOT, Part, Settings

COMMAND = (sys.executable, "-m", "protoclip_jax.benchmark.check_part")
DONE, FAILED, TIMED_OUT, SKIPPED = "done", "failed", "timed out", "skipped"
# How JAX takes a GPU's memory. A timed part has the device to itself; of the others several may
# share it.
_ALONE = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
_BESIDE = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_LOG_LINES = 15
_POLL_SECONDS = 0.05


@dataclasses.dataclass
class Outcome:
    """What became of a part.

    Attributes:
      status: "done", "failed", "timed out" or "skipped".
      seconds: from its turn on.
      numbers: what it found, or had found when it was ended.
      reason: why it is not done.
      log: the last lines it printed, where it is not done.
    """

    status: str
    seconds: float = 0.0
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    log: list[str] = dataclasses.field(default_factory=list)


class Process:
    """A part that is started, and waits for its turn without touching a device."""

    def __init__(self, part: Part, folder: Path):
        """Args:
        part: what to run.
        folder: for its result and its log.
        """
        self.part = part
        self._result, self._log = folder / f"{part.name}.json", folder / f"{part.name}.log"
        self._began = self._limit = 0.0
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*COMMAND, part.name, str(self._result)],
                cwd=ROOT,
                env=(_ALONE if part.timed else _BESIDE) | dict(os.environ),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # a group, which is ended with all that it started
            )

    def go(self, settings: Settings) -> None:
        """Begins the part's turn."""
        self._began, self._limit = time.monotonic(), settings.seconds
        told = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
        with contextlib.suppress(OSError):  # then it has ended already
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()

    def wait(self) -> Outcome:
        """What became of the part, at its end or that of its time."""
        while self._process.poll() is None and self._left() > 0:
            time.sleep(_POLL_SECONDS)
        code = self._process.poll()
        self.end()
        seconds = time.monotonic() - self._began
        found = self._found()
        outcome = Outcome(DONE, seconds, found["numbers"])
        if code is None:
            outcome.status, outcome.reason = TIMED_OUT, f"ended after {self._limit:.0f} s"
        elif code or found["failure"]:
            outcome.status = FAILED
            outcome.reason = found["failure"] or f"its process ended with {_ending(code)}"
        if outcome.status != DONE:
            outcome.log = self._last_lines()
        return outcome

    def end(self) -> None:
        """Ends the process, and all that it started."""
        with contextlib.suppress(OSError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def _left(self) -> float:
        return self._began + self._limit - time.monotonic()

    def _found(self) -> dict[str, Any]:
        try:
            return json.loads(self._result.read_text())
        except (OSError, ValueError):
            return {"numbers": {}, "failure": None}

    def _last_lines(self) -> list[str]:
        lines = self._log.read_text(errors="replace").splitlines()
        return [line.rstrip() for line in lines if line.strip()][-_LOG_LINES:]


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}"
    return f"signal {-code}"
