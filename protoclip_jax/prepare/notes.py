"""Notes that a command left in its folder for the next run, which may be damaged by then."""

import json
from collections.abc import Iterable
from pathlib import Path


def read_note(path: Path, keys: Iterable[str]) -> dict | None:
    """A note's content; None where it is no JSON object or lacks one of the keys."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    whole = isinstance(content, dict) and all(key in content for key in keys)
    return content if whole else None


def begun_with(path: Path, keys: Iterable[str]) -> dict:
    """What a folder was begun with.

    Raises:
      ValueError: the note is damaged; says what to do.
    """
    content = read_note(path, keys)
    if content is None:
        raise ValueError(
            f"{path} is damaged, and nothing else says what was begun there: restore it, or choose "
            "another --out"
        )
    return content
