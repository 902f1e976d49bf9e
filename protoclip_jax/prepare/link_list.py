"""Lists of links and captions: which columns they have, and their rows one by one.

Recognised: Conceptual Captions (caption, URL; no header), CC12M (URL, caption; no header), any
list with a header, and the table of YFCC100M (23 or 25 columns, titles and descriptions in URL
encoding; no header).
"""

import bz2
import collections
import csv
import dataclasses
import gzip
import html
import io
import itertools
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.decoding import NO_CAPTION

NO_URL = "no URL"
NOT_UTF8 = "not UTF-8"
EMPTY_LINE = "empty line"
COLUMNS = "too few columns"
VIDEO = "a video"
NOT_CHOSEN = "not among the photo ids"

_SAMPLE = 200  # lines looked at
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
    """

    separator: str
    header: bool
    url: int
    captions: tuple[int, ...]
    encoded: bool = False
    photo: int | None = None
    marker: int | None = None
    form: str = "a list"

    def __str__(self) -> str:
        captions = " and ".join(map(str, self.captions))
        separator = {"\t": "tabs", ",": "commas"}.get(self.separator, repr(self.separator))
        header = "a header" if self.header else "no header"
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
    with _open(path) as file:
        first = itertools.islice(file, _SAMPLE)
        lines = [line.decode(errors="replace").rstrip("\r\n") for line in first]
    lines = [line.removeprefix("\ufeff") for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"{path} is empty")
    separator = separator or _separator(lines)
    rows = [cells for line in lines if (cells := _cells(line, separator))] or [[""]]
    header = not any(_is_url(cell) for cell in rows[0])
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
    return Layout(separator, header, url, (caption,))


def _separator(lines: list[str]) -> str:
    tabs = sum("\t" in line for line in lines)
    return "\t" if tabs * 2 > len(lines) else ","


def _is_url(cell: str) -> bool:
    return _URL.match(cell.strip()) is not None


def _url_columns(rows: list[list[str]]) -> list[int]:
    """Columns that hold a link in nearly every row."""
    counts = collections.Counter(i for row in rows for i, cell in enumerate(row) if _is_url(cell))
    return [column for column, count in sorted(counts.items()) if count >= 0.8 * len(rows)]


def _without_header(path: str, separator: str, rows: list[list[str]], urls: list[int]) -> Layout:
    width = collections.Counter(map(len, rows)).most_common(1)[0][0]
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
        )
    if width == 2:
        form = "CC12M's order" if urls[0] == 0 else "Conceptual Captions' order"
        return Layout(separator, False, urls[0], (1 - urls[0],), form=form)
    if width == 4 and urls == [1]:
        form = "Conceptual Captions with labels"
        return Layout(separator, False, 1, (0,), form=form)
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
    with _open(path) as file:
        for line in file:
            cells = line.split()
            if cells and cells[len(cells) > 1].isdigit():
                ids.append(int(cells[len(cells) > 1]))
    if not ids:
        raise ValueError(f"{path} holds no photo ids")
    return np.unique(np.array(ids, np.int64))


def links(
    path: str,
    layout: Layout,
    dropped: collections.Counter[str],
    chosen: Int[np.ndarray, " n"] | None = None,
) -> Iterator[Link]:
    """Yields the rows of a list, and counts in `dropped` those that are none, by reason."""
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if number == 1 and layout.header:
                continue
            found = _link(line, number, layout, chosen)
            if isinstance(found, str):
                dropped[found] += 1
            else:
                yield found


def _link(
    line: bytes, number: int, layout: Layout, chosen: Int[np.ndarray, " n"] | None
) -> Link | str:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        return NOT_UTF8
    if number == 1:
        text = text.removeprefix("\ufeff")
    if not text.strip():
        return EMPTY_LINE
    cells = _cells(text, layout.separator) or []
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


def _among(photo: str, chosen: Int[np.ndarray, " n"]) -> bool:
    if not photo.isdigit():
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
    reader = csv.reader([text, ""], delimiter=separator)
    try:
        cells = next(reader)
    except csv.Error:
        return None
    return cells if reader.line_num == 1 else None


def _open(path: str) -> io.BufferedIOBase:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such list")
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".bz2"):
        return bz2.open(path, "rb")
    return io.BufferedReader(io.FileIO(path), 2**20)
