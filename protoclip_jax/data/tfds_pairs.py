"""Pairs of a prepared TensorFlow Datasets set, by its name or its folder.

ArrayRecord files need no TensorFlow. TFRecord files are read where the user installed it.
"""

import functools
import hashlib
import importlib.util
import os
from pathlib import Path

import numpy as np

from protoclip_jax.data.decoding import BROKEN, EMPTY, UnreadableImage
from protoclip_jax.data.record_files import RecordFile, RecordFiles, check_counts
from protoclip_jax.data.seen_files import SeenFiles
from protoclip_jax.data.tf_records import TfRecords
from protoclip_jax.data.tfds_description import (
    FEATURES,
    INFO,
    builder_at,
    check_inside,
    first_line,
)
from protoclip_jax.storage import objects
from protoclip_jax.storage.paths import absolute, is_remote

PREFIX = "tfds:"
_FOOTER = 65536  # bytes at a file's end that enter the fingerprint: it indexes the whole file


def is_tfds(spec: str) -> bool:
    """Whether a spec is `tfds:NAME`, or a folder that TFDS prepared."""
    if spec.startswith(PREFIX):
        return True
    if is_remote(spec):
        named = spec.lower().endswith((".tar", ".tsv", ".csv", ".txt"))
        return not named and objects.exists(f"{spec.rstrip('/')}/dataset_info.json")
    return os.path.exists(os.path.join(spec, "dataset_info.json"))


