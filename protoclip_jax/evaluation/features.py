"""Feature matrices: turning pictures into them, and refusing what cannot be measured."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from protoclip_jax.data.decoding import UnreadableImage, decode, evaluation_crop

# A corpus of scores is never held whole: this many query rows are scored at a time.
SCORE_ROWS = 1024

logger = logging.getLogger(__name__)


@runtime_checkable
class Encoder(Protocol):
    """What the evaluations need of a model. Features come L2-normalised, float32."""

    image_size: int

    def encode_image(self, images) -> Float[np.ndarray, "n e"]:
        """Features of uint8 pictures `(n, image_size, image_size, 3)`."""
        ...

    def encode_text(self, texts: list[str]) -> Float[np.ndarray, "n e"]:
        """Features of texts."""
        ...

    def supplies(self, number: int) -> bool:
        """Whether this process has to give the picture at this place of a call.

        Always so, but where several processes make the same calls for one model.
        """
        ...


def finite_features(
    features: Float[Array | np.ndarray, "n e"], what: str
) -> Float[np.ndarray, "n e"]:
    """The features as a NumPy array, or a ValueError.

    A NaN loses every comparison, so a rank counted from "how many score higher" would call a
    broken model perfect; hence the check before anything is ranked.

    Raises:
        ValueError: when there are no rows, or some hold NaN or infinity.
    """
    array = np.asarray(features)
    if not len(array):
        raise ValueError(f"no {what} features to evaluate: found 0 rows, wanted at least 1")
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {len(array)} {what} features are not finite (the first is row "
            f"{bad[0]}): the model has diverged, evaluate an earlier checkpoint"
        )
    return array


def normalise(features: Float[Array | np.ndarray, "*n e"]) -> Float[np.ndarray, "*n e"]:
    """Rows scaled to length 1; a zero row stays zero."""
    array = np.asarray(features)
    length = np.linalg.norm(array, axis=-1, keepdims=True)
    return array / np.maximum(length, np.finfo(array.dtype).tiny)


def score_blocks(
    queries: Float[Array | np.ndarray, "q e"],
    corpus: Float[Array | np.ndarray, "n e"],
    rows: int = SCORE_ROWS,
) -> Iterator[tuple[slice, Float[np.ndarray, "r n"]]]:
    """Dot products of a few queries at a time with the whole corpus.

    Summed in float64 and rounded to float32, so that equal features get equal scores wherever
    they stand in the corpus: plain float32 products differ in the last bit with the position,
    which would break ties by position and not by the stated rule.

    Yields:
        The slice of queries and its scores, float32.
    """
    corpus_t = np.asarray(corpus, np.float64).T
    for start in range(0, len(queries), rows):
        block = slice(start, start + rows)
        yield block, (np.asarray(queries[block], np.float64) @ corpus_t).astype(np.float32)


def extract_images(
    encoder: Encoder,
    load: Callable[[int], UInt8[np.ndarray, "h w 3"]],
    count: int,
    *,
    batch: int = 256,
    threads: int | None = None,
    shared: bool = False,
) -> Float[np.ndarray, "n e"]:
    """Features of pictures `load(0)` to `load(count - 1)`, decoded while the model works.

    Args:
        encoder: the model.
        load: gives one picture, already cropped to the model's size.
        count: how many pictures there are.
        batch: pictures encoded at a time; also how many wait decoded.
        threads: decoding threads; by default one a core, at most 16.
        shared: load only what this process supplies; the model's other processes load the rest.

    Returns:
        Features, float32, in the order asked for; all of them on every process.
    """
    if count < 1:
        raise ValueError("no pictures to encode: found 0, wanted at least 1")
    blank = np.zeros((encoder.image_size, encoder.image_size, 3), np.uint8)

    def loaded(row: int):
        return blank if shared and not encoder.supplies(row % batch) else load(row)

    parts = []
    with ThreadPoolExecutor(threads or min(16, os.cpu_count() or 1)) as pool:
        waiting = [pool.submit(loaded, row) for row in range(min(batch, count))]
        for start in range(0, count, batch):
            ready = waiting
            ahead = range(start + batch, min(start + 2 * batch, count))
            waiting = [pool.submit(loaded, row) for row in ahead]
            pictures = np.stack([picture.result() for picture in ready])
            parts.append(np.asarray(encoder.encode_image(pictures), np.float32))
    return np.concatenate(parts)


def extract_readable(
    encoder: Encoder,
    read: Callable[[int], bytes],
    count: int,
    *,
    name: Callable[[int], str] = "row {}".format,
    batch: int = 256,
    threads: int | None = None,
) -> tuple[Float[np.ndarray, "r e"], Bool[np.ndarray, "n"]]:
    """Features of those pictures that can be read; a warning names the others.

    Args:
        encoder: the model.
        read: the encoded bytes of one picture; may raise OSError or UnreadableImage.
        count: how many pictures there are.
        name: how a picture is called in the warning.
        batch: pictures encoded at a time.
        threads: decoding threads.

    Returns:
        Features of the r readable pictures in order, and which of all n those are.

    Raises:
        ValueError: when none can be read.
    """
    problems = {}

    def load(row: int):
        try:
            return evaluation_crop(decode(read(row)), encoder.image_size)
        except (UnreadableImage, OSError) as error:
            problems[row] = error
            return np.zeros((encoder.image_size, encoder.image_size, 3), np.uint8)

    features = extract_images(encoder, load, count, batch=batch, threads=threads)
    readable = np.array([row not in problems for row in range(count)])
    named = [f"{name(row)} ({problems[row]})" for row in sorted(problems)]
    if not readable.any():
        raise ValueError(f"none of {count} pictures can be read; the first is {named[0]}")
    if named:
        logger.warning("left out %d of %d pictures: %s", len(named), count, some(named))
    return features[readable], readable


def some(items: Sequence[str], most: int = 5) -> str:
    """The first few items of a list, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more


def extract_texts(
    encoder: Encoder, texts: Sequence[str], *, batch: int = 1024
) -> Float[np.ndarray, "n e"]:
    """Features of texts, float32; equal texts are encoded once and get equal features."""
    if not len(texts):
        raise ValueError("no texts to encode: found 0, wanted at least 1")
    distinct = list(dict.fromkeys(texts))
    parts = [
        np.asarray(encoder.encode_text(distinct[start : start + batch]), np.float32)
        for start in range(0, len(distinct), batch)
    ]
    position = {text: i for i, text in enumerate(distinct)}
    return np.concatenate(parts)[[position[text] for text in texts]]
