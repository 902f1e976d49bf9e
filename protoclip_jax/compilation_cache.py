"""Compiled programs stay on disk: a run that starts again does not wait for the compiler."""

import hashlib
import os
from pathlib import Path

import jax


def turn_on() -> None:
    """Keeps compiled programs in `default_folder`, unless JAX_COMPILATION_CACHE_DIR names another.

    Called before anything is compiled. A folder that cannot be written costs a warning of JAX's
    and nothing else.
    """
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(default_folder()))


def default_folder() -> Path:
    """A folder in the user's cache, of its own for each kind of CPU.

    Programs for a CPU hold its instructions, and home folders are often shared by many machines.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    kind = hashlib.sha256(flags.encode()).hexdigest()[:8]
    return Path(root) / "protoclip_jax" / f"compiled-{kind}"
