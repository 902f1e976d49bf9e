"""What a plain tar holds: name, kind, place and size of its members, without reading their content.

The standard library's `tarfile` takes four times as long, which matters for 45 million members.

A tar is foreign: its headers are believed only as far as they fit together. Each one read moves on
by at least a block, so that nothing loops or recurses, and none makes more than a mebibyte be read
at once. What lies between and behind the members must be zeros or further members; anything else
is refused, never passed over.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

BLOCK = 512

# What a member is. Folders and volume labels hold nothing, and are not told.
FILE = "file"
LINK = "link in the tar, not followed"
SPARSE = "sparse file in the tar"
OTHER_KIND = "neither file, folder nor link in the tar"
# No member, but a place: after an end mark or a stretch of zeros more members follow, as where
# tars were put one behind the other, or a part of one was lost and became zeros.
RESUMED = "stretch of zeros (end mark, or lost members) with more members behind it"

# The same for zeros at the end, which are an end mark and what fills a tar up.
TAIL = "long stretch of zeros at the end (members lost, as where a download broke off?)"
PLACES = (RESUMED, TAIL)

_END = bytes(BLOCK)
# Sizes of which a tar is filled up to a multiple: tar's own, and of blocking factors in use.
_RECORDS = (20 * BLOCK, *(2**n for n in range(15, 21)))
_ZEROS = 2**20  # bytes looked at in one go for what follows an end mark
_MOST_TOLD = 2**20  # bytes of a header that tells a long name
_MOST_SIZE = 2**62  # bytes of a member, so that places stay 64-bit numbers
_AROUND = 8  # blocks before a file's content in which its headers are looked for

_FILES, _LINKS, _FOLDERS = b"0\x007", b"12", b"5DV"
_DATALESS = b"123456"  # whatever their size says
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _GNU_SPARSE = b"xX", b"g", b"L", b"K", b"S"

Read = Callable[[int, int], bytes]  # (start, length): fewer bytes at the file's end


class Member(NamedTuple):
    """A member of a tar: `size` bytes from `start` on; what it is, is one of the constants."""

    name: str
    start: int
    size: int
    what: str = FILE


def members(read: Read) -> Iterator[Member]:
    """Yields what is in a tar (ustar, GNU or PAX), in its order.

    Raises:
      ValueError: it is no tar, or lacks its end, or a part of it is damaged; says what and where.
    """
    at, told, ended = 0, {}, False  # what the headers before tell; whether zeros were before
    zeros = 0  # where they begin
    while True:
        head = read(at, BLOCK)
        if len(head) < BLOCK:
            if ended and not head.strip(b"\0"):
                if not _fills_up(at + len(head) - zeros, at + len(head)):
                    yield Member(f"from byte {zeros} on", zeros, 0, TAIL)
                return
            raise ValueError(f"its end is missing, it stops before byte {at + BLOCK}")
        if head == _END:
            if told:
                raise ValueError(f"a header before byte {at} belongs to no file")
            zeros, at, ended = at, _past_zeros(read, at), True
            continue
        if not _is_header(head):
            raise ValueError(f"no header at byte {at}" + ended * ", behind an end mark")
        if ended:
            yield Member(f"from byte {at} on", at, 0, RESUMED)
            ended = False
        kind, size, start = head[156:157], _size(head[124:136], at), at + BLOCK
        if kind in _PAX or kind in (_PAX_GLOBAL, _GNU_NAME, _GNU_LINK):
            told |= _told(kind, _content(read, start, size))
        else:
            if kind == _GNU_SPARSE:
                start = _past_sparse_map(read, head, start)
            size = 0 if kind in _DATALESS else told.get("size", size)
            name = told["name"] if "name" in told else _name(head)
            what = SPARSE if "sparse" in told else _what(kind, name)
            if what is not None:
                yield Member(name, start, size, what)
            told = {}
        at = start + -(-size // BLOCK) * BLOCK


def name_at(read: Read, start: int) -> str | None:
    """Name of the file whose content starts at a byte; None where its headers are too long."""
    first = max(0, start - _AROUND * BLOCK)
    around = read(first, start - first)
    for begin in range(0, len(around), BLOCK):
        part = around[begin:]
        try:
            found = next(members(lambda at, length, part=part: part[at : at + length]))
        except (ValueError, StopIteration):
            continue
        if found.start == len(part):
            return found.name
    return None


def _what(kind: bytes, name: str) -> str | None:
    if kind in _FILES:
        return None if kind == b"\0" and name.endswith("/") else FILE  # the oldest form's folder
    if kind in _LINKS:
        return LINK
    if kind == _GNU_SPARSE:
        return SPARSE
    return None if kind in _FOLDERS else OTHER_KIND


def _fills_up(zeros: int, size: int) -> bool:
    """Whether so many zeros at the end of a tar are no more than its writer puts there."""
    most = 2 * BLOCK + _RECORDS[0]
    return zeros <= most or any(
        size % record == 0 and zeros < 2 * BLOCK + record for record in _RECORDS
    )


def _past_zeros(read: Read, at: int) -> int:
    """The first block from `at` on that is not all zeros, or where the tar ends."""
    while True:
        chunk = read(at, _ZEROS)
        rest = len(chunk.lstrip(b"\0"))
        at += (len(chunk) - rest) // BLOCK * BLOCK
        if rest or len(chunk) < _ZEROS:
            return at


def _past_sparse_map(read: Read, head: bytes, at: int) -> int:
    """Where the content of GNU's old sparse form begins: a flag tells whether its map goes on."""
    more = head[482:483]
    while more not in (b"", b"\0"):
        more = read(at, BLOCK)[504:505]
        at += BLOCK
    return at


