"""Pairs whose picture cannot be read, or is odd: counted once each, over all processes of a run."""

import base64
import collections
import logging
import os
import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from protoclip_jax.data.decoding import REASONS
from protoclip_jax.data.image_warnings import KINDS
from protoclip_jax.data.sources import PairSource, where
from protoclip_jax.storage.screen import ESCAPED

logger = logging.getLogger(__name__)

_WARNINGS = 5  # rows named in the log; the rest is in the file


def odd_code(kind: str) -> int:
    """How a batch reports an odd picture, among the codes of reasons, which are 0 or more."""
    return -1 - KINDS.index(kind)


class UnreadableLog:
    """What was skipped in a run.

    Memory is a byte a row of the source. With a path, each row is one line "row, picture, reason"
    (tab-separated), written when it is first met; a later run that goes on with the same file does
    not list it again. Pictures that are odd and used all the same are only counted.

    Attributes:
      counts: rows by reason; those of other processes too, as far as they were taken in.
      odd: the rows of odd pictures, by kind, in the order in which they were met.
    """

    def __init__(
        self,
        source: PairSource,
        path: str | os.PathLike | None = None,
        earlier: Sequence[str | os.PathLike] = (),
    ):
        """Args:
        source: the pairs.
        path: of the file; none = only counts.
        earlier: further files, of processes that an earlier run had more.
        """
        self.counts: collections.Counter[str] = collections.Counter()
        self.odd: dict[str, dict[int, None]] = {}
        self._source = source
        self._seen = np.zeros(len(source), bool)
        self._path = path
        self._waiting, self._failing = b"", False
        self._new: list[tuple[int, int]] = []  # not yet given to the other processes
        for known in (path, *earlier):
            if known is not None and os.path.exists(known):
                self._read_earlier(known)

    def __len__(self) -> int:
        return sum(self.counts.values())

    def add(self, faults: Int[np.ndarray, "n 2"]) -> None:
        """Takes in rows and codes of reasons or of what is odd, as a batch brings them."""
        fresh = []
        for row, code in faults.tolist():
            if not self._count(row, code):
                continue
            self._new.append((row, code))
            if code < 0:
                continue
            name, reason = where(self._source, row), REASONS[code]
            fresh.append(f"{row}\t{name}\t{reason}\n")
            if len(self) <= _WARNINGS:
                logger.warning("skipped an unreadable pair: row %d, %s: %s", row, name, reason)
        if fresh and self._path is not None:
            self._append("".join(fresh))

    def _append(self, lines: str) -> None:
        """Writes lines; what a full disk does not take waits for the next ones."""
        self._waiting += lines.encode(errors=ESCAPED)
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

    def take_new(self) -> str:
        """What was met since the last call, for the other processes."""
        new, self._new = np.array(self._new, np.int64), []
        return base64.b85encode(zlib.compress(new.tobytes())).decode()

    def include(self, taken: str) -> None:
        """Counts what a process met; what is known already, such as its own, counts no more."""
        new = np.frombuffer(zlib.decompress(base64.b85decode(taken)), np.int64)
        for row, code in new.reshape(-1, 2).tolist():
            self._count(row, code)

    def _count(self, row: int, code: int) -> bool:
        """Counts a row, unless it was before."""
        if code < 0:
            rows = self.odd.setdefault(KINDS[-1 - code], {})
            fresh = row not in rows
            rows[row] = None
            return fresh
        if self._seen[row]:
            return False
        self._seen[row] = True
        self.counts[REASONS[code]] += 1
        return True

    def first_odd(self, kind: str) -> str:
        """What the first odd picture of a kind is called."""
        return where(self._source, next(iter(self.odd[kind])))

    def _read_earlier(self, path: str | os.PathLike) -> None:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                row, _, rest = line.rstrip("\n").partition("\t")
                reason = rest.rpartition("\t")[2]
                if row.isdecimal() and int(row) < len(self._seen) and reason in REASONS:
                    code = REASONS.index(reason)
                    if self._count(int(row), code):
                        self._new.append((int(row), code))
