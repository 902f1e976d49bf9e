"""Pair lists: a TSV or CSV of picture paths and captions, with little memory at any length.

What a list is:
- UTF-8, with or without a byte-order mark; a header names the columns; one line is one pair.
- With the tab as separator, quotes are ordinary characters. With any other separator a line
  follows CSV's rules for quotes. A quoted field that goes on over further lines is left out with
  all of them, also where the separator is the tab and the lines make a row only together.
- A path may begin with the scheme of a bucket, such as gs://; a web address is no path.
- Relative paths start at the list's own folder, or at `image_root`.
- Two lists are the same (have one fingerprint) if their lines below the header are equal, byte for
  byte and in order, and the two columns and the separator are. Where the list lies and where its
  relative paths start does not count, nor do the images themselves.

A row that cannot be a pair is dropped and counted by reason before anything starts. Nothing else
is left out: pairs + dropped rows = lines below the header.
"""

import dataclasses
import functools
import hashlib
import os
import weakref
from collections.abc import Iterator

import numpy as np

from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.decoding import NO_CAPTION
from protoclip_jax.data.files import read_picture
from protoclip_jax.data.list_form import HEAD, refuse_other_forms
from protoclip_jax.data.list_header import read_header
from protoclip_jax.data.list_lines import (
    FIELD_LINES,
    Repeats,
    chunks,
    lines,
    read_at,
    record,
    runs_on,
    suspects,
)
from protoclip_jax.data.seen_files import SeenFiles, unreachable
from protoclip_jax.storage.copies import local_copy
from protoclip_jax.storage.disks import patient
from protoclip_jax.storage.paths import (
    absolute,
    check_scheme,
    full_path,
    is_remote,
    readable_schemes,
    scheme,
)

NO_PATH = "no path"
EMPTY_LINE = "empty line"
NOT_UTF8 = "not UTF-8"
NUL = "NUL bytes (UTF-16, or a damaged list?)"
TOO_MANY_COLUMNS = "more columns than the header"
SPACE_AT_QUOTES = "a space before the quotes of a cell, which then are none: take it out"
BROKEN_QUOTES = "quotes that do not end on the line"
CONTINUED = "the rest of a quoted field over several lines"
OLD_LINE_ENDS = "carriage returns within the line (old Mac line ends?)"
WEB = "a web address (%s://): get the pictures with `prepare download`"

