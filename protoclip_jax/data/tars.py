"""Pairs in local or remote tar shards of WebDataset's layout, as img2dataset writes them.

What is a pair, and that no member's name leads out of its tar, is said in `tar_samples`.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterable

import numpy as np

from protoclip_jax.data.decoding import NO_ACCESS, TRUNCATED, UnreadableImage
from protoclip_jax.data.left_out import LeftOut
from protoclip_jax.data.seen_files import SeenFiles
from protoclip_jax.data.tar_index import digest_of, tar_index
from protoclip_jax.data.tar_members import BLOCK, name_at
from protoclip_jax.data.tar_samples import caption_of
from protoclip_jax.storage import objects
from protoclip_jax.storage.disks import patient
from protoclip_jax.storage.paths import absolute, is_remote
from protoclip_jax.storage.retries import Unreachable

COMPRESSED = "compressed tar: unpack it (gunzip, unzstd)"
BELOW = "folder with tars below the one that is named: only that one's are read"

_COMPRESSED = re.compile(
    r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z|br)|t(gz|bz2?|xz|zst))$", re.IGNORECASE
)
_MOST_FOLDERS = 20  # looked into: each is a request where they are remote
_NEAR = 2**16  # bytes between two parts of a remote tar that one request fetches with them


def tar_paths(spec: str) -> list[str]:
    """The tars that a file, a folder, or a pattern with * or {00000..00331} names, sorted.

    An empty list where the spec is none of these.
    """
    if is_remote(spec):
        return _remote_tars(spec)
    if os.path.isdir(spec):
        return [os.path.join(spec, name) for name in _tars_of(os.listdir(spec))]
    if not spec.lower().endswith(".tar"):
        return []
    if "*" in spec and not os.path.exists(spec):
        return sorted(glob.glob(spec))
    return _expanded(spec)


def _remote_tars(spec: str) -> list[str]:
    folder, pattern = spec.rstrip("/"), "*"
    if spec.lower().endswith(".tar"):
        if "*" not in spec.rpartition("/")[2]:
            return _expanded(spec)
        folder, _, pattern = spec.rpartition("/")
    elif spec.lower().endswith((".tsv", ".csv", ".txt")):
        return []
    return [f"{folder}/{name}" for name in _tars_of(objects.listing(folder, pattern))]


def _tars_of(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if name[:1] != "." and name.lower().endswith(".tar"))


def unread_tars(spec: str) -> dict[str, LeftOut]:
    """Tars that are near those of a folder, and not read, by reason."""
    if is_remote(spec):
        if spec.lower().endswith(".tar"):
            return {}
        entries = [(name, False) for name in objects.listing(spec.rstrip("/"))]
        entries += [(name, True) for name in objects.folders(spec.rstrip("/"))]
    elif os.path.isdir(spec):
        with os.scandir(spec) as found:
            entries = [(entry.name, entry.is_dir()) for entry in found]
    else:
        return {}
    report: dict[str, LeftOut] = {}
    for name in sorted(name for name, is_folder in entries if not is_folder):
        if _COMPRESSED.search(name):
            report.setdefault(COMPRESSED, LeftOut()).add(name)
    folders = sorted(name for name, is_folder in entries if is_folder and name[:1] != ".")
    for name in folders[:_MOST_FOLDERS]:
        if below := tar_paths(f"{spec.rstrip('/')}/{name}"):
            report.setdefault(BELOW, LeftOut()).add(f"{name}: {len(below)} tars")
    return report


def _expanded(spec: str) -> list[str]:
    """{00..11} written out, as WebDataset does."""
    parts = re.split(r"\{(\d+)\.\.(\d+)\}", spec)
    choices = [
        [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
        for first, last in zip(parts[1::3], parts[2::3], strict=True)
    ]
    return [
        "".join(itertools.chain(*itertools.zip_longest(parts[::3], chosen, fillvalue="")))
        for chosen in itertools.product(*choices)
    ]


class TarPairs:
    """The pairs of tar shards, in the tars' order; a `PairSource`.

    Memory: the entries of all rows (17 bytes each) are a mapped file that processes share; where no
    folder can be written, each process has its own.

    Attributes:
      name: as it was named.
      fingerprint: hash of members' names, sizes of pictures, and captions, in order.
      report: what is not used of the tars, by reason.
    """

    def __init__(self, spec: str):
        """Finds the tars and reads or makes their index (see `tar_index`).

        Raises:
          FileNotFoundError: a tar is missing.
          ValueError: there is none, or one is damaged, or they hold no pairs.
        """
        self.name = spec
        self._tars = [absolute(path) for path in tar_paths(spec)]
        if not self._tars:
            raise ValueError(f"{spec} names no .tar")
        index = tar_index(self._tars)
        self._path, self._entries, self._ends = index.path, index.entries, index.ends
        self._digests = dict(zip(self._tars, index.digests, strict=True))
        self._seen = SeenFiles(dict(zip(self._tars, index.states, strict=True)))
        self.fingerprint = index.fingerprint
        self.report = unread_tars(spec) | index.report

    def __getstate__(self):
        kept = () if self._path is None else ("_entries",)
        return {key: value for key, value in self.__dict__.items() if key not in kept}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if self._path is not None:
            self._entries = np.load(self._path, mmap_mode="r", allow_pickle=False)

    def __len__(self) -> int:
        return len(self._entries)

    def _place(self, row: int) -> tuple[str, np.void]:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.name}, which has {len(self)}")
        tar = int(np.searchsorted(self._ends, row, side="right"))
        return self._tars[tar], self._entries[row]

    def read(self, row: int) -> tuple[bytes, str]:
        """The picture's file and the caption.

        Raises:
          UnreadableImage: the tar cannot be read.
          SourceChanged: it is another one than at the start, or gone.
          Unreachable: remote storage gave no answer for minutes.
        """
        tar, entry = self._place(row)
        picture, text = self._read(
            tar,
            (int(entry["picture"]) * BLOCK, int(entry["size"])),
            (int(entry["caption"]) * BLOCK, int(entry["length"])),
        )
        return picture, caption_of(text, bool(entry["json"]))

    def caption(self, row: int) -> str:
        """The caption alone."""
        tar, entry = self._place(row)
        (text,) = self._read(tar, (int(entry["caption"]) * BLOCK, int(entry["length"])))
        return caption_of(text, bool(entry["json"]))

    def where(self, row: int) -> str:
        """The tar and the picture's name in it, where its headers can be read."""
        tar, entry = self._place(row)
        try:
            name = name_at(
                lambda start, length: self._read(tar, (start, length))[0],
                int(entry["picture"]) * BLOCK,
            )
        except UnreadableImage:
            name = None
        return f"{tar} row {row}" if name is None else f"{tar}/{name}"

    def _read(self, tar: str, *ranges: tuple[int, int]) -> list[bytes]:
        """Ranges (start, length) of a tar, as it was at the start."""
        try:
            found = _read_remote(tar, ranges) if is_remote(tar) else _read_local(tar, ranges)
        except Unreachable:
            raise
        except OSError as error:
            self._check(tar, at_once=True)
            raise UnreadableImage(NO_ACCESS, str(error)) from error
        short = [len(data) for data in found] != [length for _, length in ranges]
        self._check(tar, at_once=short)
        if short:
            raise UnreadableImage(TRUNCATED, f"{tar} has become shorter")
        return found

    def _check(self, tar: str, at_once: bool) -> None:
        self._seen.check(tar, lambda: _digest(tar) == self._digests[tar], at_once=at_once)


def _digest(tar: str) -> str | None:
    try:
        return digest_of(tar)
    except ValueError:
        return None


def _read_local(tar: str, ranges: tuple[tuple[int, int], ...]) -> list[bytes]:
    return patient(lambda: _parts(tar, ranges))


def _parts(tar: str, ranges: tuple[tuple[int, int], ...]) -> list[bytes]:
    # Opened each time: cheaper than a picture by far.
    with open(tar, "rb", buffering=0) as file:
        return [os.pread(file.fileno(), length, start) for start, length in ranges]


def _read_remote(tar: str, ranges: tuple[tuple[int, int], ...]) -> list[bytes]:
    first = min(start for start, _ in ranges)
    last = max(start + length for start, length in ranges)
    if last - first > sum(length for _, length in ranges) + _NEAR:
        return [objects.read(tar, start, length) for start, length in ranges]
    whole = objects.read(tar, first, last - first)
    return [whole[start - first : start - first + length] for start, length in ranges]
