"""The lines of a list of links, which may be compressed as it was published."""

import bz2
import contextlib
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path

from protoclip_jax.data.list_form import HEAD, refuse_other_forms

# Kinds of compression by their first bytes.
_OPENERS = {
    "gzip": (b"\x1f\x8b", gzip.open),
    "bzip2": (b"BZh", bz2.open),
    "xz": (b"\xfd7zXZ\0", lzma.open),
}


def lines_of(path: str) -> Iterator[bytes]:
    """The lines of a list, also of a compressed one.

    Raises:
      FileNotFoundError: there is no such list.
      ValueError: it is another kind of file, or its compression is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: there is no such list")
    with open(path, "rb") as file:
        head = file.read(HEAD)
        refuse_other_forms(path, head, compressed=tuple(_OPENERS))
        opens = next((opens for magic, opens in _OPENERS.values() if head.startswith(magic)), None)
        file.seek(0)
        with opens(file) if opens else contextlib.nullcontext(file) as content:
            try:
                if opens:
                    refuse_other_forms(f"{path}, unpacked,", content.peek(HEAD)[:HEAD])
                yield from content
            except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
                if not opens:
                    raise
                raise ValueError(
                    f"{path}: its compression is damaged ({error}): fetch it anew"
                ) from error
