"""Pair lists: a TSV or CSV of picture paths and captions, with little memory at any length.

What a list is:
- UTF-8, with or without a byte-order mark; a header names the columns; one line is one pair.
- With the tab as separator, quotes are ordinary characters. With any other separator a line
  follows CSV's rules for quotes; a quoted field cannot span lines.
- Relative paths start at the list's own folder, or at `image_root`.
- Two lists are the same (have one fingerprint) if their lines below the header are equal, byte for
  byte and in order, and the two columns and the separator are. Where the list lies and where its
  relative paths start does not count, nor do the images themselves.

A row that cannot be a pair is dropped and counted by reason before anything starts. Nothing else
is left out: pairs + dropped rows = lines below the header.
"""

import csv
import dataclasses
import functools
import hashlib
import os
import weakref
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.decoding import NO_CAPTION
from protoclip_jax.data.files import read_picture
from protoclip_jax.data.seen_files import SeenFiles, unreachable
from protoclip_jax.storage.copies import local_copy
from protoclip_jax.storage.disks import patient
from protoclip_jax.storage.paths import absolute, full_path, is_remote

NO_PATH = "no path"
EMPTY_LINE = "empty line"
NOT_UTF8 = "not UTF-8"
TOO_MANY_COLUMNS = "more columns than the header"
BROKEN_QUOTES = "quotes that do not end on the line"

_EXAMPLES = 5  # line numbers kept by reason
_STRIDE = 32  # one line start in so many is kept: 0.25 bytes a row
_CHUNK = 2**22  # bytes scanned at a time
_BOM = b"\xef\xbb\xbf"


@dataclasses.dataclass
class Dropped:
    """Rows left out for one reason: how many, and the first line numbers (the header is 1)."""

    count: int = 0
    lines: list[int] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.lines) else ""
        return f"{self.count} (line {', '.join(map(str, self.lines))}{more})"


