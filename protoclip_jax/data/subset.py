"""Some rows of a source, drawn at random, in little memory."""

import numpy as np
from jaxtyping import Int

_BLOCK = 4096  # rows of the source between two counts


class Subset:
    """Some rows of a source, in its order; a `PairSource`.

    Memory: a bit for each row of the source, so that worker processes cost 2 MB and not 120 where
    it has 15 million.
    """

    def __init__(self, source, limit: int, seed: int):
        """Draws `limit` rows of a `PairSource` from the seed alone."""
        rng = np.random.default_rng(seed)
        chosen = np.zeros(len(source), bool)
        chosen[rng.choice(len(source), limit, replace=False, shuffle=False)] = True
        starts = np.arange(0, len(source), _BLOCK)
        self._ends = np.cumsum(np.add.reduceat(chosen, starts, dtype=np.int64))
        self._bits = np.packbits(chosen)
        self._limit = limit
        self._source = source
        self.name = f"{source.name} ({limit} of {len(source)} pairs)"
        self.fingerprint = f"{source.fingerprint}/{limit}/{seed}"

    def __len__(self) -> int:
        return self._limit

    @property
    def rows(self) -> Int[np.ndarray, " n"]:
        """The rows' numbers in the source, increasing; made anew at each call."""
        return np.flatnonzero(np.unpackbits(self._bits, count=len(self._source)))

    def origin(self, row: int) -> int:
        """The number in the source of a row of the subset."""
        if not 0 <= row < self._limit:
            raise IndexError(f"row {row} of {self.name}, which has {self._limit}")
        block = int(np.searchsorted(self._ends, row, side="right"))
        before = int(self._ends[block - 1]) if block else 0
        bits = np.unpackbits(self._bits[block * _BLOCK // 8 : (block + 1) * _BLOCK // 8])
        return block * _BLOCK + int(np.flatnonzero(bits)[row - before])

    def read(self, row: int) -> tuple[bytes, str]:
        """The pair that `row` of the subset stands for."""
        return self._source.read(self.origin(row))

    def caption(self, row: int) -> str:
        """The caption alone, without opening the picture where the source can do so."""
        row = self.origin(row)
        if hasattr(self._source, "caption"):
            return self._source.caption(row)
        return self._source.read(row)[1]

    def where(self, row: int) -> str:
        """What the row is called in the source."""
        row = self.origin(row)
        if hasattr(self._source, "where"):
            return self._source.where(row)
        return f"{self._source.name} row {row}"

    @property
    def report(self) -> dict:
        """What the source dropped."""
        return getattr(self._source, "report", {})
