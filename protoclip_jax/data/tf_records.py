"""Records of TFRecord files by number, read without TensorFlow.

Each is its length (8 bytes), a checksum (4), the data and a checksum (4).
"""

import array
import bisect
import contextlib
import os
import struct
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from protoclip_jax.data.decoding import BROKEN, NO_ACCESS, UnreadableImage
from protoclip_jax.data.record_files import RecordFile
from protoclip_jax.data.seen_files import SeenFiles
from protoclip_jax.storage import objects
from protoclip_jax.storage.disks import patient
from protoclip_jax.storage.paths import is_remote
from protoclip_jax.storage.retries import Unreachable

_HEAD = struct.Struct("<Q4x")


class TfRecords:
    """The records of files, one after the other. Memory: 8 bytes a record."""

    def __init__(
        self, files: Sequence[RecordFile], seen: SeenFiles, digest_of: Callable[[str], str]
    ):
        """Walks over the lengths.

        Args:
          files: local or remote; with a count of -1, all records from the first one on.
          seen: what they were at the start of the run.
          digest_of: hashes the file of a path, where its time alone has changed.

        Raises:
          ValueError: a file is cut short, or holds fewer records than are wanted.
          SourceChanged: a file is another one than at the start, or gone.
        """
        self._files, self._seen, self._digest_of = files, seen, digest_of
        self._starts: list[Int[np.ndarray, " n"]] = []
        self._ends, total = [], 0
        for file in files:
            try:
                starts = patient(lambda file=file: _starts(file.path))
            except (OSError, ValueError):
                self._check(file, at_once=True)
                raise
            self._check(file)
            stop = len(starts) if file.count == -1 else file.first + file.count
            if stop > len(starts):
                raise ValueError(
                    f"{file.path} holds {len(starts)} records, and its set says {stop} or more: "
                    "copy the set again"
                )
            self._starts.append(starts[file.first : stop])
            total += len(self._starts[-1])
            self._ends.append(total)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> bytes:
        """A record's bytes.

        Raises:
          UnreadableImage: it is damaged, or the disk fails.
          SourceChanged: its file is another one than at the start, or gone.
          Unreachable: a remote file could not be reached for minutes.
        """
        number = bisect.bisect_right(self._ends, row)
        first = self._ends[number - 1] if number else 0
        file, start = self._files[number], int(self._starts[number][row - first])
        most = self._seen.size(file.path) - start  # a file that has changed may say anything
        try:
            record = patient(lambda: _record(file.path, start, most))
        except Unreachable:
            raise
        except OSError as error:
            self._check(file, at_once=True)
            raise UnreadableImage(NO_ACCESS, f"{file.path}: {error}") from error
        self._check(file, at_once=record is None)
        if record is None:
            raise UnreadableImage(BROKEN, f"{file.path} is cut short")
        return record

    def _check(self, file: RecordFile, at_once: bool = False) -> None:
        self._seen.check(
            file.path, lambda: self._digest_of(file.path) == file.digest, at_once=at_once
        )


def _record(path: str, start: int, most: int) -> bytes | None:
    """A record's data; None where the file ends before it does."""
    with _opened(path, 2**16) as read:
        head = read(start, _HEAD.size)
        if len(head) < _HEAD.size:
            return None
        (length,) = _HEAD.unpack(head)
        data = read(start + _HEAD.size, min(length, most))
        return data if len(data) == length else None


@contextlib.contextmanager
def _opened(path: str, window: int) -> Iterator[Callable[[int, int], bytes]]:
    """Reads parts of a file, by start and length; a remote one at least a window at a time."""
    if is_remote(path):
        yield objects.Windows(path, window)
        return
    with open(path, "rb") as file:
        yield lambda start, length: (file.seek(start), file.read(length))[1]


def _starts(path: str) -> Int[np.ndarray, " n"]:
    starts, at = array.array("q"), 0  # 8 bytes a record, also of a file that is all zeros
    size = objects.status(path).size if is_remote(path) else os.path.getsize(path)
    with _opened(path, 2**22) as read:
        while at < size:
            head = read(at, _HEAD.size)
            if len(head) < _HEAD.size:
                break
            starts.append(at)
            at += 16 + _HEAD.unpack(head)[0]
    if at != size:
        raise ValueError(
            f"{path} is cut short or damaged: {size} bytes, its records need {at}: copy it again"
        )
    return np.array(starts, np.int64)