class PairList:
    """The pairs of a list in its order; a `PairSource`.

    Memory: a quarter of a byte a row and 8 bytes a dropped row; the lines are read from the file.
    It is never mapped: a map of a file that is cut ends the process. Of a remote list (gs://) a
    local copy is read.

    Attributes:
      name: the list's path.
      report: what was dropped, by reason.
      fingerprint: hash of the list's content and of how it is read.
    """

    def __init__(
        self,
        path: str,
        *,
        image_column: str = "filepath",
        caption_column: str = "title",
        separator: str = "\t",
        image_root: str | None = None,
    ):
        """Scans the whole list.

        Raises:
          FileNotFoundError: there is no such list.
          SourceChanged: it is being written.
          ValueError: it is not UTF-8, lacks a column, or holds no pair.
        """
        self.name = os.fspath(path)
        self._path = local_copy(self.name)  # absolute: a worker may start in another folder
        self._root = absolute(image_root or os.path.dirname(self.name))
        if len(separator) != 1 or separator in '"\r\n' or not separator.isascii():
            raise ValueError(f"separator {separator!r} must be one ASCII character such as '\\t'")
        self._separator = separator
        # Nobody else writes the copy of a remote list.
        self._seen = None if is_remote(self.name) else SeenFiles.now([self._path])
        columns, self._head = _header(
            self.name, self._file, separator, (image_column, caption_column)
        )
        self._image, self._caption = columns.index(image_column), columns.index(caption_column)
        self._width = len(columns)
        self.report: dict[str, Dropped] = {}
        self._scan()
        if self._seen is not None:
            self._seen.check(self._path, lambda: False)
        if not len(self):
            raise ValueError(f"{self.name} holds 0 pairs below its header{self._report_text()}")

    @functools.cached_property
    def _file(self) -> int:
        """The open file's descriptor; each process has its own."""
        descriptor = patient(lambda: os.open(self._path, os.O_RDONLY))
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def _scan(self) -> None:
        digest = self._digest()
        self._starts, dropped = [], []
        lines = 0
        for chunk, offset in _chunks(self._file, len(self._head)):
            digest.update(chunk)
            starts, ends = _lines(chunk)
            kept_starts = starts[-lines % _STRIDE :: _STRIDE]
            self._starts.append(kept_starts + offset)
            for line, reason in self._faults(chunk, starts, ends):
                dropped.append(lines + line)
                entry = self.report.setdefault(reason, Dropped())
                entry.count += 1
                if len(entry.lines) < _EXAMPLES:
                    entry.lines.append(lines + line + 2)
            lines += len(starts)
            self._end = offset + len(chunk)
        self._starts = np.concatenate([np.zeros(0, np.int64), *self._starts])
        digest.update(np.array(dropped, np.int64).tobytes())  # other rules, other rows
        # Row r is line r + i for the i dropped lines before it: those with line - i <= r.
        self._shifted = np.array(dropped, np.int64) - np.arange(len(dropped))
        self._rows = lines - len(dropped)
        self.fingerprint = digest.hexdigest()

    def _digest(self):
        how = repr((self._image, self._caption, self._separator))
        return hashlib.blake2b(how.encode(), digest_size=16)

    def _same(self) -> bool:
        """Whether the list under our path has the content that was scanned."""
        digest = self._digest()
        with open(self._path, "rb", buffering=0) as file:
            if _read(file.fileno(), 0, len(self._head)) != self._head:
                return False
            for chunk, _ in _chunks(file.fileno(), len(self._head)):
                digest.update(chunk)
        return digest.hexdigest() == self.fingerprint

    def _faults(self, chunk, starts, ends) -> Iterator[tuple[int, str]]:
        """Bad lines of a chunk, in order, with the reason."""
        suspects = _suspects(
            chunk, starts, ends, self._separator, self._width, (self._image, self._caption)
        )
        for line in suspects:
            reason = self._fault(chunk[starts[line] : ends[line]])
            if reason is not None:
                yield int(line), reason

    def _fault(self, line: bytes) -> str | None:
        """Why a line cannot be a pair, or None."""
        try:
            text = line.decode()
        except UnicodeDecodeError:
            return NOT_UTF8
        if not text.strip("\r"):
            return EMPTY_LINE
        cells = self._cells(text)
        if cells is None:
            return BROKEN_QUOTES
        if len(cells) > self._width:
            return TOO_MANY_COLUMNS
        if len(cells) <= self._image or not cells[self._image].strip():
            return NO_PATH
        if len(cells) <= self._caption or not is_caption(cells[self._caption]):
            return NO_CAPTION
        return None

    def _cells(self, text: str) -> list[str] | None:
        """The fields of a line; None if CSV's quotes leave it unfinished."""
        text = text.removesuffix("\r")
        if self._separator == "\t" or '"' not in text:
            return text.split(self._separator)
        # A quote left open makes the reader ask for the second line.
        reader = csv.reader([text, ""], delimiter=self._separator)
        try:
            cells = next(reader)
        except csv.Error:
            return None
        return cells if reader.line_num == 1 else None

    def __len__(self) -> int:
        return self._rows

    def _line(self, row: int) -> bytes:
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self.name}, which has {self._rows}")
        line = row + int(np.searchsorted(self._shifted, row, side="right"))
        block, at = divmod(line, _STRIDE)
        last = block + 1 == len(self._starts)
        end = self._end if last else int(self._starts[block + 1])
        return self._read(int(self._starts[block]), end).split(b"\n", at + 1)[at]

    def _read(self, begin: int, end: int) -> bytes:
        """A part of the list as it was at the start."""
        try:
            data = patient(lambda: self._part(begin, end))
        except OSError as error:
            if self._seen is not None:  # which tells a list that is gone
                self._seen.check(self._path, self._same)
            raise unreachable(self.name, error) from error
        if self._seen is not None:
            self._seen.check(self._path, self._same)
        return data

    def _part(self, begin: int, end: int) -> bytes:
        try:
            return os.pread(self._file, end - begin, begin)
        except OSError:
            self.__dict__.pop("_file", None)  # a network mount forgets open files: the next is new
            raise

    def cells(self, row: int) -> tuple[str, str]:
        """Full picture path and caption of a row."""
        cells = self._cells(self._line(row).decode())
        return full_path(self._root, cells[self._image]), cells[self._caption]

    def where(self, row: int) -> str:
        """The full path of a row's picture."""
        return self.cells(row)[0]

    def caption(self, row: int) -> str:
        """The caption alone, without opening the picture."""
        return self.cells(row)[1]

    def read(self, row: int) -> tuple[bytes, str]:
        """The picture's file and the caption, as written.

        Raises:
          UnreadableImage: the file cannot be read.
        """
        path, caption = self.cells(row)
        return read_picture(path), caption

    def _report_text(self) -> str:
        parts = [f"{reason}: {dropped}" for reason, dropped in self.report.items()]
        return f" (dropped: {'; '.join(parts)})" if parts else ""

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_file"}


