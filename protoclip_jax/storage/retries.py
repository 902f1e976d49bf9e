"""Another try after an error that may pass: the one place where remote storage is waited for.

The clients try each request a few times themselves, gcsfs for half a minute. What gets through to
here is a longer outage, or a kind of error that they do not try again.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

PATIENCE = 300.0  # seconds after which nothing is tried again
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 30.0  # seconds between two tries; doubled in between
_TELL_AGAIN = 60.0  # seconds between two lines about one outage, which many threads meet

# What will be no different next time.
_FOR_GOOD = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_FOR_GOOD += (PermissionError,)
_REFUSALS = ("Forbidden", "Credentials", "AccessDenied", "invalid_grant")
# Packages whose exceptions speak of the network. Not all of these are OSErrors.
_CLIENTS = ("aiohttp", "asyncio", "azure", "botocore", "fsspec", "gcsfs", "google", "requests")
_CLIENTS += ("huggingface_hub", "httpx", "urllib3")


class Unreachable(OSError):
    """Remote storage that gave no answer for minutes; starting again later may help."""


def retried(what: str, action: Callable[[], T]) -> T:
    """What an action returns, which is tried again after errors that may pass.

    Args:
      what: is read or written, for messages: a path.
      action: may be done several times.

    Raises:
      FileNotFoundError: there is no such object; tried once.
      Unreachable: no try succeeded; tells how many there were.
      OSError: an error that will not pass, such as a lack of permission; tried once.
    """
    start, tries = time.monotonic(), 0
    while True:
        tries += 1
        try:
            return action()
        except Exception as error:
            if not _is_storage(error):
                raise
            reason, waited = describe(error), time.monotonic() - start
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{what} does not exist") from error
            if isinstance(error, _FOR_GOOD):
                raise
            if not may_pass(error):
                raise OSError(f"{what}: {reason}") from error
            wait = min(_FIRST_WAIT * 2**tries, _LONGEST_WAIT) * random.uniform(0.5, 1)
            if waited + wait > PATIENCE:
                raise Unreachable(
                    f"{what}: {reason} (tried {tries} times in {waited:.0f} s)"
                ) from error
            _tell(f"{what}: {reason}; tried again for {PATIENCE - waited:.0f} s at most")
            time.sleep(wait)


def may_pass(error: BaseException) -> bool:
    """Whether a later try may succeed: the storage was busy, slow, or not to be reached."""
    if isinstance(error, _FOR_GOOD) or not _is_storage(error):
        return False
    code = _status(error)
    if code is not None:
        return code in (408, 429) or code >= 500
    # gcsfs turns the status 403 into a plain OSError; bad credentials do not get better.
    text = f"{type(error).__name__}: {error}"
    return not any(word in text for word in _REFUSALS)


def describe(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).strip() or "no answer").splitlines()[0]
    code = _status(error)
    kind = type(error).__name__ if code is None else f"{type(error).__name__} {code}"
    return f"{kind}: {first}"[:300]


def _is_storage(error: BaseException) -> bool:
    """Whether an error is about the storage, and no fault in a program."""
    return isinstance(error, OSError) or any(
        kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status, by the names that clients give it."""
    response = getattr(error, "response", None)  # botocore's is a dict, those of others objects
    if isinstance(response, dict):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for found in (getattr(error, "code", None), getattr(error, "status", None), response):
        found = getattr(found, "status_code", found)
        if isinstance(found, int) or (isinstance(found, str) and found.isdecimal()):
            return int(found)
    return None


_told_at, _telling = float("-inf"), threading.Lock()


def _tell(text: str) -> None:
    global _told_at
    with _telling:
        if time.monotonic() - _told_at < _TELL_AGAIN:
            return
        _told_at = time.monotonic()
    logger.warning(text)
