"""Files that are there whole or not at all, also after a kill or a power cut."""

import contextlib
import errno
import json
import os
import secrets
from pathlib import Path

from protoclip_jax.storage import objects
from protoclip_jax.storage.paths import AnyPath, is_remote

# What network and FUSE file systems answer that have no fsync, or none for folders.
_NO_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)
PART = ".part"  # ends the names of files that are not whole
_OWN = secrets.token_hex(4)  # hosts that share a folder may have equal process ids, as pods do


def part_of(path: Path) -> Path:
    """Where the content of `path` is written before it is whole; this process's own."""
    return path.with_name(f"{path.name}.{os.getpid()}-{_OWN}{PART}")


def settle(part: Path, path: Path) -> None:
    """Gives a finished part its name, once its content is on the disk."""
    with open(part, "rb+") as file:
        _flush(file.fileno())
    os.replace(part, path)
    with contextlib.suppress(PermissionError):  # a folder that may be written and not be listed
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            _flush(folder)
        finally:
            os.close(folder)


def _flush(file: int) -> None:
    """Waits until a file or folder is on the disk, where the file system can tell."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def write_text(path: AnyPath, text: str) -> None:
    """Writes a local or remote file at once."""
    if is_remote(path):
        objects.write(str(path), text.encode())
        return
    part = part_of(path)
    try:
        part.write_text(text, encoding="utf-8")
        settle(part, path)
    except OSError as error:  # a write's error does not name the file
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, os.fspath(path)) from error


def write_json(path: AnyPath, content) -> None:
    """Writes JSON at once, to a local or remote file."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a name that is no UTF-8: JSON's escapes keep it
        text = json.dumps(content, indent=1)
    write_text(path, text + "\n")


def clear_parts(folder: Path) -> int:
    """Removes what killed processes left; returns how many files."""
    parts = list(folder.glob(f"*{PART}"))
    for part in parts:
        part.unlink(missing_ok=True)
    return len(parts)
