"""Values as people type them on a command line: types for argparse, and for a recipe's options."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from protoclip_jax.storage.home import at_home


def separator(text: str) -> str:
    r"""A separator of columns: a shell gives `\t` as two characters, which mean a tab."""
    return "\t" if text == "\\t" else text


def place(text: str) -> str:
    """A path, local or with a scheme; `~` is the home folder."""
    return _said(at_home, text)


def path(text: str) -> Path:
    """A local path; `~` is the home folder."""
    return Path(place(text))


def above_zero(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, 1, "above 0")


def not_negative(text: str) -> int:
    """A whole number, 0 or above."""
    return _whole(text, 0, "from 0 up")


def share(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text}: a share above 0 and up to 1 is needed")
    return value


def _whole(text: str, least: int, wanted: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text}: a whole number {wanted} is needed")
    return value


def _said(change: Callable[[str], str], text: str) -> str:
    try:
        return change(text)
    except ValueError as error:  # argparse would say its own words instead
        raise argparse.ArgumentTypeError(str(error)) from error
