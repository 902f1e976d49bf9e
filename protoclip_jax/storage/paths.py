"""Names of files and folders: local ones, and remote ones with a scheme, such as gs://bucket/run.

Remote files are read through fsspec, which finds the client of each scheme among the installed
packages; `etils.epath` gives remote folders the face of `pathlib`.
"""

import functools
import importlib.util
import logging
import os
import re
from pathlib import Path

import fsspec
from etils import epath

# A folder of a run, or a file in it.
AnyPath = Path | epath.Path

# Scheme: the module that reads it, and what installs that.
_CLIENTS = {
    "gs": ("gcsfs", "'protoclip_jax[gcs]'"),
    "s3": ("s3fs", "s3fs"),
    "az": ("adlfs", "adlfs"),
    "hf": ("huggingface_hub", "huggingface_hub"),
}
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SILENCE = 60.0  # seconds after which a connection on which nothing comes is given up


def scheme(path: str | os.PathLike) -> str:
    """What stands before ://, or nothing for a local path."""
    text = os.fspath(path)
    # Most paths have none, and a folder may be called as an address is: only the begin counts.
    found = _SCHEME.match(text) if "://" in text else None
    return found[1] if found else ""


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path has a scheme, such as gs://."""
    return bool(scheme(path))


def as_path(path: str | os.PathLike) -> AnyPath:
    """A local or remote path with the face of `pathlib`.

    Raises:
      ValueError: an unknown scheme, or the package that reads it is not installed.
    """
    text = os.fspath(path)
    if not is_remote(text):
        return Path(text)
    check_scheme(text)
    return epath.Path(text)


def workdir_at(path: str | os.PathLike) -> AnyPath:
    """The folder of a run.

    Raises:
      ValueError: as `as_path`; or checkpoints cannot be written there.
    """
    if scheme(path) not in ("", "gs"):
        check_scheme(path)
        raise ValueError(
            f"{os.fspath(path)}: checkpoints are written to gs:// or a local folder, which may be "
            "a mounted bucket"
        )
    _refuse_undecodable(path)
    return as_path(path)


def check_writable(folder: AnyPath) -> None:
    """Refuses a local folder that is none, or where none can be made; it makes nothing.

    Raises:
      ValueError: says what is in the way.
    """
    if is_remote(folder):
        return
    there = Path(absolute(folder))
    try:
        while not os.path.lexists(there):
            there = there.parent
        if not there.is_dir():
            raise ValueError(f"{folder}: {there} is no folder")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise ValueError(f"{folder}: {error.strerror}") from error
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{folder}: {there} cannot be written")


def check_scheme(path: str | os.PathLike) -> None:
    """Refuses what cannot be read here.

    Raises:
      ValueError: an unknown scheme, or the package that reads it is not installed.
    """
    text, name = os.fspath(path), scheme(path)
    if name == "file":
        raise ValueError(f"{text}: give a local path as it is, without file://")
    if name not in _CLIENTS:
        raise ValueError(f"{text}: no way to read {name}://, use gs:// or a local path")
    module, package = _CLIENTS[name]
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{text} needs a package: pip install {package}")
    _prepare_clients()


@functools.cache
def readable_schemes() -> tuple[str, ...]:
    """The schemes whose client is installed."""
    return tuple(name for name, (module, _) in _CLIENTS.items() if importlib.util.find_spec(module))


@functools.cache
def _prepare_clients() -> None:
    """Settings of all clients of this process, those that other packages make included."""
    # The same client, whether or not TensorFlow is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    settings = fsspec.config.conf.setdefault("gcs", {})
    # Kept listings would hide what other processes, and Orbax's own client, have written.
    settings.setdefault("use_listings_cache", False)
    # Failures are told by those who asked, in a line.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    try:
        import aiohttp
    except ImportError:
        return
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_SILENCE, sock_read=_SILENCE)
    settings.setdefault("requests_timeout", timeout)


def absolute(path: str | os.PathLike) -> str:
    """The path as a process started in another folder finds it."""
    return os.fspath(path) if is_remote(path) else os.path.abspath(path)


def full_path(root: str, path: str) -> str:
    """`path` below `root`, or as it is when absolute or remote."""
    return path if is_remote(path) else os.path.join(root, path)


def local_only(path: str | os.PathLike, what: str) -> Path:
    """A path to write to.

    Args:
      path: what the user gave.
      what: is written, for the message, such as "--out: shards are".

    Raises:
      ValueError: it is remote, or no UTF-8.
    """
    _refuse_undecodable(path)
    if is_remote(path):
        raise ValueError(
            f"{os.fspath(path)}: {what} written to a local folder, copy them afterwards"
        )
    return Path(path)


def _refuse_undecodable(path: str | os.PathLike) -> None:
    """Refuses a folder to write to whose name is no UTF-8, which the writing libraries cannot."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"{os.fspath(path)}: its name is not UTF-8, choose another folder"
        ) from None
