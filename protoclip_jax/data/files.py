"""Paths and file contents: the one place that touches the file system for pictures."""

import os
import stat

from protoclip_jax.data.decoding import (
    EMPTY,
    MISSING,
    NO_ACCESS,
    NOT_A_FILE,
    TOO_LARGE,
    UnreadableImage,
)

MAX_BYTES = 256 * 2**20  # of a picture's file


def full_path(root: str, path: str) -> str:
    """`path` below `root`, or as it is when absolute."""
    return os.path.join(root, path)


def read_picture(path: str) -> bytes:
    """The content of a picture's file.

    Raises:
      UnreadableImage: it is missing, empty, not a regular file, too large or not to be opened.
    """
    if "\0" in path:
        raise UnreadableImage(MISSING, "a zero byte in the path")
    try:
        with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage(NOT_A_FILE)
            if status.st_size > MAX_BYTES:
                raise UnreadableImage(TOO_LARGE, f"{status.st_size} bytes")
            data = file.readall()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnreadableImage(MISSING) from error
    except IsADirectoryError as error:
        raise UnreadableImage(NOT_A_FILE, "a folder") from error
    except OSError as error:
        raise UnreadableImage(NO_ACCESS, str(error)) from error
    if not data:
        raise UnreadableImage(EMPTY)
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe would wait for a writer for ever. Elsewhere than on Unix the flag is missing.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