_EXAMPLES = 5  # line numbers kept by reason
_STRIDE = 32  # one line start in so many is kept: 0.25 bytes a row
_FIELD_BYTES = 2**16  # of a quoted field over several lines


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
          ValueError: it is another kind of file, lacks a column, or holds no pair; or
            `image_root` cannot be read.
        """
        self.name = os.fspath(path)
        self._path = local_copy(self.name)  # absolute: a worker may start in another folder
        self._root = absolute(image_root or os.path.dirname(self.name))
        if len(separator) != 1 or separator in '"\r\n' or not separator.isascii():
            raise ValueError(f"separator {separator!r} must be one ASCII character such as '\\t'")
        if image_column == caption_column:
            raise ValueError(
                f"image_column and caption_column are both {image_column!r}: the paths would be "
                "the captions"
            )
        self._separator = separator
        # Nobody else writes the copy of a remote list.
        self._seen = None if is_remote(self.name) else SeenFiles.now([self._path])
        if is_remote(self._root):
            check_scheme(self._root)
        refuse_other_forms(self.name, read_at(self._file, 0, HEAD))
        head = next(chunks(self._file, 0), (b"", 0))[0]
        columns, self._head = read_header(
            self.name, head, separator, (image_column, caption_column)
        )
        del head
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
        count = self._continued = 0
        for chunk, offset in chunks(self._file, len(self._head)):
            digest.update(chunk)
            starts, ends = lines(chunk)
            kept_starts = starts[-count % _STRIDE :: _STRIDE]
            self._starts.append(kept_starts + offset)
            for line, reason in self._faults(chunk, offset, starts, ends):
                dropped.append(count + line)
                entry = self.report.setdefault(reason, Dropped())
                entry.count += 1
                if len(entry.lines) < _EXAMPLES:
                    entry.lines.append(count + line + 2)
            count += len(starts)
            self._end = offset + len(chunk)
        self._starts = np.concatenate([np.zeros(0, np.int64), *self._starts])
        digest.update(np.array(dropped, np.int64).tobytes())  # other rules, other rows
        # Row r is line r + i for the i dropped lines before it: those with line - i <= r.
        self._shifted = np.array(dropped, np.int64) - np.arange(len(dropped))
        self._rows = count - len(dropped)
        self.fingerprint = digest.hexdigest()

    def _digest(self):
        how = repr((self._image, self._caption, self._separator))
        return hashlib.blake2b(how.encode(), digest_size=16)

    def _same(self) -> bool:
        """Whether the list under our path has the content that was scanned."""
        digest = self._digest()
        with open(self._path, "rb", buffering=0) as file:
            if read_at(file.fileno(), 0, len(self._head)) != self._head:
                return False
            for chunk, _ in chunks(file.fileno(), len(self._head)):
                digest.update(chunk)
        return digest.hexdigest() == self.fingerprint

    def _faults(self, chunk, offset, starts, ends) -> Iterator[tuple[int, str]]:
        """Bad lines of a chunk at an offset, in order, with the reason."""
        found = suspects(
            chunk,
            starts,
            ends,
            self._separator,
            self._width,
            (self._image, self._caption),
            readable_schemes(),
        )
        done = min(self._continued, len(starts))
        self._continued -= done
        yield from ((line, CONTINUED) for line in range(done))
        for line in found.tolist():
            if line < done:
                continue
            text = chunk[starts[line] : ends[line]]
            more = self._runs_on(text, offset + int(ends[line]) + 1) if b'"' in text else 0
            reason = BROKEN_QUOTES if more else self._fault(text)
            if reason is not None:
                yield line, reason
            done = min(line + 1 + more, len(starts))
            self._continued = line + 1 + more - done
            yield from ((rest, CONTINUED) for rest in range(line + 1, done))

    def _runs_on(self, line: bytes, after: int) -> int:
        """Over how many of the lines after it (at a place of the file) a quoted field goes on."""
        first = _plain(line)
        if record([first, ""], self._separator)[1] == 1:
            return 0  # most quotes end where they should: the file is not asked
        rest = read_at(self._file, after, _FIELD_BYTES).split(b"\n")[:FIELD_LINES]
        return runs_on(first, list(map(_plain, rest)), self._separator, self._width)

    def _fault(self, line: bytes) -> str | None:
        """Why a line cannot be a pair, or None."""
        try:
            text = line.decode()
        except UnicodeDecodeError:
            return NOT_UTF8
        if not text.strip("\r"):
            return EMPTY_LINE
        if "\0" in text:
            return NUL
        cells = self._cells(text)
        if cells is None:
            return BROKEN_QUOTES
        if "\r" in text.rstrip("\r") and (self._separator == "\t" or '"' not in text):
            return OLD_LINE_ENDS
        if len(cells) > self._width:
            spaced = self._separator != "\t" and f'{self._separator} "' in text
            return SPACE_AT_QUOTES if spaced else TOO_MANY_COLUMNS
        if len(cells) <= self._image or not cells[self._image].strip():
            return NO_PATH
        if reason := _foreign(scheme(cells[self._image].strip())):
            return reason
        if len(cells) <= self._caption or not is_caption(cells[self._caption]):
            return NO_CAPTION
        return None

    def _cells(self, text: str) -> list[str] | None:
        """The fields of a line; None if CSV's quotes leave it unfinished."""
        text = text.removesuffix("\r")
        if self._separator == "\t" or '"' not in text:
            return text.split(self._separator)
        # A quote left open makes the reader ask for the second line.
        cells, lines = record([text, ""], self._separator)
        return cells if lines == 1 else None

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

    def repeats(self) -> Repeats:
        """Counts pairs whose path and caption are those of an earlier one; reads the whole list."""
        if self._seen is not None:
            self._seen.check(self._path, self._same)
        found, count = Repeats(), 0
        dropped = self._shifted + np.arange(len(self._shifted))
        for chunk, _ in chunks(self._file, len(self._head)):
            texts = chunk.replace(b"\r\n", b"\n").removesuffix(b"\n").split(b"\n")
            begin, end = np.searchsorted(dropped, [count, count + len(texts)])
            for line in dropped[begin:end][::-1].tolist():
                del texts[line - count]
            count += len(texts) + int(end - begin)
            found.add(self._pairs(texts))
        return found

    def _pairs(self, texts: list[bytes]) -> list[bytes]:
        """What of lines makes a pair."""
        if self._width == 2:
            return texts
        separator = self._separator.encode()
        if separator == b"\t":
            parted = (text.split(separator) for text in texts)
            return [cells[self._image] + b"\t" + cells[self._caption] for cells in parted]
        both = (self._cells(text.decode()) for text in texts)
        return [f"{cells[self._image]}\t{cells[self._caption]}".encode() for cells in both]

    def _report_text(self) -> str:
        parts = [f"{reason}: {dropped}" for reason, dropped in self.report.items()]
        return f" (dropped: {'; '.join(parts)})" if parts else ""

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key != "_file"}


def _plain(line: bytes) -> str:
    return line.decode(errors="replace").removesuffix("\r")


@functools.cache
def _foreign(name: str) -> str | None:
    """Why a path with a scheme cannot be read, or None if it can."""
    if not name or name in readable_schemes():
        return None
    if name.lower() in ("http", "https", "ftp"):
        return WEB % name
    try:
        check_scheme(f"{name}://")
    except ValueError as error:
        return str(error)
    return None
