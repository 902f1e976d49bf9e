"""Where the pairs of WebDataset tar shards lie: found once, kept as an array in a file.

`tar_samples` says what a pair is. The order is that of the tars by name, and in a tar that in which
the samples' names begin.

An index belongs to tars at their whole paths, of their sizes and times, and with their first and
last bytes. It is kept beside them, or in the user's cache where that cannot be written, or of the
machine; where nothing can be written, in memory. It is looked through before it is used, and made
anew where it is damaged. Any number of processes may make it at the same time: each writes files of
its own, which then take the one name, and all have the same content.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped

from protoclip_jax.data.bar import counted
from protoclip_jax.data.left_out import LeftOut
from protoclip_jax.data.seen_files import State, states_of
from protoclip_jax.data.tar_members import BLOCK, Read, members
from protoclip_jax.data.tar_samples import Sample, samples
from protoclip_jax.storage import objects
from protoclip_jax.storage.cache import cache_folders, writable
from protoclip_jax.storage.disks import patient
from protoclip_jax.storage.paths import is_remote

logger = logging.getLogger(__name__)

# A member starts at a multiple of 512 bytes, so that 32 bits reach 2 TB: 17 bytes a row.
ENTRY = np.dtype(
    [("picture", "<u4"), ("size", "<u4"), ("caption", "<u4"), ("length", "<u4"), ("json", "?")]
)
_MOST = 2**32 * BLOCK
_VERSION = 4
NO_PAIRS = "tar without a pair"
_FOLDER = ".protoclip_tars"
_END_BYTES = 2**16  # at either end of a tar, which tell it from another of its size and time
_AT_A_TIME = 16  # tars whose ends are read at once


class _NoRoom(Exception):
    """An index cannot be kept in a folder."""


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """All pairs of some tars.

    Attributes:
      path: the file of the entries, which processes map and so share its memory; None where it is
        in memory alone.
      entries: place of picture and caption of each row.
      ends: rows up to the end of each tar.
      fingerprint: hash of names, sizes and captions, in order.
      report: what is not used, by reason.
      states: what each tar was when it was looked at.
      digests: of each tar, see `digest_of`.
    """

    path: str | None
    entries: Shaped[np.ndarray, " n"]
    ends: Int[np.ndarray, " tars"]
    fingerprint: str
    report: dict[str, LeftOut]
    states: list[State]
    digests: list[str]


def tar_index(tars: Sequence[str]) -> TarIndex:
    """The index of tars: read where it was kept, made and kept where they are new or changed.

    Raises:
      FileNotFoundError: a tar is missing.
      ValueError: a tar is cut short, damaged, compressed or none; or there are no pairs.
    """
    states = states_of(tars)
    key, folders = _key(tars, states), _folders(tars[0])
    for folder in folders:
        found = _load(folder / key, states)
        if found is not None:
            return found
    for folder in folders:
        if writable(folder):
            with contextlib.suppress(_NoRoom):  # the next folder, then
                return _make(tars, states, folder / key)
    return _make(tars, states, None)


def digest_of(tar: str) -> str:
    """Hash of a tar's pairs: names, captions, and where pictures and captions lie.

    Raises:
      ValueError: it is no tar, cut short or damaged.
      OSError: it cannot be read.
    """
    return _indexed(tar, hashlib.blake2b(), {})[1]


def _folders(tar: str) -> list[Path]:
    other = cache_folders("tars")
    return other if is_remote(tar) else [Path(tar).parent / _FOLDER, *other]


def _key(tars: Sequence[str], states: list[State]) -> str:
    """What an index of these tars is called."""
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        known = list(pool.map(_identity, tars, states))
    return hashlib.blake2b(f"{_VERSION} {known}".encode(), digest_size=12).hexdigest()


def _identity(tar: str, state: State) -> tuple:
    """What tells a tar from all others, before and after."""
    if is_remote(tar):
        return tar, *state  # its version is one of its content
    size = state[0]
    ends = ((0, _END_BYTES), (max(0, size - _END_BYTES), _END_BYTES))
    with open(tar, "rb", buffering=0) as file:
        data = [patient(lambda end=end: os.pread(file.fileno(), end[1], end[0])) for end in ends]
    return os.path.realpath(tar).encode(errors="surrogateescape"), *state, _hash(*data)


def _hash(*parts) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _load(stem: Path, states: list[State]) -> TarIndex | None:
    """A kept index; None where there is none, or it is damaged."""
    path = f"{stem}.npy"
    try:
        told, _, text = Path(f"{stem}.json").read_bytes().partition(b"\n")
        notes = json.loads(text)
        entries = np.load(path, mmap_mode="r", allow_pickle=False)
        index = TarIndex(
            path,
            entries,
            np.array(notes["ends"], np.int64),
            str(notes["fingerprint"]),
            {reason: LeftOut(**entry) for reason, entry in notes["report"].items()},
            states,
            list(map(str, notes["digests"])),
        )
        whole = told.decode() == _hash(text) and _fits(index)
        whole = whole and notes["entries"] == _hash(entries.view(np.uint8))
    except OSError:
        return None  # nothing there, or nothing that we may read
    except Exception:  # what damage does to JSON and numpy's files, they tell in many ways
        whole = False
    if not whole:
        logger.warning("the index of tars %s is damaged: it is made anew", path)
        return None
    return index


def _fits(index: TarIndex) -> bool:
    """Whether an index's numbers can be those of its tars."""
    ends, entries = index.ends, index.entries
    if entries.dtype != ENTRY or entries.ndim != 1 or not len(entries):
        return False
    if not len(ends) == len(index.states) == len(index.digests) or ends[-1] != len(entries):
        return False
    if (np.diff(ends, prepend=0) < 0).any():
        return False
    for first, last, (size, _) in zip([0, *ends[:-1]], ends, index.states, strict=True):
        own = entries[first:last]
        for place, length in (("picture", "size"), ("caption", "length")):
            if (own[place].astype(np.int64) * BLOCK + own[length] > size).any():
                return False
    return True


