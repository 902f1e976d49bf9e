"""Records of several ArrayRecord files by one number, in bounded memory.

Files in gs:// are read in place, a request a record, by the client that is part of ArrayRecord; it
tries again for minutes by itself. No local copies: an episode's rows lie in all files, so that
every host would copy the whole set before its first episode was over.
"""

import bisect
import errno
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

from array_record.python import array_record_module

from protoclip_jax.data.decoding import BROKEN, MISSING, NO_ACCESS, UnreadableImage
from protoclip_jax.data.seen_files import SeenFiles
from protoclip_jax.storage import objects
from protoclip_jax.storage.disks import PASSING, patient
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

_AT_A_TIME = 16  # files opened at once to look at them

# The reader's way to say that the system refused: "pread() failed: Input/output error; reading".
_SYSTEM = "() failed: "

T = TypeVar("T")


class RecordFile(NamedTuple):
    """A file, which of its records are used (`count` from `first` on), and a hash of its content.

    `digest` is what the `digest_of` of `RecordFiles` gave for it.
    """

    path: str
    first: int
    count: int
    digest: str


class RecordFiles:
    """The records of files, one after the other.

    Memory does not grow with the records: it is the files' names and ends, and the index of those
    that are open, of at most 5 million records together; of remote files all stay open, 8 bytes a
    record. Safe for threads. Pickles without its open files.
    """

    def __init__(
        self, files: Sequence[RecordFile], seen: SeenFiles, digest_of: Callable[[str], str]
    ):
        """Opens nothing yet.

        Args:
          files: local, or in gs://.
          seen: what they were at the start of the run.
          digest_of: hashes the file of a path, where its time alone has changed; a plain function,
            since workers get it too. May raise ValueError for a damaged file.

        Raises:
          ValueError: they are elsewhere.
        """
        for file in files:
            if scheme(file.path) not in ("", "gs"):
                raise ValueError(
                    f"{file.path}: ArrayRecord files are read from gs:// or local folders only: "
                    "copy them"
                )
        self._files, self._seen, self._digest_of = list(files), seen, digest_of
        self._ends = list(itertools.accumulate(file.count for file in files))
        self._start()

    def _start(self) -> None:
        self._open: OrderedDict[int, object] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self):
        return self._files, self._seen, self._digest_of, self._ends

    def __setstate__(self, state):
        self._files, self._seen, self._digest_of, self._ends = state
        self._start()

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
        file = self._files[number]
        position = file.first + row - (self._ends[number - 1] if number else 0)
        try:
            record = patient(lambda: _read(self._reader(number), file.path, position))
        except OSError as error:
            self._check(file, at_once=True)
            raise UnreadableImage(NO_ACCESS, f"{file.path}: {error}") from error
        except (RuntimeError, ValueError, IndexError) as error:
            self._check(file, at_once=True)
            raise _fault(file.path, error) from error
        self._check(file)
        return record

    def _check(self, file: RecordFile, at_once: bool = False) -> None:
        self._seen.check(file.path, lambda: self._same(file), at_once=at_once)

    def _same(self, file: RecordFile) -> bool:
        try:
            return self._digest_of(file.path) == file.digest
        except (RuntimeError, ValueError):
            return False

    def _reader(self, number: int):
        """An open file; threads that still read one which is put away keep it open."""
        with self._lock:
            if number not in self._open:
                self._open[number] = opened(self._files[number].path)
                room = max(1, min(_OPEN_FILES, _OPEN_RECORDS * len(self._ends) // len(self)))
                if is_remote(self._files[number].path):
                    room = _OPEN_REMOTE_FILES
                while len(self._open) > room:
                    self._open.popitem(last=False)
            self._open.move_to_end(number)
            return self._open[number]


def opened(path: str):
    """A reader of a file.

    Raises:
      OSError: it is not there, or the disk fails.
      RuntimeError: it is damaged; a remote one: any fault.
    """
    if not is_remote(path):
        os.stat(path)  # the reader would take a missing file for an empty one
    reader = _told(
        path,
        lambda: array_record_module.ArrayRecordReader(
            path, options=_OPTIONS, file_reader_buffer_size=_BUFFER
        ),
    )
    if not reader.ok():
        _told(path, lambda: reader.read([0]))
        raise RuntimeError(f"{path} cannot be opened")
    return reader


def check_counts(counts: Mapping[str, int]) -> None:
    """Opens local files once, whose index at the end is missing where one was cut short.

    Remote ones would cost requests: there a damaged file is met by the look at the start, or later.

    Args:
      counts: records that each file should hold, by path.

    Raises:
      OSError: one is not there, or the disk fails.
      ValueError: one is damaged, or holds another number of records; says which.
    """
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        for _ in pool.map(_check_count, *zip(*counts.items(), strict=True)):
            pass


def _check_count(path: str, wanted: int) -> None:
    if is_remote(path):
        return
    try:
        found = patient(lambda: opened(path).num_records())
    except RuntimeError as error:
        what = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"{path} is damaged or cut short ({what}): copy it again") from error
    if found != wanted:
        raise ValueError(
            f"{path} holds {found} records, and its set says {wanted}: copy the set again"
        )


def _read(reader, path: str, position: int) -> bytes:
    return _told(path, lambda: reader.read([position])[0])


def _told(path: str, action: Callable[[], T]) -> T:
    """What a reader does; where the system refused a local read, an OSError as elsewhere."""
    try:
        return action()
    except RuntimeError as error:
        what = str(error).strip().splitlines()[0]
        if is_remote(path) or _SYSTEM not in what:
            raise
        cause = what.partition(_SYSTEM)[2].partition(";")[0]
        codes = [code for code in PASSING if os.strerror(code) == cause]
        raise OSError(codes[0] if codes else errno.EPERM, what) from error


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
