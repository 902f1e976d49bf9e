"""Paths as people type them: `~` is the home folder."""

import os


def at_home(path: str) -> str:
    """The path with a leading `~` or `~name` replaced by that home folder.

    A shell does so only at the beginning of a word: in `--workdir=~/runs` it does not.

    Raises:
      ValueError: there is no such home folder, nor a file or folder of that very name.
    """
    full = os.path.expanduser(path)
    if full.startswith("~") and not os.path.exists(full):
        raise ValueError(f"{path}: there is no home folder {path.partition('/')[0]}: write it out")
    return full
