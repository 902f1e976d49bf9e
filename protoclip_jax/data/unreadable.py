"""Pairs whose picture cannot be read: counted and listed once each."""

import collections
import logging
import os

import numpy as np
from jaxtyping import Int

from protoclip_jax.data.decoding import REASONS
from protoclip_jax.data.sources import PairSource, where

logger = logging.getLogger(__name__)

_WARNINGS = 5  # rows named in the log; the rest is in the file


class UnreadableLog:
    """What was skipped in a run.

    Memory is a byte a row of the source. With a path, each row is one line "row, picture, reason"
    (tab-separated), written when it is first met; a later run that goes on with the same file does
    not list it again.

    Attributes:
      counts: rows by reason.
    """

    def __init__(self, source: PairSource, path: str | os.PathLike | None = None):
        self.counts: collections.Counter[str] = collections.Counter()
        self._source = source
        self._seen = np.zeros(len(source), bool)
        self._path = path
        self._waiting, self._failing = b"", False
        if path is not None and os.path.exists(path):
            self._read_earlier(path)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, faults: Int[np.ndarray, "n 2"]) -> None:
        """Takes in rows and reason codes, as a batch brings them."""
        fresh = []
        for row, code in faults.tolist():
            if self._seen[row]:
                continue
            self._seen[row] = True
            reason = REASONS[code]
            self.counts[reason] += 1
            name = where(self._source, row)
            fresh.append(f"{row}\t{name}\t{reason}\n")
            if len(self) <= _WARNINGS:
                logger.warning("skipped an unreadable pair: row %d, %s: %s", row, name, reason)
        if fresh and self._path is not None:
            self._append("".join(fresh))

    def _append(self, lines: str) -> None:
        """Writes lines; what a full disk does not take waits for the next ones."""
        self._waiting += lines.encode()
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while self._waiting:
                    self._waiting = self._waiting[os.write(file, self._waiting) :]
            finally:
                os.close(file)
        except OSError as error:
            if not self._failing:
                logger.warning(
                    "%s cannot be written (%s): what it lacks is added with the next line",
                    self._path,
                    error.strerror,
                )
            self._failing = True
        else:
            self._failing = False

    def _read_earlier(self, path: str | os.PathLike) -> None:
        with open(path, encoding="utf-8") as file:
            for line in file:
                row, _, rest = line.rstrip("\n").partition("\t")
                if row.isdecimal() and int(row) < len(self._seen) and not self._seen[int(row)]:
                    self._seen[int(row)] = True
                    self.counts[rest.rpartition("\t")[2]] += 1
