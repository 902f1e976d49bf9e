"""What a file that is given as a list really is, by its first bytes: other formats by their name.

A list is UTF-8 text with a header line. A compressed one, a table of another program or a page of
a web server is no text, or not such text; read as lines it would give rows of rubbish, or a message
about columns that helps nobody.
"""

import json
import os

HEAD = 4096  # bytes that are looked at

_CONVERT = "write it as UTF-8 text with a header line, one pair a line"
_PANDAS = (
    'with pandas: `pandas.{reader}("{name}").to_csv("pairs.tsv", sep="\\t", index=False)`'
    "; quotes and line ends within captions have to be taken out before"
)

# First bytes: what the file is, and the way out; {name} is the file's.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "compressed with gzip", "unpack it: `gunzip -k {name}`"),
    (b"\xfd7zXZ\0", "compressed with xz", "unpack it: `unxz -k {name}`"),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", "unpack it: `unzstd {name}`"),
    (b"\x04\x22\x4d\x18", "compressed with LZ4", "unpack it: `unlz4 {name}`"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it: `7z x {name}`"),
    (b"Rar!\x1a\x07", "a RAR archive", "unpack it: `unrar x {name}`"),
    (b"PAR1\x15", "a Parquet table", _PANDAS.replace("{reader}", "read_parquet")),
    (b"ARROW1\0\0", "an Arrow (Feather) table", _PANDAS.replace("{reader}", "read_feather")),
    (b"FEA1", "a Feather table", _PANDAS.replace("{reader}", "read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream", _CONVERT),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Excel workbook", "save it as tab-separated text"),
    (b"SQLite format 3\0", "an SQLite database", _CONVERT),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", _CONVERT),
    (b"\x93NUMPY", "a NumPy array", _CONVERT),
    (b"Obj\x01", "an Avro table", _CONVERT),
    (b"%PDF-", "a PDF document", "give the list itself"),
    (b"\xff\xd8\xff", "a JPEG picture", "give a list of pictures and captions"),
    (b"\x89PNG\r\n", "a PNG picture", "give a list of pictures and captions"),
)
_BOMS = (
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16 (little endian)"),
    (b"\xfe\xff", "UTF-16 (big endian)"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")
_POINTER = b"version https://git-lfs."


class OtherForm(ValueError):
    """A file is no list of text lines; the message is one line that says what to do."""


def refuse_other_forms(
    path: str | os.PathLike, head: bytes, *, compressed: tuple[str, ...] = ()
) -> None:
    """Looks at a file's first bytes.

    Args:
      path: for the message.
      head: the first `HEAD` bytes, or all there are.
      compressed: kinds of compression that the caller reads, such as "gzip".

    Raises:
      OtherForm: it is another kind of file than lines of text in UTF-8.
    """
    path = os.fspath(path)
    name = os.path.basename(path)
    found = _other(head)
    if found is None or any(found[0] == f"compressed with {kind}" for kind in compressed):
        return
    what, advice = found
    raise OtherForm(f"{path} is {what}: {advice.replace('{name}', name)}")


def _other(head: bytes) -> tuple[str, str] | None:
    """What a file is, if not lines of text, and the way out."""
    if head[:3] == b"BZh" and head[3:4].isdigit() and head[4:10] == b"1AY&SY":
        return "compressed with bzip2", "unpack it: `bunzip2 -k {name}`"
    for magic, what, advice in _MAGIC:
        if head.startswith(magic):
            return what, advice
    if head.startswith(b"PK\x03\x04"):
        return _zipped(head)
    if head[257:262] == b"ustar":
        return "a tar archive", "give it a name that ends in .tar if it holds samples, or unpack it"
    if encoding := _encoding(head):
        to = encoding.split()[0]
        return f"encoded in {encoding}, wanted UTF-8", (
            f"convert it, for example with `iconv -f {to} -t UTF-8`"
        )
    if head.startswith(b"\x80") and head[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        return "a Python pickle", f"pickles are not opened, for they can run programs: {_CONVERT}"
    return _text(head.removeprefix(b"\xef\xbb\xbf").lstrip())


def _zipped(head: bytes) -> tuple[str, str]:
    if b"[Content_Types].xml" in head or b"xl/" in head:
        return "an Excel workbook", "save it as tab-separated text"
    if b"mimetypeapplication/vnd.oasis.opendocument" in head:
        return "an OpenDocument table", "save it as tab-separated text"
    return "a zip archive", "unpack it: `unzip {name}`"


def _encoding(head: bytes) -> str | None:
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    # Without a mark: most names of columns are Latin, with a zero byte in every second place, or in
    # three of four.
    even, odd = (_share_of_zeros(head[start:64:2]) for start in (0, 1))
    if even + odd > 1.2:
        return "UTF-32"
    if max(even, odd) < 0.6:
        return None
    return "UTF-16 (little endian)" if odd > even else "UTF-16 (big endian)"


def _share_of_zeros(data: bytes) -> float:
    return data.count(0) / max(1, len(data))


def _text(head: bytes) -> tuple[str, str] | None:
    """Text that is no list."""
    if head[:9].lower().startswith(_PAGES):
        return "a web page (or XML), perhaps instead of a download that failed", "fetch it anew"
    if head.startswith(_POINTER):
        return "a pointer of Git LFS, not the file itself", "fetch it: `git lfs pull`"
    if head[:1] not in (b"{", b"["):
        return None
    first = head.split(b"\n", 1)[0].strip()
    try:
        whole = isinstance(json.loads(first), dict | list)
    except ValueError:
        whole = False
    if whole and head.startswith(b"{"):
        advice = _PANDAS.replace("{reader}", "read_json").replace('}")', '}", lines=True)')
        return "JSON, an object a line (jsonl)", advice
    # Not on one line, or cut by the end of what is looked at.
    if whole or first in (b"{", b"[") or head[1:].lstrip()[:1] in (b'"', b"{", b"["):
        return "JSON", _PANDAS.replace("{reader}", "read_json")
    return None
