"""The rows of episodes, with each epoch's order made once for all worker processes of a process.

An order of 15 million pairs costs a second and 60 MB. Every worker needs it in every episode, and
no more of it than the episode's part.

The orders lie in a temporary file without a name: nothing is left behind, however the run ends.
Workers reach it through the process that made it, in /proc. Where that cannot be (no such folder, a
full disk, no file locks), each makes the orders for itself, as it would without this.
"""

import contextlib
import fcntl
import os
import secrets
import struct
import tempfile
import threading
import weakref

import numpy as np
from jaxtyping import Int64, Integer

from protoclip_jax.episodes.sampling import episode_rows, epoch_order, order_type

# Two orders: an episode may reach into the next epoch, and workers be an episode apart.
_SLOTS = 2
_TOKEN = 16  # bytes at the file's beginning that no other file has
_HEAD = struct.Struct(f"<{_SLOTS}q")  # the epoch of each slot
_FREE = -1
_BODY = 4096  # where the first order begins


class EpisodeRows:
    """`episode_rows` of a run, as a function of the episode. Picklable: copies share the orders."""

    def __init__(self, num_pairs: int, size: int, seed: int, replacement: bool):
        """Makes the file, unless episodes are drawn without an order."""
        self._num_pairs, self._size, self._seed = num_pairs, size, seed
        self._replacement = replacement
        self._type = order_type(num_pairs)
        self._path = self._token = None
        if not replacement:
            with contextlib.suppress(OSError):
                self._create()
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()

    def _create(self) -> None:
        with tempfile.TemporaryFile() as file:
            self._file = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._file)
        token = secrets.token_bytes(_TOKEN)
        _write(self._file, token + _HEAD.pack(*[_FREE] * _SLOTS), 0)
        self._token = token
        self._path = f"/proc/{os.getpid()}/fd/{self._file}"

    def __getstate__(self):
        own = ("_file", "_lock")
        return {key: value for key, value in self.__dict__.items() if key not in own}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._start()

    def __call__(self, episode: int) -> Int64[np.ndarray, " size"]:
        """Rows of an episode by position."""
        return episode_rows(
            self._num_pairs, self._size, episode, self._seed, self._replacement, self._part
        )

    def _part(self, epoch: int, first: int, last: int) -> Integer[np.ndarray, " n"]:
        with self._lock:
            if self._path is not None:
                try:
                    return self._shared(epoch, first, last)
                except OSError:
                    self._path = None  # from now on without the others
        return epoch_order(self._num_pairs, epoch, self._seed)[first:last]

    def _shared(self, epoch: int, first: int, last: int) -> Integer[np.ndarray, " n"]:
        """A part of the order in the file, which is put there first if nobody has done so."""
        file = self._opened()
        with _locked(file, fcntl.LOCK_SH):
            found = self._read(file, epoch, first, last)
        if found is None:
            with _locked(file, fcntl.LOCK_EX):
                found = self._read(file, epoch, first, last)
                if found is None:  # nobody else was quicker
                    found = self._put(file, epoch)[first:last]
        return found

    def _opened(self) -> int:
        if "_file" not in self.__dict__:
            file = os.open(self._path, os.O_RDWR)
            if os.pread(file, _TOKEN, 0) != self._token:  # its owner has ended
                os.close(file)
                raise OSError("another file")
            self._file = file
            weakref.finalize(self, os.close, file)
        return self._file

    def _read(
        self, file: int, epoch: int, first: int, last: int
    ) -> Integer[np.ndarray, " n"] | None:
        epochs = self._epochs(file)
        if epoch not in epochs:
            return None
        begin = self._begin(epochs.index(epoch)) + first * self._type.itemsize
        data = os.pread(file, (last - first) * self._type.itemsize, begin)
        if len(data) < (last - first) * self._type.itemsize:
            raise OSError("the file is cut short")
        return np.frombuffer(data, self._type)

    def _put(self, file: int, epoch: int) -> Integer[np.ndarray, " num_pairs"]:
        """Puts an order in the place of the earliest one."""
        epochs = self._epochs(file)
        slot = epochs.index(min(epochs))
        order = epoch_order(self._num_pairs, epoch, self._seed)
        epochs[slot] = _FREE  # while it is written, since a kill may come in between
        _write(file, _HEAD.pack(*epochs), _TOKEN)
        _write(file, order.data, self._begin(slot))
        epochs[slot] = epoch
        _write(file, _HEAD.pack(*epochs), _TOKEN)
        return order

    def _epochs(self, file: int) -> list[int]:
        return list(_HEAD.unpack(os.pread(file, _HEAD.size, _TOKEN)))

    def _begin(self, slot: int) -> int:
        return _BODY + slot * self._num_pairs * self._type.itemsize


def _write(file: int, data: bytes | memoryview, begin: int) -> None:
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(file, left, begin)
        left, begin = left[written:], begin + written


@contextlib.contextmanager
def _locked(file: int, how: int):
    fcntl.flock(file, how)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