def _content(read: Read, start: int, size: int) -> bytes:
    if size > _MOST_TOLD:
        raise ValueError(f"a header of {size} bytes at byte {start}, {_MOST_TOLD} are allowed")
    content = read(start, size)
    if len(content) < size:
        raise ValueError(f"its end is missing, it stops before byte {start + size}")
    return content


def _is_header(head: bytes) -> bool:
    field = head[148:156].strip(b"\0 ")
    if not field.isdigit():
        return False
    try:
        checksum = int(field, 8)
    except ValueError:
        return False
    # The sum is made with spaces in its own place; some old programs add signed bytes.
    total = sum(head) - sum(head[148:156]) + 8 * ord(" ")
    if checksum == total:
        return True
    others = head[:148] + head[156:]
    return checksum == total - 256 * sum(byte >= 128 for byte in others)


def _size(field: bytes, at: int) -> int:
    """The size in a header: octal digits, or base 256 for what they cannot hold."""
    if field[0] == 0x80:
        size = int.from_bytes(field[1:], "big")
    else:
        digits = field.partition(b"\0")[0].strip(b" ") or b"0"
        try:
            size = int(digits, 8) if digits.isdigit() else -1
        except ValueError:
            size = -1
    if not 0 <= size < _MOST_SIZE:
        raise ValueError(f"a size that is negative, too large or no number at byte {at}")
    return size


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode(errors="surrogateescape")


def _name(head: bytes) -> str:
    if head[257:263] == b"ustar\0" and head[345]:
        return f"{_text(head[345:500])}/{_text(head[:100])}"
    return _text(head[:100])


def _told(kind: bytes, content: bytes) -> dict:
    """What a header that stands before a member tells of it: name, size, whether it is sparse."""
    if kind == _GNU_NAME:
        return {"name": _text(content)}
    if kind == _GNU_LINK:
        return {}
    told = _pax(content)
    if kind != _PAX_GLOBAL:
        return told
    if told:
        raise ValueError("a header for all members gives them one name or size")
    return {}


def _pax(content: bytes) -> dict:
    """Name and size that a PAX header tells: lines "LENGTH KEY=VALUE"."""
    told, at, sparse_name = {}, 0, {}
    while at < len(content) and content[at] != 0:
        digits, space, _ = content[at : at + 8].partition(b" ")
        end = at + int(digits) if digits.isdigit() and space else 0
        key, equals, value = content[at + len(digits) + 1 : max(end - 1, 0)].partition(b"=")
        if not equals or end > len(content) or content[end - 1 : end] != b"\n":
            raise ValueError("a damaged PAX header")
        if key == b"path" and value:
            told["name"] = _text(value)
        elif key == b"size" and value:
            if not value.isdigit() or len(value) > 20 or int(value) >= _MOST_SIZE:
                raise ValueError("a PAX header with a size that is no number, or too large")
            told["size"] = int(value)
        elif key.startswith(b"GNU.sparse."):
            told["sparse"] = True
            if key == b"GNU.sparse.name":
                sparse_name = {"name": _text(value)}  # "path" is another one then
        at = end
    return told | sparse_name