def _read(file: int, begin: int, length: int) -> bytes:
    return patient(lambda: os.pread(file, length, begin))


def _header(
    path: str, file: int, separator: str, wanted: tuple[str, str]
) -> tuple[list[str], bytes]:
    """Column names, and the line that names them."""
    head = next(_chunks(file, 0), (b"", 0))[0]
    if not head:
        raise ValueError(f"{path} is empty: it holds 0 pairs")
    _refuse_other_encodings(path, head[:4096])
    head = head[: head.find(b"\n") + 1] or head
    try:
        text = head.removesuffix(b"\n").removeprefix(_BOM).decode().strip("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: line 1 is not UTF-8 (byte {error.start}): convert it") from error
    columns = [name.strip().strip('"') for name in text.split(separator)]
    missing = [name for name in wanted if columns.count(name) != 1]
    if missing:
        raise ValueError(
            f"{path}: its columns with separator {separator!r} are {str(columns)[:300]}; wanted "
            f"{wanted[0]!r} and {wanted[1]!r}, each once: set image_column and caption_column, or "
            f"separator{_other_separator(text, separator, wanted)}"
        )
    return columns, head


def _other_separator(header: str, separator: str, wanted: tuple[str, str]) -> str:
    for other in "\t,;|":
        names = [name.strip().strip('"') for name in header.split(other)]
        if other != separator and all(name in names for name in wanted):
            return f" (looks like {other!r})"
    return ""


def _refuse_other_encodings(path: str, head: bytes) -> None:
    found = None
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        found = "UTF-32"
    elif head.startswith(b"\xff\xfe") or b"\0" in head[1:200:2]:
        found = "UTF-16 (little endian)"
    elif head.startswith(b"\xfe\xff") or b"\0" in head[0:200:2]:
        found = "UTF-16 (big endian)"
    if found:
        raise ValueError(
            f"{path} is encoded in {found}, wanted UTF-8: convert it, for example with "
            f"`iconv -f {found.split()[0]} -t UTF-8`"
        )


def _chunks(file: int, first: int) -> Iterator[tuple[bytes, int]]:
    """Runs of whole lines with their offset; the last may lack its line end."""
    parts, at = [], first
    size = os.fstat(file).st_size  # of a file that grows, what is there now
    while block := _read(file, at, min(_CHUNK, max(0, size - at))):
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


def _lines(chunk: bytes) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Where each line of a chunk starts and ends (without its line end)."""
    ends = np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n"))
    if not chunk.endswith(b"\n"):
        ends = np.append(ends, len(chunk))
    return np.concatenate([[0], ends[:-1] + 1]), ends


def _suspects(
    chunk: bytes,
    starts: Int[np.ndarray, " n"],
    ends: Int[np.ndarray, " n"],
    separator: str,
    width: int,
    columns: tuple[int, int],
) -> Int[np.ndarray, " m"]:
    """Lines that a closer look has to clear; all others are pairs for certain.

    Certain means: UTF-8, no more columns than the header, both cells have a visible ASCII
    character, nothing that cleaning could take away for it, and (with CSV's rules) no quotes.
    """
    codes = np.frombuffer(chunk, np.uint8)
    separators = np.flatnonzero(codes == ord(separator))
    first = np.searchsorted(separators, starts)
    count = np.searchsorted(separators, ends) - first
    suspect = count >= width
    visible = np.concatenate([[0], np.cumsum((codes > 32) & (codes < 127), dtype=np.int32)])
    # One more separator, beyond every line, so that indexing past the last stays inside.
    separators = np.append(separators, [len(chunk)] * (width + 1))
    for column in columns:
        begin = starts if column == 0 else separators[first + column - 1] + 1
        stop = np.minimum(separators[first + column], ends)
        lacks = count < column
        begin = np.minimum(begin, stop)
        suspect |= lacks | (visible[stop] == visible[begin])
    # What a caption may be made of that is none: HTML entities, special tokens, escape codes.
    doubtful = (codes == ord("&")) | (codes == ord("<")) | (codes == 27)
    suspect[np.searchsorted(ends, np.flatnonzero(doubtful))] = True
    if separator != "\t":
        quotes = np.flatnonzero(codes == ord('"'))
        suspect[np.searchsorted(ends, quotes)] = True
    try:
        chunk.decode()
    except UnicodeDecodeError:
        # Rare: every line that is not plain ASCII is looked at.
        suspect[np.searchsorted(ends, np.flatnonzero(codes > 127))] = True
    return np.flatnonzero(suspect)
