"""Lists of links and captions: which columns they have, and their rows one by one.

Recognised: Conceptual Captions (caption, URL; no header), CC12M (URL, caption; no header), any
list with a header, and the table of YFCC100M (23 or 25 columns, titles and descriptions in URL
encoding; no header).
"""

import collections
import dataclasses
import html
import itertools
import re
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.decoding import NO_CAPTION
from protoclip_jax.data.list_lines import FIELD_LINES, record, runs_on
from protoclip_jax.data.pair_list import (
    BROKEN_QUOTES,
    CONTINUED,
    EMPTY_LINE,
    NOT_UTF8,
    OLD_LINE_ENDS,
    TOO_MANY_COLUMNS,
)
from protoclip_jax.prepare.packed_list import lines_of

NO_URL = "no URL"
COLUMNS = "too few columns"
VIDEO = "a video"
NOT_CHOSEN = "not among the photo ids"

_SAMPLE = 200  # lines looked at
_BOM = b"\xef\xbb\xbf"
_ID = re.compile(r"[0-9]{1,18}")
_URL = re.compile(r"https?://\S+$", re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")
_URL_NAMES = ("url", "image_url", "img_url", "imageurl", "downloadurl", "download_url", "photo_url")
_CAPTION_NAMES = ("caption", "text", "title", "alt", "alt_text", "description")


class Link(NamedTuple):
    """One row: its line in the list (the first is 1), URL and caption."""

    line: int
    url: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a list is to be read.

    Attributes:
      separator: between columns; with the tab, quotes are ordinary characters.
      header: whether line 1 holds the columns' names.
      url: column of the URL, from 0.
      captions: columns whose texts, joined, are the caption.
      encoded: captions are in URL encoding and hold HTML, as in YFCC100M.
      photo: column of the photo's id, where there is one.
      marker: column that is 1 for a video, where there is one.
      form: what the list seems to be, for people.
      names: of the columns, where line 1 tells.
      width: columns of a row; None = any number.
    """

    separator: str
    header: bool
    url: int
    captions: tuple[int, ...]
    encoded: bool = False
    photo: int | None = None
    marker: int | None = None
    form: str = "a list"
    names: tuple[str, ...] = ()
    width: int | None = None

    def __str__(self) -> str:
        captions = " and ".join(map(str, self.captions))
        separator = {"\t": "tabs", ",": "commas"}.get(self.separator, repr(self.separator))
        header = f"a header ({', '.join(self.names)})"[:200] if self.header else "no header"
        return (
            f"{self.form}: {header}, columns separated by {separator}, "
            f"URL in column {self.url}, caption in {captions} (counted from 0)"
        )


def find_layout(
    path: str,
    *,
    url_column: str | None = None,
    caption_column: str | None = None,
    separator: str | None = None,
) -> Layout:
    """Finds out how a list is built, by its first lines; what is given is taken as it is.

    Raises:
      ValueError: no URLs, or no way to tell which column is the caption; says what to give.
    """
    lines = [line.decode(errors="replace").rstrip("\r\n") for line in _sample(path)]
    if not lines:
        raise ValueError(f"{path} is empty")
    if "\r" in lines[0]:
        raise ValueError(
            f"{path} ends its lines with carriage returns alone, as on old Macs: convert it, for "
            f"example with `tr '\\r' '\\n' < {path} > {path}.new`"
        )
    separator = separator or _separator(lines)
    rows = [cells for line in lines if (cells := _cells(line, separator))] or [[""]]
    header = _is_header(rows[0], (url_column, caption_column))
    body = rows[1:] if header else rows
    urls = _url_columns(body)
    if not urls and url_column is None:
        raise ValueError(
            f"{path}: no column holds http links (first line: {lines[0][:100]!r}); a list of "
            "photo ids goes with --photo-ids beside the YFCC100M table"
        )
    if not header and url_column is None and caption_column is None:
        return _without_header(path, separator, body, urls)
    names = [name.strip().strip('"') for name in rows[0]] if header else None
    url = _column(path, "--url-column", url_column, names, _URL_NAMES, urls)
    others = [i for i in range(len(body[0])) if i != url] if body and len(body[0]) == 2 else []
    caption = _column(path, "--caption-column", caption_column, names, _CAPTION_NAMES, others)
    width = len(names) if names else _width(body)
    return Layout(separator, header, url, (caption,), names=tuple(names or ()), width=width)


def _sample(path: str) -> list[bytes]:
    """The first lines with something on them, without a byte-order mark."""
    lines = (line.removeprefix(_BOM) for line in lines_of(path))
    return list(itertools.islice((line for line in lines if line.strip()), _SAMPLE))


def _separator(lines: list[str]) -> str:
    """The separator that most lines have, and that makes a column of links."""
    common = [s for s in "\t,;|" if 2 * sum(s in line for line in lines) > len(lines)]
    for separator in common:
        rows = [cells for line in lines if (cells := _cells(line, separator))]
        if _url_columns(rows[1:] or rows):
            return separator
    return common[0] if common else ","


def _is_header(cells: list[str], given: tuple[str | None, ...]) -> bool:
    """Whether a first row names columns: by names that are usual or given, or else by its look.

    A row whose link is broken is none: it would be in no count.
    """
    names = [cell.strip().lower() for cell in cells]
    if any("://" in name for name in names):
        return False
    wanted = {name.lower() for name in given if name is not None}
    if wanted.union(_URL_NAMES, _CAPTION_NAMES).intersection(names):
        return True
    return all(0 < len(name.split()) <= 2 for name in names)


def _width(rows: list[list[str]]) -> int:
    return collections.Counter(map(len, rows)).most_common(1)[0][0]


def _is_url(cell: str) -> bool:
    return _URL.match(cell.strip()) is not None


def _url_columns(rows: list[list[str]]) -> list[int]:
    """Columns that hold a link in nearly every row."""
    counts = collections.Counter(i for row in rows for i, cell in enumerate(row) if _is_url(cell))
    return [column for column, count in sorted(counts.items()) if count >= 0.8 * len(rows)]


def _without_header(path: str, separator: str, rows: list[list[str]], urls: list[int]) -> Layout:
    width = _width(rows)
    if width in (23, 25):
        # Photo id and user, or line, photo id and hash, come first; the rest is the same.
        shift = width - 23
        return Layout(
            separator,
            False,
            url=14 + shift,
            captions=(6 + shift, 7 + shift),
            encoded=True,
            photo=shift // 2,
            marker=22 + shift,
            form="the table of YFCC100M",
            width=width,
        )
    if width == 2:
        form = "CC12M's order" if urls[0] == 0 else "Conceptual Captions' order"
        return Layout(separator, False, urls[0], (1 - urls[0],), form=form, width=2)
    if width == 4 and urls == [1]:
        form = "Conceptual Captions with labels"
        return Layout(separator, False, 1, (0,), form=form, width=4)
    raise ValueError(
        f"{path} has no header and {width} columns, links in {urls}: give --url-column and "
        "--caption-column as numbers from 0"
    )


def _column(
    path: str,
    option: str,
    given: str | None,
    names: list[str] | None,
    usual: tuple[str, ...],
    likely: list[int],
) -> int:
    """The number of a column: given, or by a usual name, or the only likely one."""
    if given is not None:
        if names is not None and given in names:
            return names.index(given)
        if given.isdecimal():
            return int(given)
        raise ValueError(f"{path} has no column {given!r} ({option}): it has {names or 'no names'}")
    lower = [name.lower() for name in names or ()]
    found = [lower.index(name) for name in usual if name in lower]
    found = [column for column in found if not likely or column in likely] or found or likely
    if len(set(found)) == 1 or (found and names):
        return found[0]
    raise ValueError(f"{path}: which column? It has {names or 'no names'}: give {option}")


def photo_ids(path: str) -> Int[np.ndarray, " n"]:
    """Sorted photo ids of a list "line, photo id, hash" such as OpenAI's, or of one id a line."""
    ids = []
    for number, line in enumerate(lines_of(path), start=1):
        cells = line.split()
        cell = cells[len(cells) > 1] if cells else b""
        if _ID.fullmatch(cell.decode(errors="replace")):
            ids.append(int(cell))
        elif cells and number > 1:  # line 1 may be a header
            raise ValueError(f"{path}: line {number} holds no photo id: {line[:100]!r}")
    if not ids:
        raise ValueError(f"{path} holds no photo ids")
    return np.unique(np.array(ids, np.int64))


def links(
    path: str,
    layout: Layout,
    dropped: collections.Counter[str],
    chosen: Int[np.ndarray, " n"] | None = None,
) -> Iterator[Link]:
    """Yields the rows of a list, and counts in `dropped` those that are none, by reason.

    A quoted field that goes on over further lines is none, with all of them.

    Raises:
      ValueError: the list's compression is damaged.
    """
    lines, header, continued = _Ahead(lines_of(path)), layout.header, 0
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(_BOM)
        if header and line.strip():
            header = False
            continue
        if continued:
            continued -= 1
            found: Link | str = CONTINUED
        elif b'"' in line and (continued := _runs_on(line, lines, layout)):
            found = BROKEN_QUOTES
        else:
            found = _link(line, number, layout, chosen)
        if isinstance(found, str):
            dropped[found] += 1
        else:
            yield found


class _Ahead(Iterator[bytes]):
    """Lines of which the next few can be looked at before they come."""

    def __init__(self, lines: Iterator[bytes]):
        self._lines = lines
        self._waiting: collections.deque[bytes] = collections.deque()

    def __next__(self) -> bytes:
        return self._waiting.popleft() if self._waiting else next(self._lines)

    def next_few(self) -> list[bytes]:
        wanted = FIELD_LINES - len(self._waiting)
        self._waiting.extend(itertools.islice(self._lines, wanted))
        return list(self._waiting)


def _runs_on(line: bytes, lines: _Ahead, layout: Layout) -> int:
    """Over how many of the lines to come a quoted field of a line goes on."""
    if layout.width is None:
        return 0
    first = _plain(line)
    if record([first, ""], layout.separator)[1] == 1:
        return 0
    rest = list(map(_plain, lines.next_few()))
    return runs_on(first, rest, layout.separator, layout.width)


def _plain(line: bytes) -> str:
    return line.decode(errors="replace").rstrip("\r\n")


def _link(
    line: bytes, number: int, layout: Layout, chosen: Int[np.ndarray, " n"] | None
) -> Link | str:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return NOT_UTF8
    if not text.strip():
        return EMPTY_LINE
    if "\r" in text:
        return OLD_LINE_ENDS
    cells = _cells(text, layout.separator)
    if cells is None:
        return BROKEN_QUOTES
    cells = _fitted(cells, layout)
    if cells is None:
        return TOO_MANY_COLUMNS
    if len(cells) <= max(layout.url, *layout.captions):
        return COLUMNS
    if layout.marker is not None and cells[layout.marker : layout.marker + 1] == ["1"]:
        return VIDEO
    if chosen is not None and not _among(cells[layout.photo], chosen):
        return NOT_CHOSEN
    url = cells[layout.url].strip()
    if not _is_url(url):
        return NO_URL
    caption = _caption([cells[column] for column in layout.captions], layout.encoded)
    return Link(number, url, caption) if is_caption(caption) else NO_CAPTION


def _fitted(cells: list[str], layout: Layout) -> list[str] | None:
    """The cells of a row, with a caption that holds separators made whole; None if none fits."""
    extra = len(cells) - layout.width if layout.width else 0
    if extra <= 0:
        return cells
    glue = " " if layout.separator == "\t" else layout.separator
    if layout.captions == (layout.width - 1,):
        head = cells[: layout.width - 1]
        return [*head, glue.join(cells[layout.width - 1 :])]
    if layout.captions == (0,) and layout.width == 2:
        return [glue.join(cells[:-1]), cells[-1]]
    return None


def _among(photo: str, chosen: Int[np.ndarray, " n"]) -> bool:
    if not _ID.fullmatch(photo):
        return False
    at = np.searchsorted(chosen, int(photo))
    return bool(at < len(chosen) and chosen[at] == int(photo))


def _caption(texts: list[str], encoded: bool) -> str:
    if encoded:
        texts = [html.unescape(urllib.parse.unquote_plus(text)) for text in texts]
        texts = [" ".join(_TAG.sub(" ", text).split()) for text in texts]
    return " ".join(text for text in texts if text)


def _cells(text: str, separator: str) -> list[str] | None:
    """The fields of a line; None where CSV's quotes leave it unfinished."""
    if separator == "\t" or '"' not in text:
        return text.split(separator)
    cells, lines = record([text, ""], separator)
    return cells if lines == 1 else None
