"""Paths and file contents: the one place that touches the file system for pictures.

A path with a scheme, such as gs://bucket/pairs.tsv, is opened through `etils.epath`.
"""

import atexit
import os
import shutil
import stat
import tempfile
from pathlib import Path

from etils import epath

from protoclip_jax.data.decoding import (
    EMPTY,
    MISSING,
    NO_ACCESS,
    NOT_A_FILE,
    TOO_LARGE,
    UnreadableImage,
)

MAX_BYTES = 256 * 2**20  # of a picture's file


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path has a scheme, such as gs://."""
    return "://" in os.fspath(path)


def local_folder(path: str | os.PathLike) -> Path:
    """A folder to write to.

    Raises:
      ValueError: it is remote.
    """
    if is_remote(path):
        raise ValueError(
            f"--out {path}: shards are written to a local folder, copy them afterwards"
        )
    return Path(path)


def absolute(path: str | os.PathLike) -> str:
    """The path as a process started in another folder finds it."""
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def full_path(root: str, path: str) -> str:
    """`path` below `root`, or as it is when absolute or remote."""
    return path if is_remote(path) else os.path.join(root, path)


def remote_path(path: str) -> epath.Path:
    """A remote file or folder.

    Raises:
      ValueError: an unknown scheme, or the package that reads it is not installed.
    """
    try:
        remote = epath.Path(path)
        remote.exists()  # the package is looked for at the first access
    except ImportError as error:
        package = "gcsfs" if path.startswith("gs://") else "for it"
        raise ValueError(f"{path} needs a package: pip install {package} ({error})") from error
    except (KeyError, NotImplementedError) as error:
        scheme = path.partition("://")[0]
        raise ValueError(
            f"{path}: no way to read {scheme}://, use gs:// or a local path"
        ) from error
    return remote


def local_copy(path: str | os.PathLike) -> str:
    """Absolute path of a local file, or of a copy of a remote one that lasts as long as we do."""
    if not is_remote(path):
        return os.path.abspath(path)
    with (
        remote_path(os.fspath(path)).open("rb") as remote,
        tempfile.NamedTemporaryFile(
            prefix="protoclip_", suffix=os.path.basename(path), delete=False
        ) as copy,
    ):
        atexit.register(_remove, copy.name, os.getpid())
        shutil.copyfileobj(remote, copy, 2**24)
    return copy.name


def _remove(path: str, owner: int) -> None:
    if os.getpid() == owner and os.path.exists(path):
        os.unlink(path)


def read_picture(path: str) -> bytes:
    """The content of a picture's file.

    Raises:
      UnreadableImage: it is missing, empty, not a regular file, too large or not to be opened.
    """
    if "\0" in path:
        raise UnreadableImage(MISSING, "a zero byte in the path")
    if is_remote(path):
        return _read_remote(path)
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


def _read_remote(path: str) -> bytes:
    try:
        data = epath.Path(path).read_bytes()
    except FileNotFoundError as error:
        raise UnreadableImage(MISSING) from error
    except IsADirectoryError as error:
        raise UnreadableImage(NOT_A_FILE, "a folder") from error
    except OSError as error:
        raise UnreadableImage(NO_ACCESS, str(error)) from error
    if len(data) > MAX_BYTES:
        raise UnreadableImage(TOO_LARGE, f"{len(data)} bytes")
    if not data:
        raise UnreadableImage(EMPTY)
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe would wait for a writer for ever. Elsewhere than on Unix the flag is missing.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
