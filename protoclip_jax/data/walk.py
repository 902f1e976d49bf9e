"""Which batch comes when: the passes of a run, one after the other, cut into batches.

A run reads each prototype episode twice: `extract` walks over the positions whose features are
clustered, `train` over the whole batches. Both walk in the order of the positions, and both belong
to one walk, so that one set of workers serves them all and what was decoded for one pass can serve
the other.
"""

import bisect
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

PASSES = {"train": 0, "extract": 1}  # the numbers that enter the random keys


@dataclasses.dataclass(frozen=True)
class Section:
    """One pass over the first `positions` of an episode, from the batch `first` on."""

    kind: str
    episode: int
    positions: int
    first: int = 0


class Walk:
    """All batches of a run by number, as one process sees them.

    Batches of the same step of an episode have numbers that are equal modulo `workers`, in both
    passes: grain gives them to the same worker, which may have kept their pictures. The numbers in
    between stand for nothing.
    """

    def __init__(
        self,
        sections: Sequence[Section],
        batch: int,
        *,
        workers: int = 0,
        rows: Int[np.ndarray, " b"] | None = None,
    ):
        """Lays the sections out.

        Args:
          sections: the passes, in their order.
          batch: positions of a step, of all processes.
          workers: worker processes that share the batches.
          rows: places in a batch that this process supplies; None: all of them.
        """
        self.batch = batch
        self._rows = np.arange(batch) if rows is None else rows
        self._workers = max(1, workers)
        self._sections, self._begins, self._end = tuple(sections), [], 0
        for section in self._sections:
            if section.kind not in PASSES:
                raise ValueError(
                    f"kind {section.kind!r} is unknown: use one of {', '.join(PASSES)}"
                )
            begin = self._end + (section.first - self._end) % self._workers
            self._begins.append(begin)
            self._end = begin + max(0, self.steps(section) - section.first)
        self.batches = sum(max(0, self.steps(s) - s.first) for s in self._sections)

    def __len__(self) -> int:
        """Numbers, those that stand for nothing included; `batches` counts the others."""
        return self._end

    def steps(self, section: Section) -> int:
        """Batches of a whole pass; the last one may be partly padding."""
        return -(-section.positions // self.batch)

    def locate(self, index: int) -> tuple[Section, int] | None:
        """Section and step of a number, or None where it stands for nothing."""
        # The last section that begins here or before, and holds at least one batch.
        at = bisect.bisect_right(self._begins, index) - 1
        if at < 0:
            return None
        section = self._sections[at]
        step = section.first + index - self._begins[at]
        return (section, step) if step < self.steps(section) else None

    def positions(self, step: int) -> Int[np.ndarray, " b"]:
        """This process's positions of a step; those past the end of the pass are padding."""
        return step * self.batch + self._rows

    def ahead(self, index: int) -> tuple[Section, range] | None:
        """The next pass of extraction after a batch of training, and which of its steps to prepare.

        The steps of the whole next pass are spread evenly over the batches of this one, each to
        the worker that will be asked for it.
        """
        at = bisect.bisect_right(self._begins, index) - 1
        following = (s for s in self._sections[at + 1 :] if s.kind == "extract")
        upcoming = next(following, None)
        if upcoming is None:
            return None
        section = self._sections[at]
        step = section.first + index - self._begins[at]
        turn, worker = divmod(step, self._workers)
        turns = len(range(worker, self.steps(section), self._workers))
        mine = range(worker, self.steps(upcoming), self._workers)
        wanted = len(mine)
        return upcoming, mine[turn * wanted // turns : (turn + 1) * wanted // turns]
