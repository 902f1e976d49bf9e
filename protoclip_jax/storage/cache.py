"""Where files lie that can be made again."""

import getpass
import os
import tempfile
from pathlib import Path


def cache_folders(kind: str) -> list[Path]:
    """Folders for files of a kind, the best first: of the user, else of the machine."""
    return [*_of_user(kind), _on_machine(kind)]


def cache_folder(kind: str) -> Path:
    """The first of these folders that can be written.

    Raises:
      OSError: none can.
    """
    return _first(cache_folders(kind), "XDG_CACHE_HOME")


def machine_folder(kind: str) -> Path:
    """A folder that no other machine shares.

    Raises:
      OSError: it cannot be written.
    """
    return _first([_on_machine(kind)], "TMPDIR")


def writable(folder: Path) -> bool:
    """Makes a folder; whether files can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _first(folders: list[Path], variable: str) -> Path:
    for folder in folders:
        if writable(folder):
            return folder
    raise OSError(f"{' and '.join(map(str, folders))} cannot be written: set {variable}")


def _of_user(kind: str) -> list[Path]:
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user whom the machine does not know, and no HOME
        return []
    return [cache / "protoclip_jax" / kind]


def _on_machine(kind: str) -> Path:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container without a name for its user
        user = str(os.getuid())
    return Path(tempfile.gettempdir()) / f"protoclip_jax_{user}" / kind