def _make(tars: Sequence[str], states: list[State], stem: Path | None) -> TarIndex:
    """Looks through the tars, and keeps what was found: in memory where there is no `stem`."""
    digest = hashlib.blake2b(digest_size=16)
    ends, digests, report = [], [], {}
    with (
        _scratch(stem) as raw,
        counted(len(tars), "tar", what="index", shown=len(tars) >= 8) as bar,
    ):
        rows = 0
        for tar in tars:
            entries, own = _indexed(tar, digest, report)
            digests.append(own)
            with _keeping():
                raw.write(entries.tobytes())
            if not len(entries):
                report.setdefault(NO_PAIRS, LeftOut()).add(os.path.basename(tar))
            rows += len(entries)
            ends.append(rows)
            bar.update()
        if not rows:
            text = "; ".join(f"{reason}: {left}" for reason, left in report.items())
            raise ValueError(f"{tars[0]} and others hold 0 pairs ({text or 'no files'})")
        index = TarIndex(
            None, np.empty(0, ENTRY), np.array(ends), digest.hexdigest(), report, states, digests
        )
        raw.seek(0)
        if stem is None:
            return dataclasses.replace(index, entries=np.frombuffer(raw.read(), ENTRY))
        with _keeping():
            path = _keep(raw, rows, index, stem)
            return dataclasses.replace(index, path=path, entries=np.load(path, mmap_mode="r"))


def _scratch(stem: Path | None) -> io.BufferedIOBase:
    if stem is None:
        return io.BytesIO()
    with _keeping():
        return tempfile.TemporaryFile(dir=stem.parent)


@contextlib.contextmanager
def _keeping() -> Iterator[None]:
    """Around what writes to a folder: a full disk there is no fault of the tars."""
    try:
        yield
    except OSError as error:
        raise _NoRoom from error


def _keep(raw: io.BufferedIOBase, rows: int, index: TarIndex, stem: Path) -> str:
    """Writes the entries, then the notes that say that they are whole; returns their path."""
    digest = hashlib.blake2b(digest_size=16)
    path = f"{stem}.npy"
    with _named_when_whole(path) as file:
        header = np.lib.format.header_data_from_array_1_0(np.empty(0, ENTRY)) | {"shape": (rows,)}
        np.lib.format.write_array_header_1_0(file, header)
        while block := raw.read(2**24):
            digest.update(block)
            file.write(block)
    notes = {
        "entries": digest.hexdigest(),
        "ends": index.ends.tolist(),
        "fingerprint": index.fingerprint,
        "digests": index.digests,
        "report": {reason: dataclasses.asdict(left) for reason, left in index.report.items()},
    }
    with _named_when_whole(f"{stem}.json") as file:
        text = json.dumps(notes).encode()
        file.write(f"{_hash(text)}\n".encode() + text)
    return path


@contextlib.contextmanager
def _named_when_whole(path: str) -> Iterator[io.BufferedIOBase]:
    """A file that gets its name at the end; hosts with equal process ids write different ones."""
    part = f"{path}.{uuid.uuid4().hex}.part"
    try:
        with open(part, "xb") as file:
            yield file
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def _indexed(tar: str, digest, report: dict[str, LeftOut]) -> tuple[Shaped[np.ndarray, " n"], str]:
    """The pairs of one tar, and the hash of them alone; `digest` is that of all tars."""
    entries, own = [], hashlib.blake2b(digest_size=16)

    def leave_out(reason: str, name: str) -> None:
        report.setdefault(reason, LeftOut()).add(f"{os.path.basename(tar)}: {name}")

    with _reader(tar) as read:
        for sample in _samples(tar, read, leave_out):
            pair = f"{sample.key}\0{sample.image.size}\0{sample.caption}\0"
            pair = pair.encode(errors="surrogatepass")
            digest.update(pair)
            own.update(pair)
            entries.append(_entry(sample))
    found = np.array(entries, ENTRY)
    own.update(found.tobytes())
    return found, own.hexdigest()


def _entry(sample: Sample) -> tuple[int, int, int, int, bool]:
    image, text = sample.image, sample.text
    return image.start // BLOCK, image.size, text.start // BLOCK, text.size, sample.is_json


@contextlib.contextmanager
def _reader(tar: str) -> Iterator[Read]:
    """Reads parts of a tar. A local one is not mapped: if it is cut, a map ends the process."""
    if is_remote(tar):
        yield objects.Windows(tar)
    else:
        with open(tar, "rb", buffering=0) as file:
            descriptor = file.fileno()
            yield lambda start, length: os.pread(descriptor, length, start)


def _samples(tar: str, read: Read, leave_out) -> Iterator[Sample]:
    try:
        found = list(members(read))
    except ValueError as error:
        if tar.endswith(("gz", "bz2", "xz", "zst")):
            raise ValueError(f"{tar} is compressed: unpack it to a plain .tar") from error
        raise ValueError(
            f"{tar} is no tar, or cut short ({error}): finish its download, or remove it"
        ) from error
    if found and found[-1].start >= _MOST:
        raise ValueError(f"{tar} is larger than {_MOST} bytes: split it")
    return samples(found, read, leave_out)
