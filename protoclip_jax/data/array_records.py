"""Sets of ArrayRecord shards made by `python -m protoclip_jax.prepare convert`.

A set is a folder:
- `pairs-00007-of-00150.array_record`: the pairs that the rows of one block of the source gave.
  A record is the row in the source (8 bytes), the length of the caption in bytes (4), both little
  endian, the caption (UTF-8) and the picture's file (JPEG or WebP).
- `meta.json`, written last: format and version, number of pairs, shards, what was left out,
  source, shorter side and encoding, and the fingerprint.
- `outcomes/` and `unreadable.tsv`: what became of every row of the source.

meta.json is believed only where it has what it should, and names files of its own folder alone.
A look at the start compares it with the shards: files are padded to blocks of 64 KiB, so that those
of two conversions often have one size.

A set in a bucket is read where it lies (see `record_files`).
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from protoclip_jax.data.decoding import BROKEN, UnreadableImage
from protoclip_jax.data.left_out import LeftOut
from protoclip_jax.data.record_files import RecordFile, RecordFiles, check_counts, opened
from protoclip_jax.data.seen_files import SeenFiles
from protoclip_jax.storage import objects
from protoclip_jax.storage.disks import patient
from protoclip_jax.storage.paths import absolute, is_remote

FORMAT = "protoclip_jax pairs"
VERSION = 1
META = "meta.json"
SETTINGS = "convert.json"  # written first: what an unfinished set is made from

# One record is one chunk, so that any of them is read alone; pictures do not compress further.
WRITER_OPTIONS = "group_size:1,uncompressed"

_HEAD = struct.Struct("<QI")
_BLOCK = 64  # records read at a time to hash a shard
# Hashing a set takes minutes a hundred GB; a few records of each shard tell two conversions apart.
_SAMPLES = 8
_AT_A_TIME = 16  # shards looked at at once


def pack(row: int, caption: str, picture: bytes) -> bytes:
    """A record."""
    text = caption.encode()
    return b"".join((_HEAD.pack(row, len(text)), text, picture))


def unpack(record: bytes) -> tuple[int, str, bytes]:
    """Row in the source, caption and picture's file of a record.

    Raises:
      UnreadableImage: it is none of `pack`.
    """
    try:
        row, length = _HEAD.unpack_from(record)
        end = _HEAD.size + length
        return row, record[_HEAD.size : end].decode(), record[end:]
    except (struct.error, UnicodeDecodeError) as error:
        raise UnreadableImage(BROKEN, f"a record that is none of a pair: {error}") from error


def shard_name(number: int, count: int) -> str:
    """File name of a shard."""
    return f"pairs-{number:05}-of-{count:05}.array_record"


def digest_of(path: str) -> str:
    """Hash of a shard's records, as its conversion noted it."""
    reader, digest = opened(path), shard_digest()
    count = reader.num_records()
    for first in range(0, count, _BLOCK):
        for record in reader.read(first, min(first + _BLOCK, count)):
            add_to_digest(digest, record)
    return digest.hexdigest()


