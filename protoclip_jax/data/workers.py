"""What can go wrong with worker processes, in words that say what to do."""

import errno
import os
import re
import shutil

from protoclip_jax.data.seen_files import SourceError

SHARED = "/dev/shm"  # where workers hand over their batches
_REFUSED = (errno.EACCES, errno.EROFS, errno.ENOENT)
_EXIT = re.compile(r"exit code (-?\d+)")
_BUS, _KILL = "-7", "-9"


def explained(error: Exception, workers: int) -> SourceError | None:
    """The error in words for the user, where it is one of the machine; else None.

    Args:
      error: what the iterator over worker processes raised.
      workers: their number.
    """
    if not workers:
        return None
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SourceError(_no_room(workers))
    # Their semaphores are files there; an image's faults never come here.
    refused = isinstance(error, OSError) and error.errno in _REFUSED
    if refused and not os.access(SHARED, os.W_OK | os.X_OK):
        return SourceError(
            f"{SHARED} cannot be written, where worker processes hand over their batches: mount it "
            "(docker run --shm-size=2g), or set data.workers=0"
        )
    found = _EXIT.search(str(error)) if isinstance(error, RuntimeError) else None
    if found is None:
        return None
    if found[1] == _BUS:  # what a process gets that writes to a page for which there is no room
        return SourceError(_no_room(workers))
    if found[1] == _KILL:
        return SourceError(
            "a worker process was killed, perhaps for want of memory: fewer data.workers or a "
            "smaller data.keep_gigabytes need less; the same command goes on from the last "
            "checkpoint"
        )
    return SourceError(f"a worker process ended by itself ({error})")


def _no_room(workers: int) -> str:
    try:
        found = shutil.disk_usage(SHARED)
        room = f" ({found.free / 1e6:.1f} of {found.total / 1e6:.1f} MB are free)"
    except OSError:
        room = ""
    return (
        f"{SHARED} has no room{room} for the batches of {workers} worker processes: make it larger "
        "(docker run --shm-size=2g), or set data.workers=0"
    )
