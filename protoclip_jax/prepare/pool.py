"""Worker processes over numbered blocks of rows, with one bar; they end when their parent does."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import Any

_TICK = 0.2  # seconds between two looks at the counter

Job = Callable[[Any, Callable[[], None]], Any]  # (block, tick): tick is called once a row

_job: Job | None = None  # a worker's own
_counter: Any = None


def run(job: Job, blocks: Sequence, workers: int, bar) -> Iterator[Any]:
    """Yields the result of each block as it becomes ready.

    Args:
      job: picklable; gets a block and a function to call after every row.
      blocks: what to do.
      workers: processes; with 1, all happens in this one.
      bar: of `data.bar.counted`; moves on by rows.

    Raises:
      OSError: a worker was killed.
      Exception: whatever a job raised.
    """
    workers = min(workers, len(blocks))
    if workers <= 1:
        for block in blocks:
            yield job(block, bar.update)
        return
    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _begin, (job, counter))
    try:
        waiting, told = {pool.submit(_work, block) for block in blocks}, 0
        while waiting:
            done, waiting = wait(waiting, _TICK, FIRST_COMPLETED)
            ticks = counter.value
            bar.update(ticks - told)
            told = ticks
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed, perhaps for want of memory: fewer --workers need less; "
            "the same command goes on from here"
        ) from error
    finally:
        # Waiting for blocks in work would take minutes; what they leave behind is cleaned up.
        for process in list((pool._processes or {}).values()):
            process.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(job: Job, counter) -> None:
    global _job, _counter
    _job, _counter = job, counter
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent must not leave workers that write beside those of its successor."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(block):
    return _job(block, _tick)


def _tick() -> None:
    with _counter.get_lock():
        _counter.value += 1
