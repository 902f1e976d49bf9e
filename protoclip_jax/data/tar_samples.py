"""Which members of a tar are an image and its caption: one rule, whatever their order in the tar.

- A sample is all files of a tar whose names are equal up to the ending, which is what follows the
  last dot: `dir/shot_1.5m.png` and `dir/shot_1.5m.txt` are one, and `dir/shot_1.8m.png` is of
  another. Where names have one dot, as img2dataset writes them, WebDataset finds the same samples;
  it ends the name at the first dot, and so takes shot_1.5m and shot_1.8m for one.
- Its image is the one whose ending comes first in `IMAGES`; its caption that of the first ending in
  `TEXTS` which says something: the text, or "caption" in a .json. Upper case in endings does not
  matter; of equal endings the first name in the alphabet counts.
- Of a name that comes twice the later member counts, as when the tar is unpacked. `./a.png`,
  `/a.png` and `a.png` are one name.
- Hidden files (`._a.png` of some archivers), links, sparse files and other endings belong to no
  sample.

Whatever is not used is counted and named, but for folders, texts that say nothing, and texts that
say the same as the one which is used (img2dataset writes each caption into a .txt and a .json).

No member becomes a file: names are only compared, so that `../a.png` reaches nothing outside.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator

from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.decoding import NO_CAPTION
from protoclip_jax.data.files import MAX_BYTES
from protoclip_jax.data.tar_members import FILE, PLACES, Member, Read

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
TEXTS = ("txt", "text", "caption", "json")

NO_IMAGE = "no image"
NOT_UTF8 = "caption not UTF-8, or with NUL bytes (UTF-16?)"
TOO_LARGE = "file too large"
REPEATED = "replaced by a later member of the same name"
FURTHER_IMAGE = "further image of a sample"
FURTHER_TEXT = "other caption of a sample"
HIDDEN = "hidden file"
OTHER_ENDING = "neither image nor text by its ending"

_MOST_TEXT = 2**20  # bytes of a text or JSON

LeaveOut = Callable[[str, str], None]  # takes a reason and a name


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image and its caption in a tar.

    Attributes:
      key: their names up to the ending.
      image: its file.
      text: the file of the caption.
      is_json: whether that is a JSON.
      caption: what it says.
    """

    key: str
    image: Member
    text: Member
    is_json: bool
    caption: str


def samples(members: Iterable[Member], read: Read, leave_out: LeaveOut) -> Iterator[Sample]:
    """Yields the pairs of a tar, in the order in which their names begin in it.

    Args:
      members: of the tar.
      read: reads it.
      leave_out: is called for everything that is not used.
    """
    for key, files in _grouped(members, leave_out).items():
        images, texts = (_of(files, endings) for endings in (IMAGES, TEXTS))
        for further in images[1:]:
            leave_out(FURTHER_IMAGE, further.name)
        if not images:
            leave_out(NO_IMAGE, key)
        elif images[0].size > MAX_BYTES:
            leave_out(TOO_LARGE, images[0].name)
        else:
            found = _captioned(key, images[0], texts, read, leave_out)
            if found is not None:
                yield found


def _grouped(members: Iterable[Member], leave_out: LeaveOut) -> dict[str, list[tuple[str, Member]]]:
    """Endings and members of each sample."""
    last: dict[str, Member] = {}
    for member in members:
        if member.what in PLACES:
            leave_out(member.what, member.name)
            continue
        name = _plain(member.name)
        if name in last:
            leave_out(REPEATED, name)
        last[name] = member if name == member.name else member._replace(name=name)
    found: dict[str, list[tuple[str, Member]]] = {}
    for name, member in last.items():
        base = name.rpartition("/")[2]
        stem, _, ending = name.rpartition(".")
        ending = ending.lower()
        if member.what != FILE:
            leave_out(member.what, name)
        elif base.startswith("."):
            leave_out(HIDDEN, name)
        elif "." not in base or (ending not in IMAGES and ending not in TEXTS):
            leave_out(OTHER_ENDING, name)
        else:
            found.setdefault(stem, []).append((ending, member))
    return found


def _plain(name: str) -> str:
    """A name as it is when the tar is unpacked."""
    if "/" not in name or ("//" not in f"/{name}" and "/./" not in f"/{name}"):
        return name
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _of(files: list[tuple[str, Member]], endings: tuple[str, ...]) -> list[Member]:
    """The members with one of these endings, in the order of the endings."""
    found = [(endings.index(ending), member) for ending, member in files if ending in endings]
    return [member for _, member in sorted(found)]


def _captioned(
    key: str, image: Member, texts: list[Member], read: Read, leave_out: LeaveOut
) -> Sample | None:
    """The sample with the first text that says something; None if there is none."""
    sample = None
    for text in texts:
        is_json = text.name.lower().endswith(".json")
        try:
            caption = _caption(text, is_json, read)
        except UnicodeError:
            if sample is None:
                leave_out(NOT_UTF8, text.name)
                return None
            leave_out(FURTHER_TEXT, text.name)
            continue
        if caption is None:
            leave_out(TOO_LARGE, text.name)
        elif sample is None and is_caption(caption):
            sample = Sample(key, image, text, is_json, caption)
        elif sample is not None and caption.strip() not in ("", sample.caption.strip()):
            leave_out(FURTHER_TEXT, text.name)
    if sample is None:
        leave_out(NO_CAPTION, image.name)
    return sample


def _caption(text: Member, is_json: bool, read: Read) -> str | None:
    """What a text says; None if it is too large to be looked at."""
    if text.size > _MOST_TEXT:
        return None
    return caption_of(read(text.start, text.size), is_json)


def caption_of(content: bytes, is_json: bool) -> str:
    """The caption in a text, or that named "caption" in a JSON; empty if there is none.

    Raises:
      UnicodeError: it is no text.
    """
    if not is_json:
        return _without_nul(content.decode())
    try:
        found = json.loads(content)
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        return ""
    caption = found.get("caption") if isinstance(found, dict) else None
    if not isinstance(caption, str):
        return ""
    caption.encode()  # JSON can write half of a surrogate pair
    return _without_nul(caption)


def _without_nul(text: str) -> str:
    """A text as it is, refused where UTF-16 was taken for it; some programs end texts with NUL."""
    if "\0" in text.rstrip("\0"):
        raise UnicodeError("it holds NUL bytes")
    return text
