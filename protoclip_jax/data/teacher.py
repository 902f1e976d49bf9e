"""Teacher features: one row of numbers a pair, made outside training and only ever read here."""

import dataclasses
import hashlib
import os
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from protoclip_jax.data.npy_table import NpyTable, open_table
from protoclip_jax.data.seen_files import SeenFiles, unreachable
from protoclip_jax.data.sources import PairSource
from protoclip_jax.data.teacher_note import TeacherNote, read_note
from protoclip_jax.storage.copies import local_copy
from protoclip_jax.storage.paths import is_remote

# Squared lengths of rows that clustering can tell apart in float32; a longer row is left out of it
# as one that is not finite is.
SHORTEST, LONGEST = 1e-30, 1e36


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
      path: the file, local or remote.
      width: numbers in a row.
      fingerprint: rows, width, and a hash of all the file's numbers in their order.
      note: where they come from; None where nothing but the number of rows could be checked.
      empty: rows that are 0, or as good as that.
    """

    def __init__(
        self,
        path: str,
        table: NpyTable,
        seen: SeenFiles | None,
        fingerprint: str,
        note: TeacherNote | None,
        empty: int,
    ):
        self.path = path
        self.width = table.width
        self.fingerprint = fingerprint
        self.note = note
        self.empty = empty
        self._table, self._seen = table, seen

    def __len__(self) -> int:
        return self._table.count

    def rows(self, indices: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
        """Features of these rows in this order, float32.

        Raises:
          IndexError: a row outside 0 .. len - 1.
          SourceError: the file has changed since it was checked, or cannot be read.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            outside = indices[(indices < 0) | (indices >= len(self))][0]
            raise IndexError(f"row {outside} of {self.path}, which has {len(self)}")
        # In the file's order, so that it is read in one direction.
        order = np.argsort(indices, kind="stable")
        features_nd = np.empty((len(indices), self.width), np.float32)
        try:
            features_nd[order] = self._table.rows(indices[order])
        except OSError as error:
            self._check()
            raise unreachable(self._table.path, error) from error
        self._check()
        return features_nd

    def _check(self) -> None:
        if self._seen is not None:
            self._seen.check(self._table.path, self._same)

    def _same(self) -> bool:
        try:
            table = open_table(self._table.path, len(self))
            return _looked_through(table).fingerprint == self.fingerprint
        except ValueError:
            return False


def open_teacher(path: str | Path, rows: int, source: PairSource | None = None) -> Teacher:
    """Checks the whole file, block by block, before training starts.

    Args:
      path: a .npy file of `rows` rows in the data set's order; float16, float32 or float64. Of a
        remote one a local copy is read.
      rows: pairs in the data set.
      source: these pairs, to compare with those that the file's note names.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not a .npy file, an object array (never loaded: it can run code), not a table of
        floating-point numbers, another number of rows, numbers that are not finite or beyond what
        float32 can square, rows that are all 0 or all alike, or a note of another file or source.
    """
    local = local_copy(path)
    # Nobody else writes the copy of a remote file.
    seen = None if is_remote(path) else SeenFiles.now([local])
    table = open_table(local, rows)
    if table.count != rows:
        raise ValueError(
            f"{path} has {table.count} rows and the data set {rows} pairs: make it again from this "
            "very data set, one row a pair"
        )
    found = _looked_through(table)
    if seen is not None:
        seen.check(local, lambda: False)
    _check_numbers(path, table.count, found)
    note = read_note(path)
    if note is not None:
        note.check(path, found.fingerprint, source)
    return Teacher(os.fspath(path), table, seen, found.fingerprint, note, found.empty)


@dataclasses.dataclass
class _Found:
    """What a look through a whole table finds."""

    fingerprint: str = ""
    bad: int = 0  # rows that are not finite, or too long
    first_bad: int | None = None
    empty: int = 0  # rows that are too short
    alike: bool = True  # all rows, as float32


def _looked_through(table: NpyTable) -> _Found:
    digest, found, row_d = hashlib.blake2b(digest_size=16), _Found(), None
    for first, block_nd in table.blocks():
        with np.errstate(over="ignore", invalid="ignore"):
            narrow_nd = block_nd.astype(np.float32)
            squares_n = np.einsum("nd,nd->n", narrow_nd, narrow_nd)
        bad_n = ~(squares_n <= LONGEST)  # NaN is neither above nor below
        if bad_n.any():
            if found.first_bad is None:
                found.first_bad = first + int(np.argmax(bad_n))
            found.bad += int(bad_n.sum())
        found.empty += int((squares_n < SHORTEST).sum())
        row_d = narrow_nd[0].copy() if row_d is None else row_d
        found.alike = found.alike and bool((narrow_nd == row_d).all())
        digest.update(np.ascontiguousarray(block_nd))
    found.fingerprint = f"{table.count}x{table.width}-{table.dtype}-{digest.hexdigest()}"
    return found


def _check_numbers(path: str | Path, rows: int, found: _Found) -> None:
    """Refuses features that clustering could do nothing with."""
    if found.bad:
        raise ValueError(
            f"{path} has {found.bad} rows with numbers that are not finite, or whose squares "
            f"are not in float32; the first is row {found.first_bad} (counted from 0): make those "
            "rows again"
        )
    if rows and found.empty == rows:
        raise ValueError(
            f"{path}: all {rows} rows are 0, or too small to be squared in float32: they tell no "
            "pair from another; make the file again"
        )
    if rows > 1 and found.alike:
        raise ValueError(
            f"{path}: all {rows} rows are alike: they tell no pair from another; make the file "
            "again"
        )
