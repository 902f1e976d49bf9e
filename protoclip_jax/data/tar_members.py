"""The files in a plain tar: name, place and size, without reading their content.

The standard library's `tarfile` takes four times as long, which matters for 45 million members.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512
_END = bytes(BLOCK)
_REGULAR = b"0\x007"
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"

Read = Callable[[int, int], bytes]  # (start, length): fewer bytes at the file's end


class Member(NamedTuple):
    """A regular file in a tar: `size` bytes from `start` on."""

    name: str
    start: int
    size: int


def members(read: Read) -> Iterator[Member]:
    """Yields the regular files of a tar (ustar, GNU or PAX).

    Raises:
      ValueError: it is no tar, or lacks its end; says which.
    """
    at, name, size = 0, None, None  # the latter two where a header before tells them
    while True:
        head = read(at, BLOCK)
        if len(head) < BLOCK:
            raise ValueError(f"its end is missing, {at} bytes are there")
        if head == _END:
            return
        if not _is_header(head):
            raise ValueError(f"no header at byte {at}")
        kind, length = head[156:157], _number(head[124:136])
        start = at + BLOCK
        if kind == _PAX:
            name, size = _pax(read(start, length), name, size)
        elif kind == _GNU_NAME:
            name = _text(read(start, length))
        elif kind not in (_PAX_GLOBAL, _GNU_LINK):
            length = length if size is None else size
            name = _name(head) if name is None else name
            if kind in _REGULAR and not name.endswith("/"):
                yield Member(name, start, length)
            name = size = None
        at = start + -(-length // BLOCK) * BLOCK


def _is_header(head: bytes) -> bool:
    try:
        checksum = int(head[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return False
    # The sum is made with spaces in its own place.
    return checksum == sum(head) - sum(head[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # base 256, for what octal digits cannot hold
        return int.from_bytes(field, "big") & ((1 << 88) - 1)
    return int(field.rstrip(b"\0 ") or b"0", 8)


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _name(head: bytes) -> str:
    if head[257:263] == b"ustar\0" and head[345]:
        return f"{_text(head[345:500])}/{_text(head[:100])}"
    return _text(head[:100])


def _pax(content: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """Name and size that a PAX header tells: lines "LENGTH KEY=VALUE"."""
    at = 0
    while at < len(content) and content[at : at + 1].isdigit():
        space = content.index(b" ", at)
        end = at + int(content[at:space])
        key, _, value = content[space + 1 : end - 1].partition(b"=")
        if key == b"path":
            name = value.decode(errors="surrogateescape")
        elif key == b"size":
            size = int(value)
        at = max(end, at + 1)
    return name, size
