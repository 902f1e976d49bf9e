"""The iterator over a run's batches: threads of this process, or grain's worker processes.

With `size` positions and a batch of `batch`, training takes `size // batch` steps on every process
and leaves the tail out; extraction pads the last batch (`valid` says what is real) and covers each
position exactly once. Example: 13 rows, batch 4, two processes: both train 3 steps, both extract 4
batches, of which the last holds position 12 on the first process and nothing on the second.
"""

import contextlib
import dataclasses
import gc
import multiprocessing
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from multiprocessing import resource_tracker

import grain
import numpy as np
from absl import flags

from protoclip_jax import signals
from protoclip_jax.data.reader import BatchReader, Reading
from protoclip_jax.data.unreadable import UnreadableLog
from protoclip_jax.data.walk import Walk
from protoclip_jax.data.workers import explained

_QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"


class Batches(Iterator[dict]):
    """Batches in the order of a walk. Close it, or use it in a `with`, when leaving early.

    Each batch is a dict: image uint8 (b, s, s, 3), tokens int32 (b, t), position int64 (b,),
    episode int, kind int (see `walk.PASSES`), valid bool (b,), row int64 (b,) (the pair really
    used; -1 for padding), with b = batch / process_count. A pair that cannot be read is replaced by
    another whole pair, the first readable one of a sequence drawn from (seed, episode, position):
    the same in both passes and on any number of workers.

    Attributes:
      unreadable: what was skipped so far.
      roomless: pictures that found no room in the budget, so that they are read twice.
    """

    def __init__(
        self,
        walk: Walk,
        reading: Reading,
        *,
        workers: int = 0,
        threads: int = 8,
        unreadable: UnreadableLog | None = None,
    ):
        """Starts reading.

        Args:
          walk: which batches; made for the same number of workers.
          reading: how they are made; its budget of kept pictures is that of all workers together.
          workers: worker processes, which live until the end; 0 = threads of this process.
          threads: decoding threads where there are no workers.
          unreadable: where to count skipped pairs; none = a new log.
        """
        share = dataclasses.replace(reading.keep, budget=reading.keep.budget // max(1, workers))
        reader = BatchReader(
            walk, dataclasses.replace(reading, keep=share), 1 if workers else threads
        )
        self._left = walk.batches
        self._running = _Running(reader, workers if self._left else 0)
        self.unreadable = UnreadableLog(reading.source) if unreadable is None else unreadable
        self.roomless = 0
        # Also at the interpreter's end, where workers that are still alive would complain.
        self._end = weakref.finalize(self, self._running.close)

    def __len__(self) -> int:
        """Batches still to come."""
        return self._left

    def __next__(self) -> dict:
        if not self._left:
            self.close()
            raise StopIteration
        batch = self._running.next()
        while not batch:  # a number that stands for nothing
            batch = self._running.next()
        # Workers send arrays in shared memory, which must not outlive them.
        batch = {key: _own(value) for key, value in batch.items()}
        self._left -= 1
        self.unreadable.add(batch.pop("unreadable"))
        self.roomless += batch.pop("roomless")
        return batch

    def close(self) -> None:
        """Ends threads and worker processes; no batch follows."""
        self._left = 0
        self._end()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _Running:
    """What has to be ended: grain's iterator and the reader's threads."""

    def __init__(self, reader: BatchReader, workers: int):
        self._reader, self._workers = reader, workers
        with self._explained():
            self._iterator = iter(_dataset(reader, workers))
        self._started = not workers

    def next(self) -> dict:
        with self._explained():
            if not self._started:
                self._started = True
                return _with_signals_blocked(self._iterator.__next__)
            return next(self._iterator)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError) as error:
            plain = explained(error, self._workers)
            if plain is None:
                raise
            raise plain from error

    def close(self) -> None:
        self._iterator.close()
        self._iterator = None  # grain's own finaliser fails at the interpreter's end
        self._reader.close()
        if self._workers:
            gc.collect()  # a cycle in grain's iterator holds the last batch's shared memory


def _own(value: np.ndarray | int) -> np.ndarray | int:
    shared = isinstance(value, np.ndarray) and type(value) is not np.ndarray
    return np.array(value) if shared else value


def _dataset(reader: BatchReader, workers: int) -> grain.IterDataset:
    batches_by_number = grain.MapDataset.source(reader)
    if not workers:
        # Two batches at a time, so that the decoding threads have work across the border.
        return batches_by_number.to_iter_dataset(grain.ReadOptions(2, 2))
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain's workers look at them, and this may be a library
    return batches_by_number.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2), _start_worker
    )


def _with_signals_blocked(first: Callable[[], dict]) -> dict:
    """What `first` gives, which starts the worker processes from threads of its own.

    They inherit the blocked signals: between a worker's start and its own first line there are
    seconds of imports, in which Ctrl-C would end it, and the run with it.
    """
    # What killed workers leave is removed by a process of Python's, without a word to the user.
    if _QUIET not in sys.warnoptions:
        sys.warnoptions.append(_QUIET)  # handed on to that process
    resource_tracker.ensure_running()  # which unblocks the signals when it starts
    future: Future[dict] = Future()

    def start() -> None:
        try:
            future.set_result(first())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=start, name="first batch", daemon=True)
    with signals.blocked():
        thread.start()
    return future.result()  # which a signal interrupts


def _start_worker(index: int, count: int) -> None:
    """In a worker: Ctrl-C and a scheduler's signal reach the whole group, and the run decides.

    It may still need the batch that this worker makes, before it saves and leaves. When the run is
    killed, nobody else would end its workers.
    """
    signals.ignore()
    parent = multiprocessing.parent_process().pid  # it may be gone already
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process within a second of its parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
