"""`check`: whether this machine's accelerator computes what it should, as fast as it should."""

import argparse
import contextlib
import dataclasses
import json
import signal
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from protoclip_jax.benchmark import check_table, goals
from protoclip_jax.benchmark.check_plan import FULL_MINUTES, PARTS, Part, Settings, part_named
from protoclip_jax.benchmark.check_runner import FAILED, SKIPPED, TIMED_OUT, Outcome, Process
from protoclip_jax.benchmark.report import say
from protoclip_jax.storage import atomic

# A part is not begun with less time than this, and the rest is for the table.
_LEAST_SECONDS, _REST_SECONDS = 15.0, 3.0
# From this many cores on, importing the next part's packages does not disturb the one that runs.
_CORES_TO_SPARE = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `check`."""
    parser.add_argument(
        "--small", action="store_true", help="sizes for a CPU; default where there is nothing else"
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=FULL_MINUTES, help="the most it may take; default: 6"
    )
    parser.add_argument(
        "--parts",
        type=_parts,
        default=PARTS,
        metavar="NAME,...",
        help=f"default: all, which are {', '.join(part.name for part in PARTS)}",
    )
    parser.add_argument(
        "--profile", action="store_true", help="take a profile also where no goal is missed"
    )
    parser.add_argument("--out", type=Path, help="a file for the numbers as JSON")


def run(options: argparse.Namespace) -> "CheckReport":
    """Runs the parts one after the other, whatever becomes of each."""
    check = Check(options.minutes, options.small, options.profile)
    with tempfile.TemporaryDirectory() as folder, _ended_by_signals():
        outcomes = check.run(options.parts, Path(folder))
    numbers = assembled(outcomes, check.small, options.minutes, check.seconds())
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(options.out, numbers)
    return CheckReport(numbers)


@dataclasses.dataclass(frozen=True)
class CheckReport:
    """What the command prints: see `report.Report`."""

    numbers: dict[str, Any]

    @property
    def code(self) -> int:
        """1 where a part failed or was ended; a goal that is missed is no failure."""
        return int(bool(self.numbers["failed"]))

    def text(self) -> str:
        """The numbers as JSON, in one line, and the table."""
        return f"{json.dumps(self.numbers)}\n\n{check_table.text(self.numbers)}"


class Check:
    """A check that runs.

    Attributes:
      small: sizes for a CPU.
    """

    def __init__(self, minutes: float, small: bool, profile: bool):
        self.small, self._profile, self._minutes = small, profile, minutes
        self._began = time.monotonic()
        self._machine: dict[str, Any] = {}

    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._began

    def run(self, parts: Sequence[Part], folder: Path) -> dict[str, Outcome]:
        """What became of each part. What they leave behind lies in `folder`."""
        outcomes: dict[str, Outcome] = {}
        first = part_named("devices")  # always: it decides how the others run
        waiting = [part for part in parts if part != first]
        self._take([Process(first, folder)], outcomes)
        self._machine = outcomes[first.name].numbers
        self.small = self.small or self._machine.get("platform", "cpu") == "cpu"
        started: list[Process] = []
        try:
            groups = list(self._groups(waiting))
            for index, group in enumerate(groups):
                turn = started or [Process(part, folder) for part in group]
                following = groups[index + 1] if index + 1 < len(groups) else []
                started = []
                if self._machine.get("cores", 1) >= _CORES_TO_SPARE and not self.small:
                    started = [Process(part, folder) for part in following]
                self._take(turn, outcomes)
        finally:
            for process in started:
                process.end()
        return {part.name: outcomes[part.name] for part in (first, *waiting)}

    def _groups(self, parts: list[Part]) -> Iterator[list[Part]]:
        """What runs at the same time: on a GPU the parts that are not timed."""
        beside = [part for part in parts if not part.timed]
        if self._machine.get("platform") == "gpu" and not self.small and beside:
            yield beside
            parts = [part for part in parts if part.timed]
        for part in parts:
            yield [part]

    def _take(self, processes: list[Process], outcomes: dict[str, Outcome]) -> None:
        """Gives processes their turn, and waits for them."""
        try:
            left = 60 * self._minutes - self.seconds() - _REST_SECONDS
            names = ", ".join(process.part.name for process in processes)
            if left < _LEAST_SECONDS:
                for process in processes:
                    reason = f"no time is left of --minutes={self._minutes:g}"
                    outcomes[process.part.name] = Outcome(SKIPPED, reason=reason)
                return
            say(f"check: {names} ({self.seconds():.0f} s so far)")
            for process in processes:
                most = process.part.seconds * self._minutes / FULL_MINUTES
                settings = Settings(
                    process.part.argument, self.small, self._profile, min(most, left)
                )
                process.go(settings)
            for process in processes:
                outcome = outcomes[process.part.name] = process.wait()
                reason = f": {outcome.reason}" if outcome.reason else ""
                say(f"  {process.part.name} {outcome.status}, {outcome.seconds:.0f} s{reason}")
        finally:
            for process in processes:
                process.end()


def assembled(
    outcomes: dict[str, Outcome], small: bool, minutes: float, seconds: float
) -> dict[str, Any]:
    """Everything, as JSON takes it: the parts, the goals, what failed and what was left out."""
    kind = outcomes["devices"].numbers.get("device", "")
    reached = []
    for goal in goals.GOALS:
        numbers = outcomes[goal.part].numbers if goal.part in outcomes else {}
        value = numbers.get(goal.number)
        held = goals.held(kind, small)
        share = None if value is None or small else goal.reached(value)
        reached.append(
            {
                "part": goal.part,
                "what": goal.what,
                "goal": goal.value,
                "value": value,
                "reached": share,
                "missed": held and share is not None and share < 1,
            }
        )

    def those(*statuses: str) -> list[str]:
        return [name for name, outcome in outcomes.items() if outcome.status in statuses]

    return {
        "small": small,
        "minutes": minutes,
        "seconds": seconds,
        "failed": those(FAILED, TIMED_OUT),
        "skipped": those(SKIPPED),
        "goals": reached,
        "parts": {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()},
    }


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the parts too, as Ctrl-C does."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 24 * 60:
        raise argparse.ArgumentTypeError(f"{text}: a number of minutes above 0 is needed")
    return value


def _parts(text: str) -> list[Part]:
    try:
        return list(dict.fromkeys(part_named(name) for name in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
