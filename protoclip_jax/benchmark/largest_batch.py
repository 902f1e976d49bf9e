"""The largest batch that fits on a device: tried, in few tries, since each is compiled."""

import time
from collections.abc import Callable
from typing import Any

TRIES = 4
# How much smaller twice the rows may turn out than twice the bytes: what is shared by all rows.
_SHARED = 0.05


class DoesNotFit(Exception):
    """A batch takes more memory than a device has; the message says how much."""


def largest(
    attempt: Callable[[int], float | None],
    limit: float | None,
    *,
    first: int,
    most: int,
    enough_time: Callable[[float], bool] = lambda seconds: True,
    told: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Doubles or halves a number of rows until it fits and twice as many do not.

    Args:
      attempt: of a number of rows; returns the bytes they take where that is known, and raises
        `DoesNotFit`.
      limit: bytes that there are, where that is known.
      first: rows to start with.
      most: rows that are not exceeded.
      enough_time: whether there is time for another try, after one that took so many seconds.
      told: called after each try with what is returned in the end.

    Returns:
      rows: the largest number that fits, of which the last attempt was.
      tried: by rows, the bytes they take (None: not known), or why they do not fit.
      larger: why more rows were not tried.

    Raises:
      DoesNotFit: nothing that was tried fits.
    """
    tried: dict[int, float | str | None] = {}
    found: dict[str, Any] = {"rows": None, "tried": tried, "larger": None}
    rows = first
    while True:
        start = time.monotonic()
        try:
            tried[rows] = attempt(rows)
            found["rows"] = max(rows, found["rows"] or 0)
        except DoesNotFit as error:
            tried[rows] = str(error)
        told(found)
        fits = found["rows"] == rows
        following = 2 * rows if fits else rows // 2
        found["larger"] = _end(following, fits, tried, limit, most)
        if found["larger"] is None and not enough_time(time.monotonic() - start):
            found["larger"] = f"{following:,} not tried: no time is left"
        if found["larger"] is not None:
            break
        rows = following
    if found["rows"] is None:
        raise DoesNotFit(f"no batch that was tried fits: {tried}")
    if found["rows"] != rows:
        attempt(found["rows"])
    return found


def _end(
    following: int, fits: bool, tried: dict[int, Any], limit: float | None, most: int
) -> str | None:
    """Why `following` rows are not tried; None where they are."""
    if following in tried or following < 1:
        failed = following if fits else 2 * following
        return f"{max(1, failed):,} do not fit: {tried[max(1, failed)]}"
    if following > most:
        return f"more than {most:,} are not tried"
    if len(tried) == TRIES:
        return f"{following:,} not tried: {TRIES} tries are over"
    taken = tried.get(following // 2) if fits else None
    if taken is not None and limit is not None and (2 - _SHARED) * taken > limit:
        return f"{following:,} would take {2 * taken / 1e9:.0f} of {limit / 1e9:.0f} GB"
    return None
