"""Which pairs an episode holds: a pure function of (number of pairs, size, episode, seed)."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int64, Integer

# Rows `first` to before `last` of an epoch's order.
OrderPart = Callable[[int, int, int], Integer[np.ndarray, " n"]]

# Keeps the draws with replacement apart from the permutations of the same seed.
_WITH_REPLACEMENT = 1
_PERMUTATION = 0


def episode_rows(
    num_pairs: int,
    size: int,
    episode: int,
    seed: int,
    replacement: bool,
    order_part: OrderPart | None = None,
) -> Int64[np.ndarray, "size"]:
    """Rows of the data set that make up one episode, in training order.

    Without replacement the episodes are consecutive slices of an endless stream of permutations,
    one permutation an epoch, so every row is seen exactly once before any is seen again, also when
    an episode runs over the end of an epoch (a row can then occur twice in that episode, once from
    either side). Every host computes the same rows: nothing is drawn from shared state, and a
    resumed run asks for episode e and gets episode e.

    Args:
      num_pairs: pairs in the data set.
      size: pairs in an episode.
      episode: 0-based episode.
      seed: seed of the run, 0 or above.
      replacement: draw each episode independently and uniformly with replacement (the reference).
      order_part: (epoch, first, last) -> that part of `epoch_order`, from wherever it is kept; None
        makes the whole order anew.

    Returns:
      Row numbers, each in [0, num_pairs).

    Raises:
      ValueError: without replacement, when an episode is larger than the data set; or when a
        number is out of range.
    """
    if num_pairs < 1 or size < 1 or episode < 0 or seed < 0:
        raise ValueError(
            f"num_pairs {num_pairs}, size {size}, episode {episode}, seed {seed}: the first two "
            "must be at least 1, the others at least 0"
        )
    if replacement:
        return _generator(seed, _WITH_REPLACEMENT, episode).randint(
            0, num_pairs, size, dtype=np.int64
        )
    if size > num_pairs:
        raise ValueError(
            f"an episode of {size} pairs cannot be drawn without replacement from {num_pairs} "
            f"pairs: set the episode size to at most {num_pairs}, or allow replacement"
        )
    if order_part is None:

        def order_part(epoch: int, first: int, last: int) -> Integer[np.ndarray, " n"]:
            return epoch_order(num_pairs, epoch, seed)[first:last]

    first, last = episode * size, (episode + 1) * size
    parts = []
    for epoch in range(first // num_pairs, (last - 1) // num_pairs + 1):
        start = epoch * num_pairs
        parts.append(order_part(epoch, max(first - start, 0), min(last - start, num_pairs)))
    return np.concatenate(parts).astype(np.int64, copy=False)


def epoch_order(num_pairs: int, epoch: int, seed: int) -> Integer[np.ndarray, "num_pairs"]:
    """All rows of the data set in the order of an epoch; 32 bits each where they fit."""
    rows = np.arange(num_pairs, dtype=order_type(num_pairs))
    # What `permutation` does, which would take 64 bits.
    _generator(seed, _PERMUTATION, epoch).shuffle(rows)
    return rows


def order_type(num_pairs: int) -> np.dtype:
    """Type of the numbers of `epoch_order`."""
    return np.dtype(np.uint32 if num_pairs <= 2**32 else np.int64)


def _generator(seed: int, purpose: int, index: int) -> np.random.RandomState:
    # RandomState, not default_rng: NumPy promises never to change its streams, and a resumed run
    # may meet a newer NumPy.
    sequence = np.random.SeedSequence([seed, purpose, index])
    return np.random.RandomState(np.random.MT19937(sequence))
