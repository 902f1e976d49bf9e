"""Sets of TensorFlow Datasets, by name and folder, without TensorFlow; TFRecord where it may be."""

import importlib.util
import io
import json
import pickle
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from pair_files import caption, picture

from protoclip_jax.data.decoding import BROKEN, EMPTY, UnreadableImage
from protoclip_jax.data.emoji_text import EmojiText, embedded_directory
from protoclip_jax.data.sources import open_source, where
from protoclip_jax.data.tfds_pairs import TfdsPairs
from protoclip_jax.prepare import __main__ as prepare

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
    for split, pairs in (("[:4]", 4), ("[-2:]", 2), ("[3:5]", 2), ("[:2]+train[4:]", 3)):
        assert len(open_source(tiny, split=f"train{split}")) == pairs
    assert part.fingerprint != whole.fingerprint == open_source(tiny).fingerprint


def test_nested_texts_give_their_first(tiny):
    source = open_source(tiny, text_feature="captions/text")
    assert [source.caption(row) for row in range(3)] == ["", f"{caption(1)} 0", f"{caption(2)} 0"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, r"no such split.*\['train'\]"),
        ({"split": "train[3:1]"}, r"the split 'train\[3:1\]' ends before it begins"),
        ({"split": "train[3:2]"}, r"the split 'train\[3:2\]' ends before it begins"),
        ({"split": "train[80%:20%]"}, r"'train\[80%:20%\]' ends before it begins"),
        ({"split": "train[-1:-3]"}, r"'train\[-1:-3\]' ends before it begins"),
        ({"split": "train[3:1]+train[:4]"}, r"'train\[3:1\]\+train\[:4\]' ends before it begins"),
        ({"split": "train[:4]+train[3:2]"}, r"'train\[:4\]\+train\[3:2\]' ends before it begins"),
        ({"split": "train[2:2]"}, r"train\[2:2\] holds 0 pairs"),
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


def without(name: str):
    return lambda folder: next(folder.glob(name)).unlink()


def rewritten(name: str, change):
    def spoil(folder: Path) -> None:
        path = next(folder.glob(name))
        path.write_bytes(change(path.read_bytes()))

    return spoil


def replaced(name: str, old: str, new: str):
    def change(content: bytes) -> bytes:
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return rewritten(name, change)


IMAGE = "tensorflow_datasets.core.features.image_feature.Image"
# What became of a set's folder, and the line that names the file.
SPOILED = {
    "a missing shard": (
        without("*array_record*"),
        r"tiny_pairs-train.array_record-00000-of-00001 is missing: copy",
    ),
    "a cut shard": (
        rewritten("*array_record*", lambda data: data[:-70_000]),
        r"train.array_record-00000-of-00001 is damaged or cut",
    ),
    "an empty shard": (
        rewritten("*array_record*", lambda data: b""),
        r"train.array_record-00000-of-00001 is damaged or cut",
    ),
    "a shard of another set": (
        replaced("dataset_info.json", '"5"', '"4"'),
        r"holds 5 records, and its set says 4",
    ),
    "no features": (without("features.json"), r"features.json is missing: copy"),
    "cut info": (
        rewritten("dataset_info.json", lambda data: b"{"),
        r"dataset_info.json is damaged",
    ),
    "info that is a list": (
        rewritten("dataset_info.json", lambda data: b"[1]"),
        r"dataset_info.json is damaged",
    ),
    "info of another kind": (
        replaced("dataset_info.json", '"name"', '"nome"'),
        r"dataset_info.json or features.json is damaged",
    ),
    "deep info": (
        rewritten("dataset_info.json", lambda data: b"[" * 100_000),
        r"dataset_info.json is damaged",
    ),
    "features cut": (
        rewritten("features.json", lambda data: data[: len(data) // 2]),
        r"features.json is damaged",
    ),
    "features that are no text": (
        rewritten("features.json", lambda data: b"\xff" + data),
        r"features.json is damaged",
    ),
    "features of no kind": (
        replaced("features.json", '"image": {', '"emage": {'),
        r"features.json is damaged",
    ),
    "a foreign class": (
        replaced("features.json", IMAGE, "foreign_module.Image"),
        "names the class 'foreign_module.Image'",
    ),
    "a shard elsewhere": (
        replaced("dataset_info.json", "{DATASET}-", "../{DATASET}-"),
        "which is not in that folder",
    ),
    "shards elsewhere": (
        replaced("dataset_info.json", '"tiny_pairs"', '"../1.0.0/tiny_pairs"'),
        "which is not in that folder",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_set_is_refused_at_the_start_by_name(tiny, tmp_path, monkeypatch, what):
    """TFDS-01."""
    spoil, message = SPOILED[what]
    folder = tmp_path / "1.0.0"
    shutil.copytree(tiny, folder)
    spoil(folder)
    monkeypatch.setattr(TfdsPairs, "read", None)  # before any record is read
    (tmp_path / "foreign_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_source(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_foreign_class_in_a_string_of_json_is_refused(tmp_path):
    inner = json.dumps({"image": {"type": "foreign_module.Image", "content": {}}})
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "features.json").write_text(json.dumps({"jsonFeature": {"json": inner}}))
    with pytest.raises(ValueError, match=r"names the class 'foreign_module.Image'"):
        open_source(str(tmp_path))


def test_commands_tell_a_missing_shard_in_a_line(tiny, tmp_path, capsys):
    folder = tmp_path / "1.0.0"
    shutil.copytree(tiny, folder)
    without("*array_record*")(folder)
    for command in (["stats", str(folder)], ["convert", str(folder), "--out", str(tmp_path / "o")]):
        assert prepare.main([*command, "--workers=1"]) == 2
        assert re.fullmatch("protoclip_jax: .*of-00001 is missing.*\n", capsys.readouterr().err)


def test_an_example_that_is_damaged_is_unreadable(tiny, monkeypatch):
    source = open_source(tiny)
    for record in (b"\xff\xff", b"\n\x05abcde"):
        monkeypatch.setattr(source, "_records", [record] * 5)
        with pytest.raises(UnreadableImage) as caught:
            source.read(0)
        assert caught.value.reason == BROKEN


def test_an_example_without_a_picture_is_unreadable(tiny, monkeypatch):
    source = open_source(tiny)
    monkeypatch.setattr(source, "_example", lambda row: {"image": b"", "caption": b"text"})
    with pytest.raises(UnreadableImage) as caught:
        source.read(0)
    assert caught.value.reason == EMPTY
