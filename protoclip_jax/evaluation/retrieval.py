"""Retrieval: which share of queries finds a partner among its k best answers."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int
from scipy.special import gammaln

from protoclip_jax.evaluation.features import (
    SCORE_ROWS,
    finite_features,
    normalise,
    score_blocks,
)

KS = (1, 5, 10)


class Ranks(NamedTuple):
    """Where each query's best partner stands.

    A wrong answer is one that is no partner of the query. `above` counts the wrong answers that
    score higher than the best partner, `tied` the wrong ones that score exactly alike, and `own`
    the partners at that same score (at least 1: the best one itself).
    """

    above: Int[np.ndarray, "q"]
    tied: Int[np.ndarray, "q"]
    own: Int[np.ndarray, "q"]


def retrieve(
    image_features: Float[Array | np.ndarray, "n e"],
    text_features: Float[Array | np.ndarray, "m e"],
    image_of_text: Int[Array | np.ndarray, "captions"] | None = None,
    *,
    ties: str = "expected",
    rows: int = SCORE_ROWS,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 in both directions.

    With several captions a picture, any of its own captions counts for image to text, and every
    caption is a query for text to image.

    Args:
        image_features: one row a picture; the length of a row does not matter.
        text_features: one row a caption.
        image_of_text: row of each caption's picture; without it caption i belongs to picture i.
        ties: how equal scores count, see `recall`.
        rows: queries scored at a time; memory is rows x corpus scores.

    Returns:
        `{"image_to_text_r1": percent, ..., "text_to_image_r10": percent, "mean_recall": percent}`.

    Raises:
        ValueError: when counts do not fit, a picture has no caption, or features are not finite.
    """
    images = normalise(finite_features(image_features, "image"))
    texts = normalise(finite_features(text_features, "text"))
    own_image = _own_image(len(images), len(texts), image_of_text)
    every_image = np.arange(len(images))
    ranks = {
        "image_to_text": count_ranks(score_blocks(images, texts, rows), every_image, own_image),
        "text_to_image": count_ranks(score_blocks(texts, images, rows), own_image, every_image),
    }
    metrics = {f"{way}_r{k}": recall(r, k, ties) for way, r in ranks.items() for k in KS}
    return metrics | {"mean_recall": float(np.mean(list(metrics.values())))}


def count_ranks(
    blocks: Iterable[tuple[slice, Float[np.ndarray, "r m"]]],
    query_group: Int[np.ndarray, "q"],
    corpus_group: Int[np.ndarray, "m"],
) -> Ranks:
    """Ranks of all queries from blocks of their scores; partners are of the same group."""
    ranks = Ranks(*(np.zeros(len(query_group), np.int64) for _ in Ranks._fields))
    for block, scores in blocks:
        own = query_group[block, None] == corpus_group
        for column, values in zip(ranks, _rank_block(scores, own), strict=True):
            column[block] = values
    return ranks


def _rank_block(scores: Float[np.ndarray, "r m"], own: Bool[np.ndarray, "r m"]) -> Ranks:
    best = np.where(own, scores, -np.inf).max(axis=1, keepdims=True)
    higher, alike = scores > best, scores == best
    # A partner never scores above the best partner, so `higher` holds wrong answers only.
    return Ranks(higher.sum(axis=1), (alike & ~own).sum(axis=1), (alike & own).sum(axis=1))


def recall(ranks: Ranks, k: int, ties: str = "expected") -> float:
    """Share of queries with a partner among the k best answers, in percent.

    Equal scores leave the order open; what is counted then is stated by `ties`:
    - "expected": the chance that a random order of the tied answers puts a partner among the k
      best. A model that gives everything one score gets exactly the chance level.
    - "optimistic": partners first.   - "pessimistic": wrong answers first.
    """
    if ties == "optimistic":
        found = ranks.above < k
    elif ties == "pessimistic":
        found = ranks.above + ranks.tied < k
    elif ties == "expected":
        found = _chance_of_a_partner(k - ranks.above, ranks.tied + ranks.own, ranks.own)
    else:
        raise ValueError(f"ties={ties!r}: wanted 'expected', 'optimistic' or 'pessimistic'")
    return float(100 * np.mean(found))


def _chance_of_a_partner(
    places: Int[np.ndarray, "q"], answers: Int[np.ndarray, "q"], partners: Int[np.ndarray, "q"]
) -> Float[np.ndarray, "q"]:
    """Chance that `places` of `answers` in random order hold one of the `partners`.

    1 - C(answers - partners, places) / C(answers, places), by logarithms of factorials.
    """
    wrong = answers - partners
    places = np.clip(places, 0, answers)
    left = np.maximum(wrong - places, 0)
    log_missed = (
        gammaln(wrong + 1)
        - gammaln(left + 1)
        - gammaln(answers + 1)
        + gammaln(answers - places + 1)
    )
    # Where every wrong answer has a place, the next place is a partner's.
    return np.where(places > wrong, 1.0, -np.expm1(np.minimum(log_missed, 0.0)))


def chance(
    num_images: int, image_of_text: Int[Array | np.ndarray, "m"] | None = None
) -> dict[str, float]:
    """What a random order gives, in percent, under the names of `retrieve`."""
    num_texts = num_images if image_of_text is None else len(image_of_text)
    own_image = _own_image(num_images, num_texts, image_of_text)
    captions = np.bincount(own_image, minlength=num_images)
    random = {
        "image_to_text": Ranks(*_as_columns(0, num_texts - captions, captions)),
        "text_to_image": Ranks(*_as_columns(0, np.full(num_texts, num_images - 1), 1)),
    }
    metrics = {f"{way}_r{k}": recall(r, k) for way, r in random.items() for k in KS}
    return metrics | {"mean_recall": float(np.mean(list(metrics.values())))}


def _as_columns(*values) -> tuple[np.ndarray, ...]:
    return tuple(np.broadcast_arrays(*values))


def _own_image(num_images: int, num_texts: int, image_of_text) -> Int[np.ndarray, "m"]:
    """`image_of_text` checked, or one caption a picture."""
    if image_of_text is None:
        if num_images != num_texts:
            raise ValueError(
                f"found {num_images} pictures and {num_texts} captions: give image_of_text, the "
                "picture's row for every caption"
            )
        return np.arange(num_texts)
    own_image = np.asarray(image_of_text)
    if len(own_image) != num_texts:
        raise ValueError(f"image_of_text has {len(own_image)} entries for {num_texts} captions")
    if own_image.min() < 0 or own_image.max() >= num_images:
        raise ValueError(
            f"image_of_text runs from {own_image.min()} to {own_image.max()}, but there are "
            f"{num_images} pictures: wanted 0 to {num_images - 1}"
        )
    without = np.flatnonzero(np.bincount(own_image, minlength=num_images) == 0)
    if len(without):
        raise ValueError(
            f"{len(without)} of {num_images} pictures have no caption (the first is row "
            f"{without[0]}): leave them out"
        )
    return own_image
