"""Records of several ArrayRecord files by one number, in bounded memory."""

import bisect
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

from array_record.python import array_record_module

from protoclip_jax.data.decoding import BROKEN, MISSING, UnreadableImage

# One record at a time, in the thread that asks for it.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_BUFFER = 32768

# An open file costs 8 bytes a record and a file handle; opening it again costs 0.04 us a record,
# and a read that finds it open 40 us. At most 45 MB a process, measured with 15 million records.
_OPEN_RECORDS = 5_000_000
_OPEN_FILES = 500


class RecordFile(NamedTuple):
    """A file, and which of its records are used: `count` from `first` on."""

    path: str
    first: int
    count: int


class RecordFiles:
    """The records of files, one after the other.

    Memory does not grow with the records: it is the files' names and ends, and the index of those
    that are open, of at most 5 million records together. Safe for threads. Pickles without its
    open files.
    """

    def __init__(self, files: Sequence[RecordFile]):
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
        """
        number = bisect.bisect_right(self._ends, row)
        file = self._files[number]
        position = file.first + row - (self._ends[number - 1] if number else 0)
        reader = self._reader(number)
        try:
            return reader.read([position])[0]
        except (RuntimeError, ValueError, IndexError) as error:
            what = str(error).strip().splitlines()[0]
            raise UnreadableImage(BROKEN, f"{file.path}: {what}") from error

    def _reader(self, number: int):
        """An open file; threads that still read one which is put away keep it open."""
        with self._lock:
            if number not in self._open:
                self._open[number] = _opened(self._files[number].path)
                room = max(1, min(_OPEN_FILES, _OPEN_RECORDS * len(self._ends) // len(self)))
                while len(self._open) > room:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]


def _opened(path: str):
    if not os.path.exists(path):  # the reader would take it for an empty file
        raise UnreadableImage(MISSING, path)
    return array_record_module.ArrayRecordReader(
        path, options=_OPTIONS, file_reader_buffer_size=_BUFFER
    )
