"""What an H100 should reach, and who is held to it."""

import dataclasses

# Kinds of devices (as JAX calls them, by their first words) whose products are an H100's.
HELD = ("NVIDIA H100", "NVIDIA H200")


@dataclasses.dataclass(frozen=True)
class Goal:
    """A number that a part of the check should reach.

    Attributes:
      part: of the check.
      number: its name in the part's numbers.
      what: for people.
      value: the goal.
      at_most: whether it is an upper bound; else a lower one.
    """

    part: str
    number: str
    what: str
    value: float
    at_most: bool = False

    def reached(self, value: float) -> float:
        """How much of the goal is reached; 1 or above is all of it."""
        return self.value / value if self.at_most else value / self.value


# The rates of the ViTs are 40 % of the peak of 989 TFLOP/s, at 44 and 123 GFLOP a pair.
GOALS = (
    Goal("kmeans", "ms_for_20", "k-means, ms a modality for 20 iterations", 250.0, at_most=True),
    Goal("step-RN50", "pairs_per_second_per_device", "RN50, pairs a second", 2500.0),
    Goal("step-ViT-B-32", "pairs_per_second_per_device", "ViT-B-32, pairs a second", 8900.0),
    Goal("step-ViT-B-16", "pairs_per_second_per_device", "ViT-B-16, pairs a second", 3200.0),
)


def of(part: str) -> Goal | None:
    """The goal of a part, if it has one."""
    return next((goal for goal in GOALS if goal.part == part), None)


def held(kind: str, small: bool) -> bool:
    """Whether a kind of device is held to the goals; with small sizes none is."""
    return kind.startswith(HELD) and not small


def missed(part: str, numbers: dict, kind: str, small: bool) -> bool:
    """Whether a part has a goal, is held to it, and does not reach it."""
    goal = of(part)
    return goal is not None and held(kind, small) and goal.reached(numbers[goal.number]) < 1
