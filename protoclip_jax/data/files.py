"""The content of a picture's file, local or remote."""

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
from protoclip_jax.storage import objects
from protoclip_jax.storage.disks import patient
from protoclip_jax.storage.paths import is_remote
from protoclip_jax.storage.retries import Unreachable

MAX_BYTES = 256 * 2**20  # of a picture's file


def read_picture(path: str) -> bytes:
    """The content of a picture's file.

    Raises:
      UnreadableImage: it is missing, empty, not a regular file, too large or not to be opened.
      Unreachable: remote storage gave no answer for minutes, which says nothing of the picture.
    """
    if "\0" in path:
        raise UnreadableImage(MISSING, "a zero byte in the path")
    if is_remote(path):
        return _read_remote(path)
    try:
        data = patient(lambda: _read_local(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnreadableImage(MISSING) from error
    except IsADirectoryError as error:
        raise UnreadableImage(NOT_A_FILE, "a folder") from error
    except OSError as error:
        raise UnreadableImage(NO_ACCESS, str(error)) from error
    if not data:
        raise UnreadableImage(EMPTY)
    return data


def _read_local(path: str) -> bytes:
    with open(path, "rb", buffering=0, opener=_open_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage(NOT_A_FILE)
        if status.st_size > MAX_BYTES:
            raise UnreadableImage(TOO_LARGE, f"{status.st_size} bytes")
        return file.readall()


def _read_remote(path: str) -> bytes:
    try:
        data = objects.read(path, 0, MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise UnreadableImage(MISSING) from error
    except IsADirectoryError as error:
        raise UnreadableImage(NOT_A_FILE, "a folder") from error
    except Unreachable:
        raise
    except OSError as error:
        raise UnreadableImage(NO_ACCESS, str(error)) from error
    if len(data) > MAX_BYTES:
        raise UnreadableImage(TOO_LARGE, f"more than {MAX_BYTES} bytes")
    if not data:
        raise UnreadableImage(EMPTY)
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe would wait for a writer for ever. Elsewhere than on Unix the flag is missing.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
