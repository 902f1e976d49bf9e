"""Retrieval and geometry on any list of image-text pairs."""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from protoclip_jax.data.decoding import UnreadableImage
from protoclip_jax.data.sources import read_pair
from protoclip_jax.evaluation import geometry, retrieval
from protoclip_jax.evaluation.features import Encoder, extract_readable, extract_texts


@runtime_checkable
class Pairs(Protocol):
    """Image-text pairs by row."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[bytes, str]:
        """The encoded picture and the caption of one row."""
        ...


def evaluate_pairs(
    encoder: Encoder, source: Pairs, *, batch: int = 256, threads: int | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Recalls in both directions over all pairs, and how the features lie.

    Rows with the same picture (the same bytes) are its several captions: any of them counts for
    image to text, and each is a query of its own for text to image. A picture that cannot be read
    is left out with its captions. Geometry takes the first caption of each picture, as the
    reference does.

    Returns:
        The metrics (`retrieval/*`, `geometry/*`, `data/pictures`, `data/captions`,
        `data/unreadable`), and the chance levels of those that have one.
    """
    first_row, picture_of_row, captions = _group(source)
    images, readable = extract_readable(
        encoder,
        lambda number: read_pair(source, int(first_row[number]))[0],
        len(first_row),
        name=lambda number: f"row {first_row[number]}",
        batch=batch,
        threads=threads,
    )
    kept = readable[picture_of_row]
    position = np.cumsum(readable) - 1
    own_image = position[picture_of_row[kept]]
    texts = extract_texts(encoder, [captions[row] for row in np.flatnonzero(kept)])
    first_text = np.unique(own_image, return_index=True)[1]
    found = retrieval.retrieve(images, texts, own_image)
    shape = geometry.evaluate(images, texts[first_text])
    counts = {
        "data/pictures": float(len(images)),
        "data/captions": float(len(texts)),
        "data/unreadable": float((~readable).sum()),
    }
    metrics = {f"retrieval/{name}": value for name, value in found.items()}
    metrics |= {f"geometry/{name}": value for name, value in shape.items()} | counts
    levels = retrieval.chance(len(images), own_image)
    return metrics, {f"retrieval/{name}": value for name, value in levels.items()}


def _group(
    source: Pairs,
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "rows"], Sequence[str]]:
    """The first row of each picture, each row's picture, and the captions."""
    first_row, picture_of_row, captions, known = [], [], [], {}
    for row in range(len(source)):
        try:
            data, caption = read_pair(source, row)
        except UnreadableImage:
            # Stands for itself; it is met again, and left out, when pictures are encoded.
            data, caption = f"row {row}".encode(), ""
        number = known.setdefault(blake2b(data, digest_size=16).digest(), len(known))
        if number == len(first_row):
            first_row.append(row)
        picture_of_row.append(number)
        captions.append(caption)
    if not first_row:
        raise ValueError("found 0 pairs to evaluate, wanted at least 1")
    return np.array(first_row), np.array(picture_of_row), captions
