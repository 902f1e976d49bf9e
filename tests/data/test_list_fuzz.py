"""Damaged lists of all kinds, from a fixed seed: no row is lost, made up or cut without a count."""

import collections
import functools
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protoclip_jax.data import list_lines, pair_list
from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.pair_list import PairList
from protoclip_jax.prepare.link_list import Layout, Link, find_layout, links

PIECES = [
    b'"', b'""', b"\t", b",", b"\r", b"\r\n", b"\n", b"\n\n", b"\0", b"\xff", b"\xc3",
    b"\xef\xbb\xbf", b" ", b"://", b"http://h.example/", b"https://h.example/x y", b"gs://b/",
    b"&nbsp;", b";", b"\x1b", b"filepath", b"\\", "\u3000".encode(), "\u00e9\u732b".encode(), b"<",
    b"x" * 300,
]  # fmt: skip


def damaged(rng: np.random.Generator, content: bytes) -> bytes:
    """The content with a few pieces put in, taken out or doubled."""
    for _ in range(int(rng.integers(1, 12))):
        at, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 30))
        how = rng.random()
        if how < 0.7:
            piece = PIECES[int(rng.integers(len(PIECES)))]
            content = content[:at] + piece + content[at:]
        elif how < 0.85:
            content = content[:at] + content[at + length :]
        else:
            content = content[:at] + content[at : at + length] * 2 + content[at + length :]
    return content


def opened(path: Path, open_list: Callable):
    """What opening gives, or None where it is refused in one line that names the list."""
    try:
        return open_list(str(path))
    except ValueError as error:
        told = str(error)
    assert str(path) in told
    assert "\n" not in told
    return None


def all_links(name: str) -> tuple[Layout, list[Link], int]:
    dropped: collections.Counter[str] = collections.Counter()
    layout = find_layout(name)
    return layout, list(links(name, layout, dropped)), sum(dropped.values())


def parsed(text: str, separator: str) -> list[str] | str:
    """Fields by CSV's lenient rules, or "open" or "broken"; letter by letter."""
    cells, cell, state = [], "", "start"
    for letter in text:
        if state == "quoted" or (state == "closed" and letter == '"'):
            cell += letter if letter != '"' or state == "closed" else ""
            state = "closed" if letter == '"' and state == "quoted" else "quoted"
        elif letter == separator:
            cells, cell, state = [*cells, cell], "", "start"
        elif letter == '"' and state == "start":
            state = "quoted"
        elif letter == "\r":
            return "broken"
        else:
            cell, state = cell + letter, "plain"
    return "open" if state == "quoted" else [*cells, cell]


def continued(texts: list[str], separator: str, width: int) -> int:
    """How many lines after the first belong to a quoted field that begins there."""
    if parsed(texts[0], separator) != "open":
        return 0
    for more in range(1, min(len(texts), 21)):
        joined = parsed("".join(texts[: more + 1]), separator)
        if joined == "broken":
            return 0
        if joined != "open":
            whole = [text.count("\t") + 1 >= width for text in texts[: more + 1]]
            apart = separator == "\t" and (len(joined) != width or (whole[0] and any(whole[1:])))
            return 0 if apart else more
    return 0


def plain_pairs(content: bytes, separator: str, width: int) -> tuple[list[tuple[str, str]], int]:
    """The pairs of a list, and how many lines are below its header."""
    lines = content.removesuffix(b"\n").split(b"\n")[1:] if content.count(b"\n") else []
    if content.count(b"\n") == 1 and content.endswith(b"\n"):
        lines = []
    texts = [line.decode(errors="replace").removesuffix("\r") for line in lines]
    kept, at = [], 0
    while at < len(lines):
        more = continued(texts[at:], separator, width)
        pair = None if more else plain_pair(lines[at], separator, width)
        kept += [pair] if pair else []
        at += 1 + more
    return kept, len(lines)


