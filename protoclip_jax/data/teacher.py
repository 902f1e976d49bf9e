"""Teacher features: one row of numbers a pair, made outside training and only ever read here."""

import hashlib
import itertools
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

# Bytes of the file looked at in one go. A map is given back after each, so that a process holds
# this much of the file at most, however long it is.
_BLOCK = 2**26


def embedded_teacher(split: str = "train") -> Path:
    """File of the embedded teacher features of EmojiText's captions.

    Sentence embeddings (all-MiniLM-L6-v2) reduced to 64 dimensions, one row a pair.
    """
    path = Path(str(resources.files("protoclip_jax.data"))) / "assets" / "teacher"
    path = path / f"emoji_text_{split}.npy"
    if not path.exists():
        raise ValueError(
            f"EmojiText has teacher features for the split train, none for {split!r}: make them "
            f"with `python -m protoclip_jax.teacher emoji_text/{split} --out FILE.npy`"
        )
    return path


class Teacher:
    """Features that a checked file holds, read a few rows at a time.

    Attributes:
      path: the file.
      width: numbers in a row.
      fingerprint: rows, width, and a hash of all the file's numbers in their order.
    """

    def __init__(self, path: str | Path, count: int, width: int, fingerprint: str):
        self.path = Path(path)
        self.width = width
        self.fingerprint = fingerprint
        self._count = count

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """Features of these rows in this order, float32.

        Raises:
          IndexError: a row outside 0 .. len - 1.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            outside = indices[(indices < 0) | (indices >= len(self))][0]
            raise IndexError(f"row {outside} of {self.path}, which has {len(self)}")
        features_nd = np.empty((len(indices), self.width), np.float32)
        # In the file's order, so that a block of rows lies in one stretch of it.
        order = np.argsort(indices, kind="stable")
        step = _rows_in_a_block(_map(self.path))
        sorted_rows = indices[order]
        edges = np.searchsorted(sorted_rows, np.arange(0, len(self) + step, step))
        for first, last in itertools.pairwise(edges):
            if first < last:
                features_nd[order[first:last]] = _map(self.path)[sorted_rows[first:last]]
        return features_nd


def open_teacher(path: str | Path, rows: int) -> Teacher:
    """Checks the whole file, block by block, before training starts.

    Args:
      path: a .npy file of `rows` rows in the data set's order; float16, float32 or float64.
      rows: pairs in the data set.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a .npy file, an object array (never loaded: it can run code), not a table of
        floating-point numbers, another number of rows, or numbers that are not finite.
    """
    features = _map(path)
    if features.ndim != 2 or features.dtype.kind != "f" or not features.shape[1]:
        raise ValueError(
            f"{path} holds {features.dtype} of shape {features.shape}: wanted floating-point "
            f"numbers of shape ({rows}, width), one row a pair"
        )
    count, width = features.shape
    if count != rows:
        raise ValueError(
            f"{path} has {count} rows and the data set {rows} pairs: make it again from this very "
            "data set, one row a pair"
        )
    digest, bad, first_bad = hashlib.blake2b(digest_size=16), 0, None
    for first, block_nd in _blocks(path):
        with np.errstate(over="ignore"):
            finite_n = np.isfinite(block_nd.astype(np.float32)).all(axis=1)
        if not finite_n.all():
            first_bad = first + int(np.argmin(finite_n)) if first_bad is None else first_bad
            bad += int((~finite_n).sum())
        digest.update(np.ascontiguousarray(block_nd))
    if bad:
        raise ValueError(
            f"{path} has {bad} rows with numbers that are not finite, the first is row "
            f"{first_bad} (counted from 0): make those rows again"
        )
    return Teacher(path, count, width, f"{count}x{width}-{features.dtype}-{digest.hexdigest()}")


def _map(path: str | Path) -> np.ndarray:
    """The file's array, mapped and not read. It is unmapped when the last view of it goes."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        if "Python objects" in str(error):
            raise ValueError(
                f"{path} is an object array, which loading could run code from: save a plain "
                "array of float32 instead"
            ) from None
        raise ValueError(f"{path} is not a .npy file that can be mapped ({error})") from None


def _rows_in_a_block(features: np.ndarray) -> int:
    return max(1, _BLOCK // (features.shape[1] * features.itemsize))


def _blocks(path: str | Path) -> Iterator[tuple[int, np.ndarray]]:
    """The file's rows from first to last, some at a time, with the first one's number."""
    count, step = len(_map(path)), _rows_in_a_block(_map(path))
    for first in range(0, count, step):
        yield first, _map(path)[first : first + step]
