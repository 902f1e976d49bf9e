"""Local copies of remote files, for what has to be mapped: lists and teachers.

A copy is named by the object's path, size and version, so that it belongs to one object, and is
shared by all processes of a host and by later runs. It is made whole or not at all. When a new one
is made, those of other versions of the path, and those that nobody asked for in a month, are
removed, but for those that a process still uses.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path
from typing import BinaryIO

from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import PART, part_of, settle
from protoclip_jax.storage.cache import cache_folder
from protoclip_jax.storage.paths import is_remote

_LARGE = 100e6  # bytes from which on a copy is announced
_UNUSED = 30 * 86400.0  # seconds after which a copy is removed
_LEFT = 86400.0  # and a part of one, which a killed process left

_in_use: dict[Path, BinaryIO] = {}  # copies of this process, with the lock that says so


def local_copy(path: str | os.PathLike) -> str:
    """Absolute path of a local file, or of a copy of a remote one.

    Raises:
      FileNotFoundError: there is no such remote file.
      OSError: it cannot be read, or there is no room for it.
    """
    if not is_remote(path):
        return os.path.abspath(path)
    text = os.fspath(path)
    status, folder = objects.status(text), cache_folder("copies")
    version = hashlib.blake2b(f"{status.size} {status.version}".encode(), digest_size=8)
    stem = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    copy = folder / f"{stem}-{version.hexdigest()}-{os.path.basename(text)}"
    while not _taken(copy):
        _make(text, status, copy)
        _clear(folder, stem, copy)
    return str(copy)


def _taken(copy: Path) -> bool:
    """Takes a copy in use until this process ends; False where there is none."""
    if copy in _in_use and copy.exists():
        return True
    try:
        file = open(copy, "rb")  # noqa: SIM115
    except FileNotFoundError:
        return False
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)
    if not copy.exists():  # removed before it was locked
        file.close()
        return False
    os.utime(copy)  # it was asked for today
    _in_use[copy] = file
    return True


def _make(path: str, status: objects.Status, copy: Path) -> None:
    if status.size > _LARGE:
        print(f"copies {path} ({status.size / 1e9:.1f} GB) to {copy}", file=sys.stderr)
    free = shutil.disk_usage(copy.parent).free
    if status.size > free:
        raise OSError(
            f"{path} has {status.size / 1e9:.1f} GB and {copy.parent} room for {free / 1e9:.1f}: "
            "make room, or set XDG_CACHE_HOME to a folder with more"
        )
    part = part_of(copy)
    try:
        objects.download(path, part, status)
        settle(part, copy)
    finally:
        part.unlink(missing_ok=True)


def _clear(folder: Path, stem: str, kept: Path) -> None:
    """Removes other versions of a path, what is long unused, and what killed processes left."""
    now = time.time()
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process removes it too, or uses it
            age = now - path.stat().st_mtime
            if path.suffix == PART:
                old = age > _LEFT
            else:
                old = path.name.startswith(f"{stem}-") or age > _UNUSED
            if old and path != kept:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
