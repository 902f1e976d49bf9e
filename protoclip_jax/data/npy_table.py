"""Tables in .npy files, read without holding or mapping them."""

import dataclasses
import itertools
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from protoclip_jax.storage.disks import patient

_BLOCK = 2**26  # bytes of the file looked at in one go
_CUT = "it is cut short"


@dataclasses.dataclass(frozen=True)
class NpyTable:
    """A table of floating-point numbers in a .npy file, read a few rows at a time.

    It is never mapped: a map of a file that is cut ends the process.

    Attributes:
      path: the file, absolute.
      count: rows.
      width: numbers in a row.
      dtype: of the numbers in the file.
      by_columns: they lie column by column.
      begin: byte of the first number.
    """

    path: str
    count: int
    width: int
    dtype: np.dtype
    by_columns: bool
    begin: int

    def block(self, first: int, last: int) -> np.ndarray:
        """The rows from `first` to before `last`."""
        return patient(lambda: self._block(first, last))

    def _block(self, first: int, last: int) -> np.ndarray:
        count = last - first
        with open(self.path, "rb", buffering=0) as file:
            if not self.by_columns:
                found = self._numbers(file.fileno(), first * self.width, count * self.width)
                return found.reshape(count, self.width)
            columns = [
                self._numbers(file.fileno(), column * self.count + first, count)
                for column in range(self.width)
            ]
        return np.stack(columns, axis=1)

    def _numbers(self, file: int, first: int, count: int) -> np.ndarray:
        """Numbers as they lie in the file."""
        size = self.dtype.itemsize
        data = os.pread(file, count * size, self.begin + first * size)
        if len(data) < count * size:
            raise OSError(_CUT)
        return np.frombuffer(data, self.dtype)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The rows from first to last, some at a time, with the first one's number."""
        step = self._rows_in_a_block
        for first in range(0, self.count, step):
            yield first, self.block(first, min(first + step, self.count))

    @property
    def _rows_in_a_block(self) -> int:
        return max(1, _BLOCK // (self.width * self.dtype.itemsize))

    def rows(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """Rows in increasing order, float32."""
        if not self.by_columns:
            return patient(lambda: self._single_rows(rows))
        found = np.empty((len(rows), self.width), np.float32)
        step = self._rows_in_a_block
        edges = np.searchsorted(rows, np.arange(0, self.count + step, step))
        for first, last in itertools.pairwise(edges):
            if first < last:
                begin = int(rows[first])
                block = self.block(begin, int(rows[last - 1]) + 1)
                found[first:last] = block[rows[first:last] - begin]
        return found

    def _single_rows(self, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """One read a row: an episode's rows are few among those of a large file."""
        size = self.width * self.dtype.itemsize
        found = np.empty((len(rows), size), np.uint8)
        begins = (self.begin + rows.astype(np.int64) * size).tolist()
        with open(self.path, "rb", buffering=0) as file:
            for into, at in zip(found, begins, strict=True):
                if os.preadv(file.fileno(), [into], at) < size:
                    raise OSError(_CUT)
        return found.view(self.dtype).astype(np.float32)


def open_table(path: str | Path, rows: int) -> NpyTable:
    """Reads a file's head.

    Args:
      path: a .npy file of floating-point numbers.
      rows: how many are wanted, for messages.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a .npy file, an object array (never loaded: it can run code), no table of
        floating-point numbers, or one that is cut short.
    """
    features = _mapped(path)
    if features.ndim != 2 or features.dtype.kind != "f" or not features.shape[1]:
        raise ValueError(
            f"{path} holds {features.dtype} of shape {features.shape}: wanted floating-point "
            f"numbers of shape ({rows}, width), one row a pair"
        )
    count, width = features.shape
    return NpyTable(
        path=os.path.abspath(path),
        count=count,
        width=width,
        dtype=features.dtype,
        by_columns=not features.flags.c_contiguous,
        begin=features.offset,
    )


def _mapped(path: str | Path) -> np.memmap:
    """The file's array, for what its head says: not a number is read through the map."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on heads that Python 2 wrote, or that are rubbish
            features = np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # a head is Python's syntax, whose parser fails in many ways
        if "Python objects" in str(error):
            raise ValueError(
                f"{path} is an object array, which loading could run code from: save a plain "
                "array of float32 instead"
            ) from None
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is not a .npy file that can be mapped ({what})") from None
    return features
