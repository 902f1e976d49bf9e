"""Another try after a local read that failed: where disks and network mounts are waited for.

Buckets are waited for in `retries`, and longer.
"""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

_NAMES = (
    "EIO",
    "EREMOTEIO",
    "ETIMEDOUT",
    "ETIME",
    "ESTALE",
    "EAGAIN",
    "EINTR",
    "EBUSY",
    "ECONNRESET",
    "ECONNABORTED",
    "ECONNREFUSED",
    "ENOTCONN",
    "EPIPE",
    "ENETDOWN",
    "ENETUNREACH",
    "ENETRESET",
    "EHOSTDOWN",
    "EHOSTUNREACH",
    "EMFILE",
    "ENFILE",
    "ENOBUFS",
)
# What may pass by itself; a missing file or a forbidden one does not come back.
PASSING = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
_WAITS = (0.1, 0.3, 0.9, 2.7)  # seconds before each further try

T = TypeVar("T")


def patient(read: Callable[[], T]) -> T:
    """What `read` gives, which is tried again a few times where a fault may pass.

    Raises:
      OSError: the fault did not pass, or is none that does.
    """
    for wait in _WAITS:
        try:
            return read()
        except OSError as error:
            passing = isinstance(error, TimeoutError | ConnectionError)
            if not passing and error.errno not in PASSING:
                raise
        time.sleep(wait)
    return read()