def plain_pair(line: bytes, separator: str, width: int) -> tuple[str, str] | None:
    try:
        text = line.decode().removesuffix("\r")
    except UnicodeDecodeError:
        return None
    if "\0" in text:
        return None
    quoted = separator != "\t" and '"' in text
    cells = parsed(text, separator) if quoted else text.split(separator)
    if isinstance(cells, str) or (not quoted and "\r" in text.rstrip("\r")):
        return None
    if not 2 <= len(cells) <= width or not cells[0].strip() or not is_caption(cells[1]):
        return None
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", cells[0].strip())
    return None if scheme and scheme[1] != "gs" else (cells[0], cells[1])


@pytest.fixture(autouse=True)
def only_gs(monkeypatch):
    monkeypatch.setattr(pair_list, "readable_schemes", lambda: ("gs",))
    pair_list._foreign.cache_clear()
    yield
    pair_list._foreign.cache_clear()


@pytest.mark.parametrize("separator", ["\t", ","])
def test_pair_lists(tmp_path, monkeypatch, separator):
    rng = np.random.default_rng(7)
    path, count = tmp_path / "pairs.tsv", 0
    for turn in range(120):
        monkeypatch.setattr(list_lines, "_CHUNK", int(rng.integers(1, 400)))
        monkeypatch.setattr(pair_list, "_STRIDE", int(rng.integers(1, 9)))
        width, end = 2 + turn % 2, "\r\n" if turn % 5 == 0 else "\n"
        head = separator.join(["filepath", "title", "x"][:width])
        rows = [[f"{i}.jpg", f"caption {i}", "more"][:width] for i in range(12)]
        rows += [["5.jpg", '"two\nlines"', "more"][:width]] * (turn % 3 == 0)
        body = damaged(rng, "".join(separator.join(row) + end for row in rows).encode())
        path.write_bytes((head + end).encode() + body)
        pairs = opened(path, functools.partial(PairList, separator=separator))
        kept, lines = plain_pairs(b"\n" + body, separator, width)
        if pairs is None:
            assert not kept
            continue
        count += 1
        wanted = [
            (cell if cell.startswith("gs://") else os.path.join(tmp_path, cell), caption)
            for cell, caption in kept
        ]
        assert [pairs.cells(row) for row in range(len(pairs))] == wanted, body
        assert len(pairs) + sum(left.count for left in pairs.report.values()) == lines, body
        # The header too: whatever it says then, every line is a pair or counted.
        content = damaged(rng, path.read_bytes()[: len(head) + 200])
        path.write_bytes(content)
        pairs = opened(path, functools.partial(PairList, separator=separator))
        if pairs is not None:
            lines = plain_pairs(content, separator, width)[1]
            assert len(pairs) + sum(left.count for left in pairs.report.values()) == lines, content
    assert count > 100


def test_link_lists(tmp_path):
    rng = np.random.default_rng(8)
    path, count = tmp_path / "list.tsv", 0
    for turn in range(120):
        separator, order = "\t" if turn % 3 else ",", -1 if turn % 2 else 1
        rows = [[f"http://h.example/{i}.jpg", f"caption {i}"][::order] for i in range(30)]
        rows = [["url", "caption"][::order]] * (turn % 4 > 1) + rows
        text = "\n".join(separator.join(row) for row in rows)
        content = damaged(rng, text.encode() + b"\n" * (turn % 7 > 0))
        path.write_bytes(content)
        found = opened(path, all_links)
        if found is None:
            continue
        count += 1
        layout, kept, dropped = found
        lines = content.removesuffix(b"\n").split(b"\n")
        assert len(kept) + dropped + layout.header == len(lines), content
        if layout.width != 2 or layout.separator != "\t":
            continue
        lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
        for line, url, caption in kept:  # no word is lost
            assert sorted(f"{url} {caption}".split()) == sorted(lines[line - 1].decode().split())
    assert count > 100


def test_random_bytes(tmp_path):
    rng = np.random.default_rng(9)
    path = tmp_path / "list.tsv"
    for size in rng.integers(0, 3000, 60).tolist():
        head = b"filepath\ttitle\n" if size % 2 else b""
        path.write_bytes(head + rng.integers(0, 256, size, np.uint8).tobytes())
        opened(path, PairList)
        opened(path, all_links)
