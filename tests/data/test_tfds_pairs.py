"""Sets of TensorFlow Datasets, by name and folder, without TensorFlow; TFRecord where it may be."""

import importlib.util
import io
import json
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pair_files import caption, picture

from protoclip_jax.data.decoding import EMPTY, UnreadableImage
from protoclip_jax.data.emoji_text import EmojiText, embedded_directory
from protoclip_jax.data.sources import open_source, where
from protoclip_jax.data.tfds_pairs import TfdsPairs

EMOJI = {"text_feature": "title", "split": "val"}


class TinyPairs(tfds.core.GeneratorBasedBuilder):
    """Five pairs; captions also in a sequence, as COCO has them."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)

    def _info(self):
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "caption": tfds.features.Text(),
                    "captions": tfds.features.Sequence(
                        {"text": tfds.features.Text(), "id": np.int64}
                    ),
                    "label": np.int64,
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(5)}

    def _generate_examples(self, count):
        for row in range(count):
            texts = [{"text": f"{caption(row)} {i}", "id": i} for i in range(row % 3)]
            yield (
                row,
                {
                    "image": io.BytesIO(picture(row)),
                    "caption": caption(row),
                    "captions": texts,
                    "label": row,
                },
            )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tfds")
    TinyPairs(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


@pytest.fixture
def tiny(data_dir) -> str:
    return f"{data_dir}/tiny_pairs/1.0.0"


def test_a_prepared_folder():
    ours, theirs = open_source(str(embedded_directory()), **EMOJI), EmojiText("val")
    assert isinstance(ours, TfdsPairs)
    assert len(ours) == len(theirs)
    for row in (0, 17, len(ours) - 1):
        assert ours.read(row) == theirs.read(row)
    assert where(ours, 3).endswith("val row 3")
    with pytest.raises(IndexError):
        ours.read(len(ours))


def test_by_name(data_dir, monkeypatch):
    monkeypatch.setattr(
        tfds, "builder", lambda name: tfds.builder_from_directory(f"{data_dir}/{name}/1.0.0")
    )
    assert [open_source("tfds:tiny_pairs").caption(row) for row in range(5)] == [
        caption(row) for row in range(5)
    ]


def test_slices_and_fingerprints(tiny):
    whole, part = open_source(tiny), open_source(tiny, split="train[2:4]")
    assert len(part) == 2
    assert part.read(0) == whole.read(2)
    assert part.fingerprint != whole.fingerprint == open_source(tiny).fingerprint


def test_nested_texts_give_their_first(tiny):
    source = open_source(tiny, text_feature="captions/text")
    assert [source.caption(row) for row in range(3)] == ["", f"{caption(1)} 0", f"{caption(2)} 0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, r"no such split.*\['train'\]"),
        ({"text_feature": "title"}, "'title' is missing; the set has caption, captions/id"),
        ({"image_feature": "label"}, "'label' is no Image"),
        ({"text_feature": "label"}, "'label' is no Text"),
    ],
)
def test_wrong_options_name_what_there_is(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        open_source(tiny, **options)


def test_unknown_names_and_unprepared_sets(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="tfds:no_such_set_here cannot be opened") as caught:
        open_source("tfds:no_such_set_here")
    assert "\n" not in str(caught.value)
    unprepared = TinyPairs(data_dir=tmp_path)
    monkeypatch.setattr(tfds, "builder", lambda name: unprepared)
    with pytest.raises(ValueError, match=r"not prepared .*tfds build tiny_pairs"):
        open_source("tfds:tiny_pairs")


def test_pickles_as_its_names(tiny):
    source = open_source(tiny)
    source.read(0)
    content = pickle.dumps(source)
    assert len(content) < 1000
    assert pickle.loads(content).read(4) == source.read(4)


def test_no_tensorflow_is_loaded(tiny):
    code = (
        "import sys; from protoclip_jax.data.sources import open_source; "
        f"open_source({tiny!r}).read(1); print('tensorflow' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]


def as_tfrecord(tiny: str, folder: Path) -> str:
    """The same set, its examples in a TFRecord file (whose checksums nobody looks at)."""
    builder = tfds.builder_from_directory(tiny)
    raw = builder.as_data_source(
        "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    folder.mkdir()
    for path in Path(tiny).glob("*.json"):
        (folder / path.name).write_text(path.read_text())
    info = json.loads((folder / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with open(folder / "tiny_pairs-train.tfrecord-00000-of-00001", "wb") as file:
        for row in range(len(raw)):
            file.write(struct.pack("<QI", len(raw[row]), 0) + raw[row] + bytes(4))
    return str(folder)


def test_tfrecord_without_tensorflow_says_so(tiny, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find(name)
    )
    with pytest.raises(ValueError, match=r"TFRecord, which needs TensorFlow: pip install"):
        open_source(as_tfrecord(tiny, tmp_path / "t"))


def test_tfrecord_where_tensorflow_is(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    folder = as_tfrecord(tiny, tmp_path / "t")
    theirs, ours = open_source(tiny), open_source(folder)
    assert [ours.read(row) for row in range(5)] == [theirs.read(row) for row in range(5)]
    part = open_source(folder, split="train[3:]")
    assert len(part) == 2
    assert part.read(1) == theirs.read(4)
    file = next(Path(folder).glob("*tfrecord*"))
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cut short"):
        open_source(folder)


def test_an_example_without_a_picture_is_unreadable(tiny, monkeypatch):
    source = open_source(tiny)
    monkeypatch.setattr(source, "_example", lambda row: {"image": b"", "caption": b"text"})
    with pytest.raises(UnreadableImage) as caught:
        source.read(0)
    assert caught.value.reason == EMPTY
