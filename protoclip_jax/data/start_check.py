"""A look at a source before anything expensive starts."""

import collections
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from protoclip_jax.data.decoding import MISSING, UnreadableImage, load
from protoclip_jax.data.sources import PairSource, read_pair, where

_FEWEST = 8  # captions of which most can be said to be equal


def check_start(
    source: PairSource, sample: int = 64, limit: float = 0.5, *, parity: bool = False
) -> float:
    """Reads a few pictures spread over the source, before anything expensive starts.

    Returns:
      The share that cannot be read.

    Raises:
      ValueError: it is larger than `limit`, or nothing can be read; with examples.
    """
    rows = _spread(source, sample)
    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(functools.partial(_fault, source, parity), rows))
    bad = [(row, error) for row, error in zip(rows, errors, strict=True) if error]
    if not bad:
        return 0.0
    if all(error is not None and error.reason == MISSING for error in errors):
        first = where(source, rows[0])
        advice = "set image_root to the folder where relative paths start"
        if first.endswith('"'):
            advice = "its quotes belong to the name where tabs separate: take them out of the list"
        raise ValueError(
            f"none of the {len(rows)} pictures tried exists, the first is {first}: {advice}"
        )
    share = len(bad) / len(rows)
    if share > limit or len(bad) == len(rows):
        examples = "; ".join(f"{where(source, row)} ({error})" for row, error in bad[:3])
        raise ValueError(
            f"{len(bad)} of {len(rows)} pictures tried cannot be read, more than the allowed "
            f"share of {limit:g} (max_unreadable): {examples}"
        )
    return share


def equal_captions(source: PairSource, sample: int = 64) -> str | None:
    """A line where most captions are one and the same text, such as None; looks at a few."""
    if not hasattr(source, "caption"):
        return None
    rows = _spread(source, sample)
    with ThreadPoolExecutor(8) as pool:
        captions = [text.strip() for text in pool.map(functools.partial(_caption, source), rows)]
    if len(rows) < _FEWEST or not any(captions):
        return None
    ((text, count),) = collections.Counter(filter(None, captions)).most_common(1)
    if count <= len(rows) / 2:
        return None
    return (
        f"warning: {count} of {len(rows)} captions looked at are {text[:60]!r}: pairs with equal "
        "captions are each other's negatives, and teach nothing"
    )


def _spread(source: PairSource, sample: int) -> list[int]:
    return np.unique(np.linspace(0, len(source) - 1, sample).astype(np.int64)).tolist()


def _caption(source: PairSource, row: int) -> str:
    try:
        return source.caption(row)
    except UnreadableImage:
        return ""


def _fault(source: PairSource, parity: bool, row: int) -> UnreadableImage | None:
    try:
        load(read_pair(source, row)[0], parity=parity)
    except UnreadableImage as error:
        return error
    return None
