"""Records of several ArrayRecord files by one number, in bounded memory.

Files in gs:// are read in place, a request a record, by the client that is part of ArrayRecord; it
tries again for minutes by itself. No local copies: an episode's rows lie in all files, so that
every host would copy the whole set before its first episode was over.
"""

import bisect
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from array_record.python import array_record_module

from protoclip_jax.data.decoding import BROKEN, MISSING, NO_ACCESS, UnreadableImage
from protoclip_jax.storage import objects
from protoclip_jax.storage.paths import is_remote, scheme
from protoclip_jax.storage.retries import Unreachable

# One record at a time, in the thread that asks for it.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 32768

# An open file costs 8 bytes a record and a file handle; opening it again costs 0.04 us a record,
# and a read that finds it open 40 us. At most 45 MB a process, measured with 15 million records.
_OPEN_RECORDS = 5_000_000
_OPEN_FILES = 500
# Opening a remote file costs requests for its index of 8 bytes a record, so all stay open.
_OPEN_REMOTE_FILES = 100_000


class RecordFile(NamedTuple):
    """A file, and which of its records are used: `count` from `first` on."""

    path: str
    first: int
    count: int


class RecordFiles:
    """The records of files, one after the other.

    Memory does not grow with the records: it is the files' names and ends, and the index of those
    that are open, of at most 5 million records together; of remote files all stay open, 8 bytes a
    record. Safe for threads. Pickles without its open files.
    """

    def __init__(self, files: Sequence[RecordFile]):
        """Args:
          files: local, or in gs://.

        Raises:
          ValueError: they are elsewhere.
        """
        for file in files:
            if scheme(file.path) not in ("", "gs"):
                raise ValueError(
                    f"{file.path}: ArrayRecord files are read from gs:// or local folders only: "
                    "copy them"
                )
        self._files = list(files)
        self._ends = list(itertools.accumulate(file.count for file in files))
        self._start()

    def _start(self) -> None:
        self._open: OrderedDict[int, object] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self):
        return self._files, self._ends

    def __setstate__(self, state):
        self._files, self._ends = state
        self._start()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> bytes:
        """A record's bytes.

        Raises:
          UnreadableImage: it is damaged, or its file gone.
          Unreachable: a remote file could not be reached for minutes.
        """
        number = bisect.bisect_right(self._ends, row)
        file = self._files[number]
        position = file.first + row - (self._ends[number - 1] if number else 0)
        reader = self._reader(number)
        try:
            return reader.read([position])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            raise _fault(file.path, error) from error

    def _reader(self, number: int):
        """An open file; threads that still read one which is put away keep it open."""
        with self._lock:
            if number not in self._open:
                self._open[number] = _opened(self._files[number].path)
                room = max(1, min(_OPEN_FILES, _OPEN_RECORDS * len(self._ends) // len(self)))
                if is_remote(self._files[number].path):
                    room = _OPEN_REMOTE_FILES
                while len(self._open) > room:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]


def _opened(path: str):
    if not is_remote(path) and not os.path.exists(path):  # taken for an empty file
        raise UnreadableImage(MISSING, path)
    reader = array_record_module.ArrayRecordReader(
        path, options=_OPTIONS, file_reader_buffer_size=_BUFFER
    )
    if not reader.ok():
        try:
            reader.read([0])
        except (RuntimeError, ValueError, IndexError) as error:
            raise _fault(path, error) from error
        raise UnreadableImage(BROKEN, path)
    return reader


def _fault(path: str, error: Exception) -> UnreadableImage | Unreachable | ValueError:
    """What a reader's error means."""
    what = f"{path}: {str(error).strip().splitlines()[0]}"
    if not is_remote(path):
        return UnreadableImage(BROKEN, what)
    if "open() failed" in what:
        return ValueError(
            f"{path}: the array_record that is installed cannot read gs://: "
            "pip install 'protoclip_jax[gcs]'"
        )
    try:
        objects.status(path)
    except FileNotFoundError:
        return UnreadableImage(MISSING, path)
    except Unreachable as unreachable:
        return unreachable
    except OSError as refused:
        return UnreadableImage(NO_ACCESS, str(refused))
    if "Transient" in what or "Retry" in what:
        return Unreachable(what)
    return UnreadableImage(BROKEN, what)
