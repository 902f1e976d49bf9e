"""The parts of `check`: what each runs, for how long, and what it is told."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # configs/ and tests/ lie there
FULL_MINUTES = 6.0  # what the seconds of the parts are made for


@dataclasses.dataclass(frozen=True)
class Part:
    """A part, in a process of its own.

    Attributes:
      name: on the command line and in the numbers.
      module: of this package, whose `run(settings, save)` returns the part's numbers.
      seconds: the most it may take.
      timed: it reports speeds, so that nothing else may run meanwhile.
      argument: what its module is to look at.
    """

    name: str
    module: str
    seconds: float
    timed: bool = True
    argument: str = ""


PARTS = (
    Part("devices", "check_devices", 45.0),
    Part("tests", "check_tests", 100.0, timed=False),
    Part("quickstart-float32", "check_phases", 100.0, timed=False, argument="float32"),
    Part("quickstart-bfloat16", "check_phases", 100.0, timed=False, argument="bfloat16"),
    Part("kmeans", "check_kmeans", 60.0),
    Part("step-RN50", "check_step", 110.0, argument="RN50"),
    Part("step-ViT-B-32", "check_step", 75.0, argument="ViT-B-32"),
    Part("step-ViT-B-16", "check_step", 75.0, argument="ViT-B-16"),
    Part("episode", "check_episode", 110.0),
)


class PartFailure(Exception):
    """What a part has to say when what it checked is wrong; it is no fault of its own."""


@dataclasses.dataclass
class Settings:
    """What a part is told when it is its turn.

    Attributes:
      argument: see `Part`.
      small: sizes for a CPU, in seconds.
      profile: take a profile also where no goal is missed.
      seconds: that the part has.
    """

    argument: str
    small: bool
    profile: bool
    seconds: float

    def __post_init__(self):
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        """Seconds that are left."""
        return self._end - time.monotonic()


# Takes the numbers so far: what is kept of a part that is ended.
Save = Callable[[dict[str, Any]], None]


def part_named(name: str) -> Part:
    """The part of a name.

    Raises:
      ValueError: there is none.
    """
    for part in PARTS:
        if part.name == name:
            return part
    known = ", ".join(part.name for part in PARTS)
    raise ValueError(f"the check has no part {name}: there are {known}")
