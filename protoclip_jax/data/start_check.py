"""A look at a source before anything expensive starts."""

import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from protoclip_jax.data.decoding import MISSING, UnreadableImage, load
from protoclip_jax.data.sources import PairSource, read_pair, where


def check_start(
    source: PairSource, sample: int = 64, limit: float = 0.5, *, parity: bool = False
) -> float:
    """Reads a few pictures spread over the source, before anything expensive starts.

    Returns:
      The share that cannot be read.

    Raises:
      ValueError: it is larger than `limit`, or nothing can be read; with examples.
    """
    rows = np.unique(np.linspace(0, len(source) - 1, sample).astype(np.int64)).tolist()
    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(functools.partial(_fault, source, parity), rows))
    bad = [(row, error) for row, error in zip(rows, errors, strict=True) if error]
    if not bad:
        return 0.0
    if all(error is not None and error.reason == MISSING for error in errors):
        raise ValueError(
            f"none of the {len(rows)} pictures tried exists, the first is "
            f"{where(source, rows[0])}: set image_root to the folder where relative paths start"
        )
    share = len(bad) / len(rows)
    if share > limit or len(bad) == len(rows):
        examples = "; ".join(f"{where(source, row)} ({error})" for row, error in bad[:3])
        raise ValueError(
            f"{len(bad)} of {len(rows)} pictures tried cannot be read, more than the allowed "
            f"share of {limit:g} (max_unreadable): {examples}"
        )
    return share


def _fault(source: PairSource, parity: bool, row: int) -> UnreadableImage | None:
    try:
        load(read_pair(source, row)[0], parity=parity)
    except UnreadableImage as error:
        return error
    return None
