"""Labels of an episode by position, and the pairs that they belong to."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

NONE = -1  # the label of a position without one: it leaves the mean of the prototype terms


class EpisodeLabels:
    """The cluster of each position by teacher, and the row of the pair that was clustered.

    The training pass reads the source again. Where it finds another pair than extraction did,
    because one of the two reads failed, that pair has no label: the first one's is not its own.

    Attributes:
      other: positions so far, in this process, at which training read another pair.
    """

    def __init__(
        self, clusters: Mapping[str, Int[np.ndarray, " m"]], rows: Int[np.ndarray, " m"], size: int
    ):
        """Takes labels and rows of the first m positions; the others were not extracted.

        Args:
          clusters: labels by teacher ("image", "text", "external").
          rows: row in the source that each label was made from.
          size: positions of the episode.
        """
        rest = (0, size - len(rows))
        self._labels = {
            name: np.pad(np.asarray(found), rest, constant_values=NONE)
            for name, found in clusters.items()
        }
        self._rows: Int[np.ndarray, " size"] | None = np.pad(
            rows.astype(np.int64), rest, constant_values=NONE
        )
        self.other = 0

    def of(
        self, positions: Int[np.ndarray, " b"], rows: Int[np.ndarray, " b"]
    ) -> dict[str, Int[np.ndarray, " b"]]:
        """Labels of a batch by teacher, int32.

        Args:
          positions: places in the episode.
          rows: row of the pair that was read for each of them.
        """
        labels = {name: found[positions] for name, found in self._labels.items()}
        if self._rows is None:
            return labels
        extracted = self._rows[positions]
        other = (extracted != NONE) & (extracted != rows)
        self.other += int(other.sum())
        return {name: np.where(other, NONE, found) for name, found in labels.items()}

    def arrays(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        if self._rows is None:
            return {"labels": self._labels}
        # As pairs of 32 bits, which any device can hold.
        return {"labels": self._labels, "rows": self._rows.view(np.uint32)}

    @classmethod
    def restored(cls, arrays: Mapping[str, Any]) -> "EpisodeLabels":
        """The labels of `arrays`. Checkpoints of earlier versions lack the rows (see `checked`)."""
        labels = {name: np.asarray(found) for name, found in arrays["labels"].items()}
        size = len(next(iter(labels.values())))
        if "rows" not in arrays:
            made = cls(labels, np.zeros(size, np.int64), size)
            made._rows = None
            return made
        return cls(labels, np.asarray(arrays["rows"]).view(np.int64), size)

    @property
    def checked(self) -> bool:
        """Whether the pairs are known, so that another pair is noticed."""
        return self._rows is not None
