"""Files as a run first saw them, so that one which is written anew under the run is noticed.

What counts is a file's size and modification time; of an object in a bucket, its size and version.
Where only the time differs (a `touch`, a copy of the same content put in its place), whoever opened
the file compares its content: if that is equal, the run goes on.
"""

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from protoclip_jax.storage import objects
from protoclip_jax.storage.disks import patient
from protoclip_jax.storage.paths import is_remote
from protoclip_jax.storage.retries import Unreachable

State = tuple[int, int | str]  # bytes, and the time in nanoseconds, or a remote one's version
T = TypeVar("T")

_REMOTE_SECONDS = 600.0  # between two looks at a remote file, each of which is a request
_ADVICE = "restore it, and the same command goes on where it was"


class SourceError(OSError):
    """The pairs of a run can no longer be read; the message is one line for the user."""


class SourceChanged(SourceError):
    """A file of the pairs is another one than at the start of the run."""


def states_of(paths: Sequence[str]) -> list[State]:
    """Size and time of files, local or all of them remote.

    Raises:
      OSError: there is no such file, it is a pipe or a device, or it cannot be reached.
    """
    if paths and is_remote(paths[0]):
        return [(found.size, found.version) for found in objects.statuses(paths)]
    return [_state(path) for path in paths]


def _state(path: str) -> State:
    found = patient(lambda: os.stat(path))
    if not stat.S_ISREG(found.st_mode):  # a named pipe would be waited for, for ever
        raise OSError(errno.EINVAL, "this is no regular file", path)
    return found.st_size, found.st_mtime_ns


class SeenFiles:
    """What files were when the run looked at them; picklable, so that workers know it too.

    A worker opens its files later than the process that started it: only what that process saw can
    tell whether they are still the same.
    """

    def __init__(self, states: Mapping[str, State]):
        """Takes what was seen, by path."""
        self._states = dict(states)
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._looked: dict[str, float] = {}  # when a remote file was looked at

    def __getstate__(self):
        return self._states

    def __setstate__(self, states):
        self._states = states
        self._start()

    @classmethod
    def now(cls, paths: Sequence[str]) -> "SeenFiles":
        """Looks at files.

        Raises:
          OSError: one of them is missing, or cannot be reached.
        """
        return cls(dict(zip(paths, states_of(paths), strict=True)))

    def size(self, path: str) -> int:
        """Bytes of a file when it was looked at."""
        return self._states[path][0]

    def check(self, path: str, same: Callable[[], bool], *, at_once: bool = False) -> None:
        """Compares a file with what it was; call it after each read, before the data is used.

        A remote file is looked at when it is first read, and again after ten minutes.

        Args:
          path: one of the files.
          same: whether the content is what it was; asked only where nothing but the time differs.
          at_once: look at a remote file now, since its read failed.

        Raises:
          SourceChanged: it is another one, or gone; says what differs.
          SourceError: it cannot be reached.
          Unreachable: a remote one, for minutes.
        """
        if at_once or not is_remote(path):
            self._compare(path, same)
        elif time.monotonic() - self._looked.get(path, float("-inf")) > _REMOTE_SECONDS:
            self._compare(path, same)
            self._looked[path] = time.monotonic()

    def _compare(self, path: str, same: Callable[[], bool]) -> None:
        found = self._found(path)
        if found == self._states[path]:
            return
        with self._lock:  # one comparison is enough for all threads
            before = self._states[path]
            if found == before:
                return
            # Changed again while it was compared: then it is being written.
            if found[0] != before[0] or not _told(path, same) or self._found(path) != found:
                raise SourceChanged(_changed(path, before, found))
            self._states[path] = found

    def _found(self, path: str) -> State:
        return _told(path, lambda: states_of([path])[0])


def _told(path: str, look: Callable[[], T]) -> T:
    """What a look at a file gives; where it fails, an error that says so in a line."""
    try:
        return look()
    except (SourceError, Unreachable):
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SourceChanged(f"{path} is no longer there: {_ADVICE}") from error
    except OSError as error:
        raise unreachable(path, error) from error


def unreachable(path: str, error: OSError) -> SourceError:
    """The error of a file that is there but does not give its content."""
    return SourceError(f"{path} can no longer be read ({error.strerror or error}): {_ADVICE}")


def _changed(path: str, before: State, found: State) -> str:
    if found[0] != before[0]:
        what = f"{found[0]} bytes, before {before[0]}"
    else:
        what = "other content of the same size"
    return (
        f"{path} has changed under the run ({what}; {_version(found)}, before {_version(before)}): "
        f"{_ADVICE}"
    )


def _version(state: State) -> str:
    if isinstance(state[1], str):
        return f"version {state[1]}"
    written = time.localtime(state[1] // 10**9)
    return f"written {time.strftime('%Y-%m-%d %H:%M:%S', written)}"