def samples_of(path: str) -> list[str | None]:
    """Hashes of a few records that lie evenly in a shard; None for one that cannot be read."""
    reader = opened(path)
    last = reader.num_records() - 1
    positions = sorted({last * number // (_SAMPLES - 1) for number in range(_SAMPLES)})
    return [_sample(reader, position) for position in positions if last >= 0]


def _sample(reader, position: int) -> str | None:
    try:
        return hashlib.blake2b(reader.read([position])[0], digest_size=8).hexdigest()
    except (RuntimeError, ValueError, IndexError):  # an unreadable pair, which is met later
        return None


def shard_digest():
    """An empty hash, for `add_to_digest`."""
    return hashlib.blake2b(digest_size=16)


def add_to_digest(digest, record: bytes) -> None:
    """Takes in the next record of a shard."""
    digest.update(len(record).to_bytes(8, "little"))
    digest.update(record)


def fingerprint(digests: Iterable[str]) -> str:
    """Of a whole set, from the digests of its shards' records in order."""
    return hashlib.blake2b("\n".join(digests).encode(), digest_size=16).hexdigest()


def is_array_records(folder: str) -> bool:
    """Whether a local or remote folder is such a set, finished or not."""
    return any(objects.is_file(os.path.join(folder, name)) for name in (META, SETTINGS))


class ArrayRecordPairs:
    """The pairs of a set, in the source's order; a `PairSource`.

    Memory does not grow with the number of pairs: see `RecordFiles`.

    Attributes:
      name: the folder.
      fingerprint: hash of every row number, caption and picture, and of their order.
      report: what the conversion left out, by reason.
      meta: the content of meta.json.
    """

    def __init__(self, folder: str | os.PathLike):
        """Reads meta.json and compares it with the shards: sizes, and records of local ones.

        Raises:
          FileNotFoundError: no such folder, or a shard is missing.
          ValueError: the set is not finished, damaged, mixed with another, or of another version.
        """
        self.name = os.fspath(folder)
        self.meta = _read_meta(self.name)
        files = self._files()
        seen = SeenFiles.now([file.path for file in files])
        for file, shard in zip(files, self.meta["shards"], strict=True):
            self._check_size(seen.size(file.path), shard)
        self._records = RecordFiles(files, seen, digest_of)
        if not len(self):
            raise ValueError(f"{self.name} holds 0 pairs: no picture could be converted")
        self._check_records(files)
        self.fingerprint = self.meta["fingerprint"]
        self.report = {
            f"unreadable at conversion, {reason}": LeftOut(entry["count"], entry["examples"])
            for reason, entry in self.meta["unreadable"].items()
        }

    def _files(self) -> list[RecordFile]:
        folder = absolute(self.name)  # a worker may start in another folder
        return [
            RecordFile(os.path.join(folder, shard["file"]), 0, shard["pairs"], shard["digest"])
            for shard in self.meta["shards"]
        ]

    def _check_size(self, size: int, shard: dict) -> None:
        if size != shard["bytes"]:
            raise ValueError(
                f"{self.name}: {shard['file']} has {size} bytes and was written with "
                f"{shard['bytes']}: copy it again"
            )

    def _check_records(self, files: list[RecordFile]) -> None:
        """Refuses local shards that are not those of meta.json; remote ones would cost requests."""
        check_counts({file.path: file.count for file in files})
        self._check_order([file.path for file in files if file.count and not is_remote(file.path)])
        noted = {
            file.path: shard["samples"]
            for file, shard in zip(files, self.meta["shards"], strict=True)
            if "samples" in shard and not is_remote(file.path)  # older sets have none
        }
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            found = pool.map(lambda path: patient(lambda: samples_of(path)), noted)
            for (path, wanted), samples in zip(noted.items(), found, strict=True):
                pairs = zip(samples, wanted, strict=True)
                if any(one not in (None, other) for one, other in pairs):
                    raise ValueError(
                        f"{path} is a shard of another set, or in another's place: copy the set "
                        "again"
                    )

    def _check_order(self, paths: list[str]) -> None:
        """Refuses shards whose rows do not follow each other; all that can be seen of older sets.

        Rows may be beyond those that a shard has in meta.json: of a subset, they are the whole's.
        """
        before = -1
        with ThreadPoolExecutor(_AT_A_TIME) as pool:
            found = pool.map(lambda path: patient(lambda: _ends_of(path)), paths)
            for path, rows in zip(paths, found, strict=True):
                if any(row <= before for row in rows[:1]):
                    raise ValueError(
                        f"{path} begins with row {rows[0]} of the source, which is not behind "
                        "the shard before it: copy the set again"
                    )
                before = rows[-1] if rows else before

    def __len__(self) -> int:
        return len(self._records)

    def read(self, row: int) -> tuple[bytes, str]:
        """The picture's file and the caption.

        Raises:
          UnreadableImage: the record is damaged, or the disk fails.
          SourceChanged: its shard is another one than at the start, or gone.
          Unreachable: remote storage gave no answer for minutes.
        """
        _, caption, picture = unpack(self._record(row))
        return picture, caption

    def caption(self, row: int) -> str:
        """The caption of a row."""
        return self.read(row)[1]

    def where(self, row: int) -> str:
        """What a row is called: its number here, and in the source of the conversion."""
        try:
            origin = unpack(self._record(row))[0]
        except UnreadableImage:
            return f"{self.name} row {row}"
        return f"{self.name} row {row} ({self.meta['source']} row {origin})"

    def _record(self, row: int) -> bytes:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.name}, which has {len(self)}")
        return self._records[row]


def _ends_of(path: str) -> list[int]:
    """Rows in the source of a shard's first and last record; empty where one cannot be read."""
    reader = opened(path)
    try:
        return [unpack(reader.read([position])[0])[0] for position in (0, reader.num_records() - 1)]
    except (UnreadableImage, RuntimeError, ValueError, IndexError):
        return []


def _read_meta(folder: str) -> dict:
    path = os.path.join(folder, META)
    try:
        text = objects.read_text(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged or not made by `prepare convert`") from error
    except FileNotFoundError:
        if objects.is_file(os.path.join(folder, SETTINGS)):
            raise ValueError(
                f"{folder} is not finished: run the `prepare convert` that began it again"
            ) from None
        raise FileNotFoundError(f"{folder} holds no {META} of `prepare convert`") from None
    try:
        meta = json.loads(text)
        known = meta["format"], meta["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not made by `prepare convert`") from error
    if known != (FORMAT, VERSION):
        raise ValueError(f"{path} is {known[0]!r} version {known[1]}, wanted {FORMAT!r} {VERSION}")
    if not _is_whole(meta):
        raise ValueError(f"{path} is damaged: copy it again, or run `prepare convert` again")
    shards = meta["shards"]
    if (
        fingerprint(shard["digest"] for shard in shards) != meta["fingerprint"]
        or sum(shard["pairs"] for shard in shards) != meta["pairs"]
    ):
        raise ValueError(
            f"{path} was changed, since its shards do not add up to its pairs and fingerprint: "
            "copy it again, or run `prepare convert` again"
        )
    return meta


def _is_whole(meta: dict) -> bool:
    """Whether meta.json has what is read of it, and names no file outside of its folder."""
    shards, unreadable = meta.get("shards"), meta.get("unreadable")
    return (
        isinstance(meta.get("fingerprint"), str)
        and _has(meta, source=str, pairs=int)
        and isinstance(shards, list)
        and all(_has(shard, file=str, digest=str, pairs=int, bytes=int) for shard in shards)
        and all(os.path.basename(shard["file"]) == shard["file"] for shard in shards)
        and all(0 <= shard["pairs"] <= shard["bytes"] for shard in shards)
        and all(_samples_fit(shard) for shard in shards if "samples" in shard)
        and isinstance(unreadable, dict)
        and all(_has(entry, count=int, examples=list) for entry in unreadable.values())
        and all(
            isinstance(text, str) for entry in unreadable.values() for text in entry["examples"]
        )
    )


def _samples_fit(shard: dict) -> bool:
    return _has(shard, samples=list) and len(shard["samples"]) == min(shard["pairs"], _SAMPLES)


def _has(entry, **kinds: type) -> bool:
    # By `type`, since True is an int to isinstance.
    return isinstance(entry, dict) and all(
        type(entry.get(name)) is kind for name, kind in kinds.items()
    )
