"""Remote files: read, measured, listed and written, each with retries.

A remote file is one object, which is there whole or not at all.
"""

import dataclasses
import fnmatch
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec

from protoclip_jax.storage.paths import AnyPath, check_scheme, is_remote, scheme
from protoclip_jax.storage.retries import retried

_WINDOW = 2**22  # bytes fetched at a time where a file is read from first to last
_AT_A_TIME = 16  # requests under way at once


@dataclasses.dataclass(frozen=True)
class Status:
    """What tells an object from another under the same name.

    Attributes:
      size: bytes.
      version: its generation, hash or time, whatever the storage has.
    """

    size: int
    version: str


def read(path: str, start: int | None = None, length: int | None = None) -> bytes:
    """The content of an object, or so many bytes from a place on: fewer at its end.

    Raises:
      FileNotFoundError: there is none.
      Unreachable: no answer for minutes.
      OSError: it cannot be read.
    """
    files = _files(path)
    if start is None:
        return retried(path, lambda: files.cat_file(path))
    return retried(path, lambda: _range(files, path, start, start + length))


def status(path: str) -> Status:
    """Size and version of an object.

    Raises:
      As `read`.
    """
    found = retried(path, lambda: _files(path).info(path))
    if found.get("type") == "directory":
        raise FileNotFoundError(f"{path} is a folder, and no file")
    return _status(found)


def statuses(paths: Sequence[str]) -> list[Status]:
    """Size and version of many objects.

    Raises:
      As `read`.
    """
    folders = {path.rpartition("/")[0] for path in paths}
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        if len(folders) * _AT_A_TIME > len(paths):
            return list(pool.map(status, paths))
        # A listing tells of a thousand objects at once.
        listed = dict(zip(folders, pool.map(listing, folders), strict=True))
    found = []
    for path in paths:
        folder, _, name = path.rpartition("/")
        if name not in listed[folder]:
            raise FileNotFoundError(f"{path} does not exist")
        found.append(listed[folder][name])
    return found


def exists(path: str) -> bool:
    """Whether there is an object, or a folder with objects.

    Raises:
      As `read`, but for FileNotFoundError.
    """
    try:
        retried(path, lambda: _files(path).info(path))
    except FileNotFoundError:
        return False
    return True


def listing(folder: str, pattern: str = "*") -> dict[str, Status]:
    """The objects right below a folder by name, sorted; empty where there is no such folder.

    Raises:
      As `read`, but for FileNotFoundError.
    """
    by_name = {name: entry for name, entry in _entries(folder) if entry["type"] == "file"}
    return {
        name: _status(by_name[name]) for name in sorted(by_name) if fnmatch.fnmatch(name, pattern)
    }


def folders(folder: str) -> list[str]:
    """Names of the folders right below a folder, sorted; none where there is no such folder.

    Raises:
      As `read`, but for FileNotFoundError.
    """
    return sorted(name for name, entry in _entries(folder) if entry["type"] == "directory")


def make_folder(path: AnyPath) -> None:
    """Makes a local folder. Remote ones need no making, only their bucket.

    Raises:
      Unreachable: no answer for minutes.
      OSError: it cannot be made; there is no such bucket.
    """
    if not is_remote(path):
        Path(path).mkdir(parents=True, exist_ok=True)
        return
    bucket = "/".join(str(path).split("/")[:3])
    if not exists(bucket):
        raise FileNotFoundError(f"there is no {bucket}, or it may not be read")


def write(path: str, content: bytes) -> None:
    """Writes an object, in place of one that may be there.

    Raises:
      Unreachable: no answer for minutes.
      OSError: it cannot be written.
    """
    retried(path, lambda: _files(path).pipe_file(path, content))


def remove(path: AnyPath) -> None:
    """Removes a local or remote file.

    Raises:
      FileNotFoundError: there is none.
      Unreachable: no answer for minutes.
      OSError: it cannot be removed.
    """
    if is_remote(path):
        retried(str(path), lambda: _files(str(path)).rm_file(str(path)))
    else:
        Path(path).unlink()


def download(path: str, target: Path, expected: Status) -> None:
    """Copies an object to a local file, a part at a time.

    Args:
      path: of the object.
      target: the file to write.
      expected: what the object was like when it was asked for.

    Raises:
      As `read`.
      OSError: it changed meanwhile, or the file cannot be written.
    """
    with open(target, "wb") as file:
        for start in range(0, expected.size, 8 * _WINDOW):
            file.write(read(path, start, min(8 * _WINDOW, expected.size - start)))
    if status(path) != expected or target.stat().st_size != expected.size:
        raise OSError(f"{path} changed while it was read: start again")


class Windows:
    """Reads an object from first to last in few requests, though in small pieces."""

    def __init__(self, path: str, window: int = _WINDOW):
        """Args:
        path: of the object.
        window: bytes of a request, if no more are asked for.
        """
        self._path, self._window = path, window
        self._start, self._held = 0, b""

    def __call__(self, start: int, length: int) -> bytes:
        """So many bytes from a place on; fewer at the end.

        Raises:
          As `read`.
        """
        first = start - self._start
        if not 0 <= first <= first + length <= len(self._held):
            self._start, first = start, 0
            self._held = read(self._path, start, max(length, self._window))
        return self._held[first : first + length]


def _files(path: str) -> fsspec.AbstractFileSystem:
    check_scheme(path)
    return fsspec.filesystem(scheme(path))


def _range(files: fsspec.AbstractFileSystem, path: str, start: int, end: int) -> bytes:
    if start == end:
        return b""
    try:
        return files.cat_file(path, start, end)
    except Exception as error:
        # "Range not satisfiable": the object ends before.
        if getattr(error, "code", None) == 416 or "not satisfiable" in str(error):
            return b""
        raise


def _entries(folder: str) -> list[tuple[str, dict]]:
    """What is right below a folder, by name."""
    files, path = _files(folder), folder.rstrip("/")
    try:
        found = retried(folder, lambda: files.ls(path, detail=True))
    except FileNotFoundError:
        return []
    names = [entry["name"].rstrip("/") for entry in found]
    # A folder's own mark, which some tools write, is no part of it.
    return [
        (os.path.basename(name), entry)
        for name, entry in zip(names, found, strict=True)
        if not path.endswith(name)
    ]


def _status(entry: dict) -> Status:
    keys = ("generation", "etag", "ETag", "md5Hash", "LastModified", "mtime")
    version = next((entry[key] for key in keys if entry.get(key)), "")
    return Status(int(entry["size"]), str(version))


def read_text(path: str | os.PathLike) -> str:
    """The text of a local or remote file.

    Raises:
      FileNotFoundError: there is none.
      OSError: it cannot be read.
    """
    if is_remote(path):
        return read(os.fspath(path)).decode()
    return Path(path).read_text(encoding="utf-8")


def is_file(path: str | os.PathLike) -> bool:
    """Whether there is a local or remote file."""
    return exists(os.fspath(path)) if is_remote(path) else os.path.exists(path)
