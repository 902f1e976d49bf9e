"""Where the pairs of WebDataset tar shards lie: found once, kept as an array in a file.

A sample is the members of a tar whose names are equal up to the first dot: a picture (`.jpg`,
`.png`, ...) and its caption, a `.txt` or the "caption" of a `.json`. The order is that of the tars
by name, and in a tar that of the pictures.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from protoclip_jax.data.bar import counted
from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.decoding import NO_CAPTION
from protoclip_jax.data.files import MAX_BYTES
from protoclip_jax.data.left_out import LeftOut
from protoclip_jax.data.seen_files import State, states_of
from protoclip_jax.data.tar_members import BLOCK, Read, members
from protoclip_jax.storage import objects
from protoclip_jax.storage.cache import cache_folders, writable
from protoclip_jax.storage.paths import is_remote

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm")
NO_PICTURE = "no picture"
NOT_UTF8 = "caption not UTF-8"
TOO_LARGE = "file too large"

# A member starts at a multiple of 512 bytes, so that 32 bits reach 2 TB: 17 bytes a row.
ENTRY = np.dtype(
    [("picture", "<u4"), ("size", "<u4"), ("caption", "<u4"), ("length", "<u4"), ("json", "?")]
)
_VERSION = 2
_FOLDER = ".protoclip_tars"


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """All pairs of some tars.

    Attributes:
      path: the file of the entries; processes map it and so share its memory.
      entries: place of picture and caption of each row.
      ends: rows up to the end of each tar.
      fingerprint: hash of names, sizes and captions, in order.
      report: samples left out, by reason.
      states: what each tar was when it was looked at.
      digests: of each tar, see `digest_of`.
    """

    path: str
    entries: Shaped[np.ndarray, " n"]
    ends: Int[np.ndarray, " tars"]
    fingerprint: str
    report: dict[str, LeftOut]
    states: list[State]
    digests: list[str]


def tar_index(tars: list[str]) -> TarIndex:
    """The index of tars: read where it was kept, made and kept where they are new or changed.

    It is kept beside the tars, or in the user's cache where that cannot be written.

    Raises:
      FileNotFoundError: a tar is missing.
      ValueError: a tar is cut short, compressed or none; or there are no pairs.
    """
    states = states_of(tars)
    names = tars if is_remote(tars[0]) else [os.path.basename(tar) for tar in tars]
    told = [(name, *state) for name, state in zip(names, states, strict=True)]
    key = hashlib.blake2b(f"{_VERSION} {told}".encode(), digest_size=12).hexdigest()
    folders = _folders(tars[0])
    for folder in folders:
        if (folder / f"{key}.json").exists():
            return _load(folder / key, states)
    for folder in folders:
        if writable(folder):
            _make(tars, folder / key)
            return _load(folder / key, states)
    raise ValueError(f"no folder for the index of {tars[0]} can be written: {folders}")


def digest_of(tar: str) -> str:
    """Hash of a tar's pairs: names, captions, and where pictures and captions lie.

    Raises:
      ValueError: it is no tar, or cut short.
      OSError: it cannot be read.
    """
    return _indexed(tar, hashlib.blake2b(), {})[1]


def _folders(tar: str) -> list[Path]:
    other = cache_folders("tars")
    return other if is_remote(tar) else [Path(tar).parent / _FOLDER, *other]


def _load(stem: Path, states: list[State]) -> TarIndex:
    notes = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    path = str(stem.with_suffix(".npy"))
    report = {reason: LeftOut(**entry) for reason, entry in notes["report"].items()}
    return TarIndex(
        path,
        np.load(path, mmap_mode="r"),
        np.array(notes["ends"]),
        notes["fingerprint"],
        report,
        states,
        notes["digests"],
    )


def _make(tars: list[str], stem: Path) -> None:
    """Writes the entries, then the notes that say that they are whole."""
    digest = hashlib.blake2b(digest_size=16)
    ends, digests, report = [], [], {}
    with (
        tempfile.TemporaryFile(dir=stem.parent) as raw,
        counted(len(tars), "tar", what="index", shown=len(tars) >= 8) as bar,
    ):
        rows = 0
        for tar in tars:
            entries, own = _indexed(tar, digest, report)
            digests.append(own)
            raw.write(entries.tobytes())
            rows += len(entries)
            ends.append(rows)
            bar.update()
        if not rows:
            text = "; ".join(f"{reason}: {left}" for reason, left in report.items())
            raise ValueError(f"{tars[0]} and others hold 0 pairs ({text or 'no files'})")
        raw.seek(0)
        part = f"{stem}.{os.getpid()}.part"
        with open(part, "wb") as file:
            header = np.lib.format.header_data_from_array_1_0(np.empty(0, ENTRY)) | {
                "shape": (rows,)
            }
            np.lib.format.write_array_header_1_0(file, header)
            while block := raw.read(2**24):
                file.write(block)
        os.replace(part, stem.with_suffix(".npy"))
    notes = {
        "ends": ends,
        "fingerprint": digest.hexdigest(),
        "digests": digests,
        "report": {reason: dataclasses.asdict(left) for reason, left in report.items()},
    }
    Path(part).write_text(json.dumps(notes), encoding="utf-8")
    os.replace(part, stem.with_suffix(".json"))


def _indexed(tar: str, digest, report: dict[str, LeftOut]) -> tuple[Shaped[np.ndarray, " n"], str]:
    """The pairs of one tar, and the hash of them alone; `digest` is that of all tars."""
    entries, own = [], hashlib.blake2b(digest_size=16)
    with _reader(tar) as read:
        for key, files in _samples(tar, read).items():
            entry, caption = _entry(read, files)
            if isinstance(entry, str):
                report.setdefault(entry, LeftOut()).add(f"{os.path.basename(tar)}: {key}")
                continue
            pair = f"{key}\0{entry[1]}\0{caption}\0".encode(errors="surrogatepass")
            digest.update(pair)
            own.update(pair)
            entries.append(entry)
    found = np.array(entries, ENTRY)
    own.update(found.tobytes())
    return found, own.hexdigest()


@contextlib.contextmanager
def _reader(tar: str) -> Iterator[Read]:
    """Reads parts of a tar. A local one is not mapped: if it is cut, a map ends the process."""
    if is_remote(tar):
        yield objects.Windows(tar)
    else:
        with open(tar, "rb", buffering=0) as file:
            descriptor = file.fileno()
            yield lambda start, length: os.pread(descriptor, length, start)


def _samples(tar: str, read: Read) -> dict[str, list[tuple[str, int, int]]]:
    """Ending, place and size of the members of each sample."""
    samples: dict[str, list[tuple[str, int, int]]] = {}
    try:
        for name, start, size in members(read):
            folder, slash, file = name.rpartition("/")
            stem, _, ending = file.partition(".")
            if stem:  # hidden files, such as ._1.jpg of some archivers, belong to no sample
                place = (ending.lower().rpartition(".")[2], start, size)
                samples.setdefault(f"{folder}{slash}{stem}", []).append(place)
    except ValueError as error:
        if tar.endswith(("gz", "bz2", "xz", "zst")):
            raise ValueError(f"{tar} is compressed: unpack it to a plain .tar") from error
        raise ValueError(
            f"{tar} is no tar, or cut short ({error}): finish its download, or remove it"
        ) from error
    return samples


def _entry(
    read: Read, files: list[tuple[str, int, int]]
) -> tuple[tuple[int, int, int, int, bool], str] | tuple[str, None]:
    """Entry and caption of a sample, or the reason why it is no pair."""
    pictures = [file for file in files if file[0] in PICTURES]
    texts = [file for file in files if file[0] == "txt"]
    texts += [file for file in files if file[0] == "json"]
    if not pictures:
        return NO_PICTURE, None
    if pictures[0][2] > MAX_BYTES:
        return TOO_LARGE, None
    for ending, start, length in texts:
        is_json = ending == "json"
        try:
            caption = caption_of(read(start, length), is_json)
        except UnicodeError:
            return NOT_UTF8, None
        if is_caption(caption):
            _, picture, size = pictures[0]
            return (picture // BLOCK, size, start // BLOCK, length, is_json), caption
    return NO_CAPTION, None


def caption_of(content: bytes, is_json: bool) -> str:
    """The caption in a .txt, or that named "caption" in a .json; empty if there is none.

    Raises:
      UnicodeError: it is no text.
    """
    if not is_json:
        return content.decode()
    try:
        found = json.loads(content)
    except UnicodeDecodeError:
        raise
    except ValueError:
        return ""
    caption = found.get("caption") if isinstance(found, dict) else None
    if not isinstance(caption, str):
        return ""
    caption.encode()  # JSON can write half of a surrogate pair
    return caption
