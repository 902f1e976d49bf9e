"""Makes a file of teacher features: captions embedded some at a time, reduced by PCA, resumable."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from protoclip_jax.data.bar import counted
from protoclip_jax.data.pca import PCA, fit_pca
from protoclip_jax.data.sentence_encoders import SentenceEncoder
from protoclip_jax.data.sources import PairSource
from protoclip_jax.data.teacher import open_teacher
from protoclip_jax.data.teacher_note import TeacherNote, write_note

_CHUNK = 1024  # captions between two notes of how far the work has come


@dataclasses.dataclass(frozen=True)
class TeacherSettings:
    """What the features depend on beside the captions.

    Attributes:
      encoder: the encoder's name, to tell runs apart.
      dimensions: numbers in a row of the result.
      fit_rows: rows that the PCA is fitted on: all, or so many drawn at random.
      dtype: of the result: "float32" or "float16".
    """

    encoder: str
    dimensions: int = 64
    fit_rows: int = 50_000
    dtype: str = "float32"


def pca_path(out: str | Path) -> Path:
    """Where the fitted matrix of the teacher `out` lies: beside it."""
    return Path(out).with_suffix(".pca.npz")


def make_teacher(
    source: PairSource,
    encoder: SentenceEncoder,
    out: str | Path,
    settings: TeacherSettings,
    *,
    pca: PCA | None = None,
    progress: bool = True,
) -> PCA:
    """Writes one row of features a pair to `out`; beside it its note and the fitted PCA.

    Memory grows by a chunk of captions; the rows that the PCA is fitted on lie in a file. Killed
    and started again, it goes on after the last full chunk; its notes are `out`.progress.json
    and two .part files, gone at the end.

    Args:
      source: the pairs; the result has their order.
      encoder: captions to features.
      out: the .npy file to make.
      settings: see there.
      pca: a fitted one to use, instead of fitting one to these captions.
      progress: show how far it is.

    Returns:
      The PCA that was used.

    Raises:
      ValueError: `out` is there already, or half made from something else, or impossible settings.
    """
    out = Path(out)
    if out.suffix != ".npy":
        raise ValueError(f"the features go to a .npy file, and {out} is not named so")
    if out.exists():
        raise ValueError(f"{out} is there already: remove it, or choose another --out")
    if pca is not None and pca.mean_e.shape != (encoder.width,):
        raise ValueError(
            f"the PCA is for features of {len(pca.mean_e)} numbers, the encoder's have "
            f"{encoder.width}: fit it with the same encoder"
        )
    work = _Work(source, encoder, out, settings, pca)
    out.parent.mkdir(parents=True, exist_ok=True)
    with counted(len(source), "caption", done=work.done, shown=progress) as bar:
        used = work.reduced(bar)
    if pca is None:
        used.save(pca_path(out))
    # The note first: a kill in between leaves a note without a file, and not the other way round.
    write_note(out, _note(source, work.result_path, settings))
    os.replace(work.result_path, out)
    work.clear()
    return used


def _note(source: PairSource, path: Path, settings: TeacherSettings) -> TeacherNote:
    made = open_teacher(path, len(source))
    return TeacherNote(
        source=source.name,
        source_fingerprint=source.fingerprint,
        pairs=len(source),
        encoder=settings.encoder,
        dimensions=made.width,
        numbers=made.fingerprint,
    )


class _Work:
    """The steps, the files that they leave, and how far they have come."""

    def __init__(self, source, encoder, out: Path, settings: TeacherSettings, pca: PCA | None):
        self._source, self._encoder, self._settings, self._pca = source, encoder, settings, pca
        self.result_path = Path(f"{out}.part")
        self._sample_path = Path(f"{out}.sample.part")
        self._notes_path = Path(f"{out}.progress.json")
        everything = np.arange(len(source))
        count = min(settings.fit_rows, len(source)) if pca is None else 0
        drawn = np.random.default_rng(0).choice(len(source), count, replace=False)
        self._sample = np.sort(drawn)
        self._rest = np.setdiff1d(everything, self._sample, assume_unique=True)
        identity = {
            "source": source.name,
            "fingerprint": source.fingerprint,
            "pca": "fitted here" if pca is None else pca.fingerprint,
            **dataclasses.asdict(settings),
        }
        self._notes = {"made from": identity, "sample": 0, "rest": 0}
        if self._notes_path.exists():
            stored = json.loads(self._notes_path.read_text())
            for key, value in identity.items():
                # Pairs that moved are the same pairs: their fingerprint tells.
                if key != "source" and stored["made from"].get(key) != value:
                    raise ValueError(
                        f"{self._notes_path} is of a run with {key} "
                        f"{stored['made from'].get(key)!r}, and this one has {value!r}: finish "
                        f"that one, or remove {out}.*"
                    )
            self._notes = stored

    @property
    def done(self) -> int:
        """Captions embedded by an earlier run."""
        return self._notes["sample"] + self._notes["rest"]

    def reduced(self, bar) -> PCA:
        """Fits the PCA, and puts every row's reduced features in the result."""
        pca = self._pca
        dimensions = self._settings.dimensions if pca is None else len(pca.components_de)
        result = self._file(self.result_path, len(self._source), dimensions, self._settings.dtype)
        if pca is None:
            sample = self._file(self._sample_path, len(self._sample), self._encoder.width, "f4")
            self._encode("sample", self._sample, sample, _unchanged, bar)
            pca = fit_pca(sample, dimensions)
            for first in range(0, len(sample), _CHUNK):
                rows = self._sample[first : first + _CHUNK]
                result[rows] = pca.project(sample[first : first + _CHUNK])
        self._encode("rest", self._rest, result, pca.project, bar)
        result.flush()
        return pca

    def _encode(
        self,
        stage: str,
        rows: Int[np.ndarray, " n"],
        file: Float[np.ndarray, "m e"],
        change: Callable,
        bar,
    ) -> None:
        """Embeds the captions of `rows`: the sample's in their sequence, the rest's by row."""
        for first in range(self._notes[stage], len(rows), _CHUNK):
            chunk = rows[first : first + _CHUNK]
            features = self._encoder([_caption(self._source, int(row)) for row in chunk])
            if not np.isfinite(features).all():
                raise ValueError(
                    f"the encoder gave numbers that are not finite, near row {chunk[0]}"
                )
            where = slice(first, first + len(chunk)) if stage == "sample" else chunk
            file[where] = change(features)
            file.flush()
            self._notes[stage] = first + len(chunk)
            self._note()
            bar.update(len(chunk))

    def _note(self) -> None:
        part = Path(f"{self._notes_path}.part")
        part.write_text(json.dumps(self._notes, indent=1))
        os.replace(part, self._notes_path)

    def _file(self, path: Path, rows: int, width: int, dtype: str) -> np.memmap:
        if self._notes_path.exists() and path.exists():
            return np.lib.format.open_memmap(path, "r+")
        self._notes |= {"sample": 0, "rest": 0}
        return np.lib.format.open_memmap(path, "w+", dtype=np.dtype(dtype), shape=(rows, width))

    def clear(self) -> None:
        """Removes the files that only a resumed run needs."""
        for path in (self._sample_path, self._notes_path):
            path.unlink(missing_ok=True)


def _unchanged(features: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n e"]:
    return features


def _caption(source: PairSource, row: int) -> str:
    # Without the picture's file, where a source can do that: it may lie far away, or be missing.
    if hasattr(source, "caption"):
        return source.caption(row)
    return source.read(row)[1]
