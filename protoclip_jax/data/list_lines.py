"""The lines of a list's file, many at a time: where they are, which need a closer look, repeats."""

import csv
import os
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Bool, Int

from protoclip_jax.storage.disks import patient

_CHUNK = 2**22  # bytes scanned at a time
FIELD_LINES = 20  # over which a quoted field may go on, to be taken for one
_HASHES = 2**20  # kept at most to find repeats


def read_at(file: int, begin: int, length: int) -> bytes:
    """So many bytes of an open file from a place on, fewer at its end."""
    return patient(lambda: os.pread(file, length, begin))


def chunks(file: int, first: int) -> Iterator[tuple[bytes, int]]:
    """Runs of whole lines with their offset; the last may lack its line end."""
    parts, at = [], first
    size = os.fstat(file).st_size  # of a file that grows, what is there now
    while block := read_at(file, at, min(_CHUNK, max(0, size - at))):
        at += len(block)
        end = block.rfind(b"\n") + 1
        if end:
            whole, parts = b"".join([*parts, block[:end]]), [block[end:]]
            del block  # memory is what is yielded
            yield whole, first
            first += len(whole)
        else:
            parts.append(block)
    if any(parts):
        yield b"".join(parts), first


def lines(chunk: bytes) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Where each line of a chunk starts and ends (without its line end)."""
    ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
    if not chunk.endswith(b"\n"):
        ends = np.append(ends, len(chunk))
    return np.concatenate([[0], ends[:-1] + 1]), ends


def suspects(
    chunk: bytes,
    starts: Int[np.ndarray, " n"],
    ends: Int[np.ndarray, " n"],
    separator: str,
    width: int,
    columns: tuple[int, int],
    schemes: Iterable[str] = (),
) -> Int[np.ndarray, " m"]:
    """Lines that a closer look has to clear; all others are pairs for certain.

    Certain means: UTF-8, no more columns than the header, both cells have a visible ASCII
    character, nothing that cleaning could take away for it, no address but of a scheme that can be
    read, no carriage return within, no quotes that could go on over the line's end.

    Args:
      chunk: whole lines.
      starts: of the lines.
      ends: of the lines.
      separator: of columns.
      width: columns of the header.
      columns: of path and caption.
      schemes: in which a path may begin, such as "gs".
    """
    codes = np.frombuffer(chunk, np.uint8)
    separators = np.flatnonzero(codes == ord(separator))
    first = np.searchsorted(separators, starts)
    count = np.searchsorted(separators, ends) - first
    suspect = count >= width
    visible = np.concatenate([[0], np.cumsum((codes > 32) & (codes < 127), dtype=np.int32)])
    # One more separator, beyond every line, so that indexing past the last stays inside.
    separators = np.append(separators, [len(chunk)] * (width + 1))
    begins = []
    for column in columns:
        begin = starts if column == 0 else separators[first + column - 1] + 1
        stop = np.minimum(separators[first + column], ends)
        lacks = count < column
        begin = np.minimum(begin, stop)
        begins.append(begin)
        suspect |= lacks | (visible[stop] == visible[begin])
    del visible
    suspect[_of(ends, _addresses(chunk, codes, ends, begins[0], schemes))] = True
    # What a caption may be made of that is none: HTML entities, special tokens, escape codes; and
    # NUL, which no text has.
    doubtful = (codes == ord("&")) | (codes == ord("<")) | (codes == 27) | (codes == 0)
    suspect[_of(ends, np.flatnonzero(doubtful))] = True
    if b"\r" in chunk:
        returns = np.flatnonzero(codes == ord("\r"))
        after = codes[np.minimum(returns + 1, len(codes) - 1)]
        suspect[_of(ends, returns[after != ord("\n")])] = True
    quotes = np.flatnonzero(codes == ord('"'))
    if separator != "\t":
        suspect[_of(ends, quotes)] = True
    elif quotes.size:
        # Only a cell that begins with a quote can go on.
        before = codes[quotes - 1]
        opening = (before == ord("\t")) | (before == ord("\n")) | (quotes == 0)
        suspect[_of(ends, quotes[opening])] = True
    try:
        chunk.decode()
    except UnicodeDecodeError:
        # Rare: every line that is not plain ASCII is looked at.
        suspect[_of(ends, np.flatnonzero(codes > 127))] = True
    return np.flatnonzero(suspect)


def _of(ends: Int[np.ndarray, " n"], places: Int[np.ndarray, " m"]) -> Int[np.ndarray, " m"]:
    """The lines in which places of a chunk are."""
    return np.searchsorted(ends, places)


def _addresses(chunk, codes, ends, begins, schemes: Iterable[str]) -> Int[np.ndarray, " m"]:
    """Where :// stands, but not after a scheme of `schemes` at the begin of its line's path."""
    if b"://" not in chunk:
        return np.zeros(0, np.int64)
    places = np.flatnonzero((codes[:-2] == 58) & (codes[1:-1] == 47) & (codes[2:] == 47))
    lines_of, fine = _of(ends, places), np.zeros(len(places), bool)
    for scheme in schemes:
        start = places - len(scheme)
        same = start == begins[lines_of]
        for number, code in enumerate(scheme.encode()):
            same &= codes[np.maximum(start + number, 0)] == code
        fine |= same
    return places[~fine]


