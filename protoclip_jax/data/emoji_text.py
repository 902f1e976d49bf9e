"""EmojiText, the data set inside the package: a source of pairs read through TFDS.

As a command, writes the ArrayRecord files again from the original list and pictures:

    python -m protoclip_jax.data.emoji_text --pairs pairs.tsv --images images.zip --out DIR
"""

import argparse
import functools
import hashlib
import operator
import sys
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import SupportsIndex

from protoclip_jax.data.typed_values import place
from protoclip_jax.storage.screen import show_any_text

# Zero-shot prompts for concept names: the four frames that the captions come in.
TEMPLATES = ("{}", "{} emoji", "a drawing of {}", "an icon showing {}")
SPLITS = ("train", "val", "test")
COLUMNS = ("filepath", "title", "concept", "group", "subgroup", "vendor")


def embedded_directory() -> Path:
    """Folder of the prepared data set in the package, for `tfds.builder_from_directory`."""
    return Path(str(resources.files("protoclip_jax.data"))) / "assets" / "emoji_text" / "1.0.0"


class EmojiText:
    """One split of EmojiText, in the list's order.

    Pickles as its split and folder; each process opens the files at its first read.

    Attributes:
      name: "emoji_text/" and the split.
      split: "train" (six artists), "val" (other concepts) or "test" (another artist).
    """

    def __init__(self, split: str = "train", directory: str | Path | None = None):
        if split not in SPLITS:
            raise ValueError(f"EmojiText has no split {split!r}: choose one of {', '.join(SPLITS)}")
        self.split = split
        self.name = f"emoji_text/{split}"
        self._directory = embedded_directory() if directory is None else Path(directory)

    def __getstate__(self):
        return {key: self.__dict__[key] for key in ("split", "name", "_directory")}

    @functools.cached_property
    def _builder(self):
        # Half of the time to open: only a process that reads pays it.
        import tensorflow_datasets as tfds

        if not (self._directory / "dataset_info.json").exists():
            raise ValueError(
                f"{self._directory} holds no prepared EmojiText: make it with "
                "`python -m protoclip_jax.data.emoji_text`"
            )
        return tfds.builder_from_directory(str(self._directory))

    @functools.cached_property
    def _records(self):
        import tensorflow_datasets as tfds

        # The pictures stay the bytes they are: decoding is the pipeline's business.
        return self._builder.as_data_source(
            self.split, decoders={"image": tfds.decode.SkipDecoding()}
        )

    def __len__(self) -> int:
        return len(self._records)

    def read(self, row: SupportsIndex) -> tuple[bytes, str]:
        """The picture's file (WebP, 64x64, on white) and the caption of one row.

        Raises:
          IndexError: a row outside 0 .. len - 1.
        """
        row = operator.index(row)
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {self.name}, which has {len(self)}")
        record = self._records[row]
        return record["image"], record["title"].decode()

    def caption(self, row: SupportsIndex) -> str:
        """The caption of one row."""
        return self.read(row)[1]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of the split's files: of every picture, caption and label, and of their order."""
        digest = hashlib.blake2b(digest_size=16)
        for instruction in self._builder.info.splits[self.split].file_instructions:
            digest.update(Path(instruction.filename).read_bytes())
        return digest.hexdigest()

    @functools.cached_property
    def _columns(self) -> dict[str, list[str]]:
        info = self._builder.info
        concepts, vendors = info.features["concept"].names, info.features["vendor"].names
        of_concept = dict(info.metadata)
        columns = {column: [] for column in COLUMNS}
        for record in self._records:
            concept, vendor = record["concept"], vendors[record["vendor"]]
            subgroup = of_concept["subgroup"][concept]
            columns["filepath"].append(f"images/{vendor}/{of_concept['file'][concept]}.webp")
            columns["title"].append(record["title"].decode())
            columns["concept"].append(concepts[concept])
            columns["group"].append(of_concept["subgroup_groups"][subgroup])
            columns["subgroup"].append(of_concept["subgroup_names"][subgroup])
            columns["vendor"].append(vendor)
        return columns

    def column(self, name: str) -> list[str]:
        """One entry a row: filepath, title, concept, group, subgroup or vendor."""
        if name not in COLUMNS:
            raise ValueError(
                f"EmojiText has no column {name!r}: choose one of {', '.join(COLUMNS)}"
            )
        return list(self._columns[name])


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the data set's files from the original list and pictures."""
    show_any_text()
    parser = argparse.ArgumentParser(
        prog="python -m protoclip_jax.data.emoji_text", description=main.__doc__
    )
    parser.add_argument("--pairs", type=place, required=True, help="pairs.tsv")
    parser.add_argument(
        "--images", type=place, required=True, help="the zip of the pictures in the list"
    )
    parser.add_argument(
        "--out", type=place, required=True, help="folder to write emoji_text/1.0.0 in"
    )
    options = parser.parse_args(arguments)
    # Not at the top: reading needs no builder class, and tfds knows a class by its module.
    from protoclip_jax.data.emoji_text_builder import EmojiTextBuilder

    if not sys.stderr.isatty():
        import tensorflow_datasets as tfds

        tfds.disable_progress_bar()
    builder = EmojiTextBuilder(pairs=options.pairs, images=options.images, data_dir=options.out)
    if builder.is_prepared():
        parser.error(f"{builder.data_dir} is there already: remove it, or choose another --out")
    with tempfile.TemporaryDirectory() as downloads:  # tfds wants one, though nothing is loaded
        builder.download_and_prepare(download_dir=downloads)
    print(f"wrote {builder.data_dir}")


if __name__ == "__main__":
    main()
