"""EmojiText as a TensorFlow Datasets builder, run once to make the embedded ArrayRecord files."""

import csv
import io
import os
import zipfile

import tensorflow_datasets as tfds
from etils import epath

COLUMNS = ("filepath", "title", "concept", "group", "subgroup", "vendor", "split")
CITATION = """\
@misc{emojitext,
  title = {EmojiText: 9,175 drawings of 1,605 emoji by seven artists, with captions},
  note = {artwork: Noto, Noto v1, Twemoji, Fluent, EmojiOne 2, FxEmoji; text: emojibase},
}
"""
DESCRIPTION = """\
Image-text pairs: 1,605 emoji concepts drawn by seven artists, 64x64 WebP on white, with captions
made from the emoji's CLDR names and keywords. `val` holds concepts that `train` never shows,
`test` an artist that neither of them shows. Metadata has one entry a concept: its file's name
(a picture's path is images/VENDOR/NAME.webp) and its subgroup, and each subgroup's group.
"""


def read_pairs(path: str) -> list[dict[str, str]]:
    """Rows of a tab-separated list with the header `COLUMNS`; quotes are ordinary characters."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if missing := sorted(set(COLUMNS) - set(reader.fieldnames or ())):
            raise ValueError(
                f"{path} has the columns {list(reader.fieldnames or ())}: add {missing}"
            )
        return list(reader)


class EmojiTextBuilder(tfds.core.GeneratorBasedBuilder):
    """Writes EmojiText from its pair list and its archive of pictures, rows in the list's order.

    Arguments beside tfds's own: `pairs`, a list as `read_pairs` takes it, and `images`, the zip
    that the file paths are names in. Only `download_and_prepare` needs them.
    """

    name = "emoji_text"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012 (the form that tfds reads)
    # tfds would look this up through importlib_resources, a package that it does not declare.
    code_path = epath.Path(__file__)

    def __init__(self, *, pairs: str = "", images: str = "", **options):
        self._rows = read_pairs(pairs) if pairs else []
        self._images = os.fspath(images)
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        # A record costs 77 bytes of framing, and 12 more and the name for each feature; so what
        # follows from concept and vendor is kept once, in the metadata.
        return self.dataset_info_from_configs(
            description=DESCRIPTION,
            citation=CITATION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "title": tfds.features.Text(),
                    "concept": self._labels("concept"),
                    "vendor": self._labels("vendor"),
                }
            ),
            metadata=tfds.core.MetadataDict(concept_metadata(self._rows)),
            disable_shuffling=True,
        )

    def _labels(self, column: str) -> tfds.features.ClassLabel:
        names = sorted({row[column] for row in self._rows})
        return tfds.features.ClassLabel(names=names or None)

    def _split_generators(self, dl_manager):
        return {
            split: self._generate_examples(split)
            for split in dict.fromkeys(row["split"] for row in self._rows)
        }

    def _generate_examples(self, split: str):
        rows = [row for row in self._rows if row["split"] == split]
        with zipfile.ZipFile(self._images) as archive:
            for number, row in enumerate(rows):
                # Given a file, tfds keeps its bytes; an array it would encode again.
                image = io.BytesIO(archive.read(row["filepath"]))
                yield number, {"image": image} | {k: row[k] for k in ("title", "concept", "vendor")}


def concept_metadata(rows: list[dict[str, str]]) -> dict[str, list]:
    """File names and subgroups by concept label, and the subgroups' names and groups.

    Raises:
      ValueError: a row whose path, group or subgroup does not follow from concept and vendor.
    """
    by_concept = {}
    for row in rows:
        stem = os.path.basename(row["filepath"]).removesuffix(".webp")
        follows = (stem, row["group"], row["subgroup"])
        path = f"images/{row['vendor']}/{stem}.webp"
        if by_concept.setdefault(row["concept"], follows) != follows or row["filepath"] != path:
            raise ValueError(
                f"{row['filepath']}: path, group and subgroup must be the concept's "
                f"{by_concept[row['concept']]}, in the folder images/{row['vendor']}"
            )
    subgroups = sorted({(subgroup, group) for _, group, subgroup in by_concept.values()})
    concepts = [by_concept[concept] for concept in sorted(by_concept)]
    return {
        "file": [stem for stem, _, _ in concepts],
        "subgroup": [subgroups.index((subgroup, group)) for _, group, subgroup in concepts],
        "subgroup_names": [subgroup for subgroup, _ in subgroups],
        "subgroup_groups": [group for _, group in subgroups],
    }
