"""Compiled programs stay on disk: a run that starts again does not wait for the compiler."""

import hashlib
import os
import stat
from pathlib import Path

import jax

from protoclip_jax.storage.cache import cache_folders, writable


def turn_on() -> None:
    """Keeps compiled programs in `default_folder`, unless JAX_COMPILATION_CACHE_DIR names another.

    Called before anything is compiled. Where no folder can be written, programs are compiled at
    every start.
    """
    if jax.config.jax_compilation_cache_dir is None:
        folder = default_folder()
        jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))


def default_folder() -> Path | None:
    """A folder in the user's cache, of its own for each kind of CPU; without a home, in TMPDIR.

    Programs for a CPU hold its instructions, and home folders are often shared by many machines.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(flags.encode()).hexdigest()[:8]
    try:
        folders = cache_folders(f"compiled-{kind}")
    except OSError:  # no home, nor any folder for temporary files
        return None
    return next((folder for folder in folders if writable(folder) and _ours(folder)), None)


def _ours(folder: Path) -> bool:
    """Whether nobody else can put a program there, which would be run."""
    found = folder.stat()
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
