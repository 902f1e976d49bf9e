"""One process at a time in a folder."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

LOCK = ".lock"  # the file's name


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process however it ends.

    Raises:
      ValueError: another process holds it.
    """
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another process works in {folder}: wait for it") from error
        yield