class TfdsPairs:
    """One split of a set, in its files' order; a `PairSource`.

    Pickles as its names and what its files were; each process opens them at its first read.

    Attributes:
      name: set and split.
      split: a split, or a slice of one in TFDS's notation, such as train[:90%].
      fingerprint: hash of the files' names, sizes and ends, of what is used of them, and how.
    """

    def __init__(
        self,
        spec: str,
        *,
        split: str = "train",
        image_feature: str = "image",
        text_feature: str = "caption",
    ):
        """Opens the set's description.

        Args:
          spec: `tfds:NAME`, `tfds:NAME/CONFIG:VERSION`, or a folder of prepared files.
          split: which pairs.
          image_feature: name of the picture's feature; a part of another as `whole/part`.
          text_feature: name of the caption's; where it holds several texts, the first is used.

        Raises:
          FileNotFoundError: a file of the split is missing.
          ValueError: no such set, split or feature, not prepared, or in a format that cannot be
            read here.
        """
        self._spec = spec if spec.startswith(PREFIX) else absolute(spec)
        self.name, self.split = f"{spec} {split}", split
        self._image, self._text = image_feature, text_feature
        self._description: dict[str, str] = {}
        self._check()

    def __getstate__(self):
        opened = ("_builder", "_features", "_records")
        return {key: value for key, value in self.__dict__.items() if key not in opened}

    @functools.cached_property
    def _builder(self):
        for path, digest in self._description.items():  # known to the copies of workers
            self._seen.check(path, lambda path=path, digest=digest: _content(path) == digest)
        if not self._spec.startswith(PREFIX):
            return builder_at(self._spec)
        import tensorflow_datasets as tfds

        name = self._spec.removeprefix(PREFIX)
        try:
            builder = tfds.builder(name)
        except Exception as error:  # DatasetNotFoundError, or what a damaged description gives
            raise ValueError(f"{self._spec} cannot be opened: {first_line(error)}") from error
        if not builder.is_prepared():
            raise ValueError(
                f"{self._spec} is not prepared in {builder.data_dir}: run `tfds build {name} "
                "--file_format=array_record`, or set TFDS_DATA_DIR"
            )
        return builder

    def _check(self) -> None:
        import tensorflow_datasets as tfds

        splits, features = self._builder.info.splits, self._builder.info.features
        if self.split.partition("[")[0] not in splits:
            raise ValueError(f"{self.name}: there is no such split, choose one of {list(splits)}")
        known = sorted(_leaves(features))
        for option, name, kind in (
            ("image_feature", self._image, tfds.features.Image),
            ("text_feature", self._text, tfds.features.Text),
        ):
            found = _feature(features, name)
            if not isinstance(found, kind):
                what = "is missing" if found is None else f"is no {kind.__name__}"
                raise ValueError(
                    f"{self.name}: {option} {name!r} {what}; the set has {', '.join(known)}"
                )
        if "/" in self._image:
            raise ValueError(f"{self.name}: image_feature {self._image!r} is part of another")
        self._look()
        if not len(self):
            raise ValueError(f"{self.name} holds 0 pairs")

    @functools.cached_property
    def _features(self):
        """The two features alone: only they are parsed."""
        import tensorflow_datasets as tfds

        whole = self._builder.info.features
        names = dict.fromkeys((self._image, self._text.partition("/")[0]))
        return tfds.features.FeaturesDict({name: whole[name] for name in names})

    def _example(self, row: int) -> dict:
        import tensorflow_datasets as tfds

        # The picture stays the bytes it is.
        decoders = {self._image: tfds.decode.SkipDecoding()}
        return self._features.deserialize_example_np(self._records[row], decoders=decoders)

    @functools.cached_property
    def _records(self):
        """The examples' bytes by row."""
        form = self._form
        if form == "array_record":
            # Not as_data_source, which keeps every file's index in memory.
            return RecordFiles(self._files, self._seen, _footer)
        if form != "tfrecord":
            raise ValueError(f"{self.name} is stored as {form}, wanted array_record")
        if importlib.util.find_spec("tensorflow") is None:
            raise ValueError(
                f"{self.name} is stored as TFRecord, which needs TensorFlow: pip install "
                "tensorflow, or build the set with --file_format=array_record"
            )
        return TfRecords(self._files, self._seen, _footer)

    def _look(self) -> None:
        """Notes what the files are: workers open them later, and must find the same."""
        used = self._used()
        paths = [os.fspath(file.filename) for file in used]
        folder = os.fspath(self._builder.data_dir)
        check_inside(folder, paths)
        described = [os.path.join(folder, name) for name in (INFO, FEATURES)]
        described = [path for path in described if objects.is_file(path)]
        try:
            self._seen = SeenFiles.now([*paths, *described])
        except FileNotFoundError as error:
            name = error.filename or error
            raise FileNotFoundError(f"{name} is missing: copy the set again") from error
        self._description = {path: _content(path) for path in described}
        digest = hashlib.blake2b(
            repr((self.split, self._image, self._text)).encode(), digest_size=16
        )
        self._files = []
        for file, path in zip(used, paths, strict=True):
            size, end = _size_and_end(path)
            digest.update(repr((os.path.basename(path), size, file.skip, file.take)).encode())
            digest.update(end)
            self._files.append(RecordFile(path, file.skip, file.take, _hash(end)))
        self.fingerprint = digest.hexdigest()
        if self._form == "array_record":
            check_counts(
                {path: file.examples_in_shard for path, file in zip(paths, used, strict=True)}
            )

    def _used(self):
        splits = self._builder.info.splits
        try:
            used = splits[self.split].file_instructions
            parts = _parts(self.split, splits)
        except Exception as error:  # a slice that is none; TFDS has no one error for it
            raise ValueError(f"{self.name}: {first_line(error)}") from error
        # TFDS would give a negative number of pairs, or take -1 of them for all.
        if any(part.to is not None and (part.from_ or 0) > part.to for part in parts):
            raise ValueError(f"{self.name}: the split {self.split!r} ends before it begins")
        return used

    @property
    def _form(self) -> str:
        return self._builder.info.file_format.value

    def __len__(self) -> int:
        return len(self._records)

    def read(self, row: int) -> tuple[bytes, str]:
        """The picture's file and the caption.

        Raises:
          UnreadableImage: the record is damaged or has no picture.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.name}, which has {len(self)}")
        try:
            example = self._example(row)
            picture, text = example[self._image], _text(example, self._text)
        except (OSError, UnreadableImage):  # an OSError is the source's, not the record's
            raise
        except Exception as error:  # TFDS and protobuf raise anything
            raise UnreadableImage(BROKEN, first_line(error)) from error
        if not picture:
            raise UnreadableImage(EMPTY)
        return bytes(picture), text

    def caption(self, row: int) -> str:
        """The caption of a row."""
        return self.read(row)[1]

    def where(self, row: int) -> str:
        """What a row is called."""
        return f"{self.name} row {row}"


def _parts(split: str, splits) -> list:
    """The slices of a split, from one pair to another; None is the first or the last."""
    import tensorflow_datasets as tfds

    if "[" not in split:
        return []
    return tfds.core.ReadInstruction.from_spec(split).to_absolute(splits)


def _footer(path: str) -> str:
    return _hash(_size_and_end(path)[1])


def _content(path: str) -> str:
    return _hash(objects.read(path) if is_remote(path) else Path(path).read_bytes())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _size_and_end(path: str) -> tuple[int, bytes]:
    """Bytes of a file, and the last of them."""
    if is_remote(path):
        size = objects.status(path).size
        return size, objects.read(path, max(0, size - _FOOTER), min(size, _FOOTER))
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _FOOTER))
        return size, file.read()


def _leaves(features, prefix: str = "") -> dict:
    """Features without parts, by `whole/part`."""
    inner = getattr(features, "feature", features)  # of a sequence
    if not hasattr(inner, "items"):
        return {prefix.rstrip("/"): inner}
    found = {}
    for name, feature in inner.items():
        found |= _leaves(feature, f"{prefix}{name}/")
    return found


def _feature(features, name: str):
    return _leaves(features).get(name)


def _text(example: dict, name: str) -> str:
    value = example
    for part in name.split("/"):
        value = value[part]
    while isinstance(value, list | np.ndarray):
        if len(value) == 0:
            return ""
        value = value[0]
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
