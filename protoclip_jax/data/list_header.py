"""The header of a pair list: its columns, or a message that says what the list lacks."""

import re

from protoclip_jax.data.list_lines import record

_BOM = b"\xef\xbb\xbf"
_LINK = re.compile(r"https?://", re.IGNORECASE)
_PICTURE = re.compile(r"\.(jpe?g|png|gif|webp|bmp|tiff?|avif|jp2)$", re.IGNORECASE)
_LINK_NAME = re.compile(r"(image|img|photo|download)?_?(url|link)", re.IGNORECASE)
_DOWNLOAD = "python -m protoclip_jax.prepare download"


def read_header(
    path: str, head: bytes, separator: str, wanted: tuple[str, str]
) -> tuple[list[str], bytes]:
    """Column names, and the line that names them.

    Args:
      path: for messages.
      head: the beginning of the list, its first line at least.
      separator: of columns.
      wanted: names of the columns of paths and captions.

    Raises:
      ValueError: it lacks a column; says what it is and what to do.
    """
    if not head:
        raise ValueError(f"{path} is empty: it holds 0 pairs")
    line = head[: head.find(b"\n") + 1] or head
    try:
        text = line.removesuffix(b"\n").removeprefix(_BOM).decode().rstrip("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: line 1 is not UTF-8 (byte {error.start}): convert it") from error
    if "\r" in text:
        raise ValueError(
            f"{path} ends its lines with carriage returns alone, as on old Macs: convert it, for "
            f"example with `tr '\\r' '\\n' < {path} > {path}.new`"
        )
    columns = _names(text, separator)
    if any(columns.count(name) != 1 for name in wanted):
        what, advice = _lacks(path, text, separator, wanted)
        raise ValueError(
            f"{path}{what}: its columns with separator {separator!r} are {str(columns)[:300]}; "
            f"wanted {wanted[0]!r} and {wanted[1]!r}, each once: {advice}"
        )
    return columns, line


def _names(text: str, separator: str) -> list[str]:
    cells = text.split(separator)
    if separator != "\t" and '"' in text:  # as in the rows
        cells = record([text], separator)[0] or cells
    return [name.strip().strip('"') for name in cells]


def _lacks(path: str, text: str, separator: str, wanted: tuple[str, str]) -> tuple[str, str]:
    """What a list without the wanted columns is, by its first line, and the way out."""
    usual = "set image_column and caption_column, or separator"
    others = [other for other in "\t,;|" if other != separator and other in text]
    for other in others:
        if all(name in _names(text, other) for name in wanted):
            return f" is separated by {other!r}", f"{usual}={other!r}"
    used = separator if separator in text or not others else max(others, key=text.count)
    cells = [cell.strip() for cell in _names(text, used)]
    if any(_LINK.match(cell) for cell in cells):
        return " is a list of links without a header", (
            "a list of links, such as Conceptual Captions' own (caption, tab, link), is no list of "
            f"pictures yet: `{_DOWNLOAD} {path} --out FOLDER` gets them, and FOLDER is a source"
        )
    paths = [number for number, cell in enumerate(cells) if _PICTURE.search(cell)]
    if paths:
        names = [wanted[0] if number == paths[0] else wanted[1] for number in range(len(cells))]
        line = used.join(names) if len(cells) == 2 else f"{wanted[0]}{used}{wanted[1]}"
        return " has no header", (
            f"its first line is a pair: write {line!r} above it, a name for each column"
        )
    if any(_LINK_NAME.fullmatch(cell) for cell in cells):
        return " is a list of links", (
            f"`{_DOWNLOAD} {path} --out FOLDER` gets their pictures; where it names files too, "
            f"{usual}"
        )
    looks = f" (it looks separated by {used!r})" if used != separator else ""
    return "", usual + looks
