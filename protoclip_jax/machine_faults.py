"""Faults of the machine in one line that names the place and the way out."""

import errno
import os
import resource

FEWEST = 256  # open files with which a run works; one with a worker has 70 open
_WANTED = 65536

_WAYS_OUT = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or ask for a larger quota",
    errno.EFBIG: "raise the limit on a file's size (ulimit -f)",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "give this user the right to do that",
    errno.EIO: "mend the disk or its network",
    errno.ESTALE: "mount the network folder anew",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close files that other programs have open",
    errno.ENOMEM: "free memory",
}


def told(error: BaseException) -> str | None:
    """A line for an error of the system that a person can do something about; else None."""
    if not isinstance(error, OSError) or error.errno not in _WAYS_OUT:
        return None
    place = f"{error.filename}: " if error.filename else ""
    return (
        f"{place}{os.strerror(error.errno)}: {_WAYS_OUT[error.errno]}, then the same command goes "
        "on from the last checkpoint"
    )


def raise_open_files() -> str | None:
    """Raises this process's limit on open files as far as it may; a line if that is too low."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = _WANTED if hard == unlimited else min(hard, _WANTED)
    if soft != unlimited and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    if soft == unlimited or soft >= FEWEST:
        return None
    return (
        f"this process may open {soft} files only, and needs {FEWEST}: raise the limit "
        f"(ulimit -n {_WANTED // 16}; in containers --ulimit nofile={_WANTED // 16})"
    )