def runs_on(text: str, following: list[str], separator: str, width: int) -> int:
    """Over how many further lines a quoted field of a line goes on; 0 where it ends, or never does.

    With the tab, where quotes are ordinary characters, it goes on only if the lines make a row
    together, and are none alone.

    Args:
      text: a line.
      following: the lines after it.
      separator: of columns.
      width: columns of the list.
    """
    if record([text, ""], separator)[1] == 1:
        return 0
    cells, more = record([text, *following, ""], separator)
    more -= 1
    if cells is None or more > len(following):
        return 0
    if separator == "\t":
        rows = [line.count("\t") + 1 >= width for line in (text, *following[:more])]
        if len(cells) != width or (rows[0] and any(rows[1:])):
            return 0
    return more


def record(texts: list[str], separator: str) -> tuple[list[str] | None, int]:
    """The fields of the first record of CSV, None if it breaks the rules; and its lines."""
    reader = csv.reader(texts, delimiter=separator)
    try:
        return next(reader), reader.line_num
    except csv.Error:
        return None, 1


class Repeats:
    """Counts entries that an earlier one equals; exactly while few, then by a sample.

    The sample is of contents, not of places: an entry and its repeats are in it together.

    Attributes:
      one_in: 1 while the count is exact; otherwise the sample's share is one in so many.
    """

    def __init__(self):
        self.one_in = 1
        self._hashes = np.zeros(0, np.int64)  # each once
        self._times = np.zeros(0, np.int64)
        self._fresh: list[Int[np.ndarray, " n"]] = []

    def add(self, entries: list[bytes]) -> None:
        """Takes in more entries."""
        # The hash differs from process to process, which nobody can make use of.
        hashes = np.fromiter(map(hash, entries), np.int64, len(entries))
        self._fresh.append(hashes[self._chosen(hashes)])
        if sum(map(len, self._fresh)) > _HASHES:
            self._settle()

    def _settle(self) -> None:
        fresh = np.concatenate([np.zeros(0, np.int64), *self._fresh])
        self._fresh = []
        self._hashes, places = np.unique(np.append(self._hashes, fresh), return_inverse=True)
        times = np.append(self._times, np.ones(len(fresh), np.int64))
        self._times = np.bincount(places, times).astype(np.int64)
        while len(self._hashes) > _HASHES:
            self.one_in *= 2
            chosen = self._chosen(self._hashes)
            self._hashes, self._times = self._hashes[chosen], self._times[chosen]

    def _chosen(self, hashes: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        return hashes & (self.one_in - 1) == 0

    @property
    def count(self) -> int:
        """Entries that repeat an earlier one."""
        self._settle()
        return self.one_in * int(np.sum(self._times - 1))
