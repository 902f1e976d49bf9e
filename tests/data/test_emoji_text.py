"""The embedded data set: complete, in order, small, quick to open, safe in workers."""

import csv
import io
import multiprocessing
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import protoclip_jax.data.emoji_text as emoji_text
from protoclip_jax.data.emoji_text import COLUMNS, SPLITS, TEMPLATES, EmojiText

ROWS = {"train": 6804, "val": 766, "test": 1605}
CONCEPTS = {"train": 1442, "val": 163, "test": 1605}


@pytest.fixture(scope="module")
def splits() -> dict[str, EmojiText]:
    return {split: EmojiText(split) for split in SPLITS}


@pytest.mark.core
def test_splits_hold_what_they_measure(splits):
    vendors, concepts = {}, {}
    for split, source in splits.items():
        assert len(source) == ROWS[split]
        assert source.name == f"emoji_text/{split}"
        vendors[split] = set(source.column("vendor"))
        concepts[split] = set(source.column("concept"))
        assert len(concepts[split]) == CONCEPTS[split]
        assert {len(source.column(name)) for name in COLUMNS} == {len(source)}
    assert not concepts["train"] & concepts["val"]
    assert not vendors["test"] & (vendors["train"] | vendors["val"])
    assert len(vendors["train"]) == 6
    assert len(set().union(*(source.column("group") for source in splits.values()))) == 9
    assert len(set().union(*(source.column("subgroup") for source in splits.values()))) == 96


def test_rows_belong_together(splits):
    source = splits["train"]
    columns = [source.column(name) for name in COLUMNS]
    first = ("images/noto/1f600.webp", "grinning face", "grinning face")
    at = source.column("filepath").index(first[0])
    assert tuple(column[at] for column in columns) == (
        *first,
        "smileys-emotion",
        "face-smiling",
        "noto",
    )
    assert len(set(source.column("filepath"))) == len(source)
    for row in (0, np.int64(5), len(source) - 1):
        data, caption = source.read(row)
        assert caption == source.column("title")[row]
        image = Image.open(io.BytesIO(data))
        assert (image.format, image.size, image.mode) == ("WEBP", (64, 64), "RGB")


def test_at_most_ten_megabytes_with_licences():
    folder = emoji_text.embedded_directory().parent
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    licences = {path.name for path in (folder / "licences").iterdir()}
    assert {"Apache-2.0.txt", "CC-BY-4.0.txt", "MIT.txt", "Unicode-3.0.txt"} <= licences


def test_opens_and_reads_through_tfds_without_tensorflow():
    """As a TFDS data set of its own, by folder and by name, pictures decoded by tfds too."""
    code = """
import sys
import tensorflow_datasets as tfds
from protoclip_jax.data.emoji_text import embedded_directory
from protoclip_jax.data.emoji_text_builder import EmojiTextBuilder
folder = embedded_directory()
for builder in (
    tfds.builder_from_directory(str(folder)),
    tfds.builder("emoji_text", data_dir=str(folder.parents[1])),
):
    source = builder.as_data_source("val")
    assert len(source) == 766
    assert source[3]["image"].shape == (64, 64, 3)
    assert builder.info.features["concept"].num_classes == 1605
assert "tensorflow" not in sys.modules and "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tells_one_content_from_another(splits):
    prints = {source.fingerprint for source in splits.values()}
    assert len(prints) == 3
    assert EmojiText("val").fingerprint == splits["val"].fingerprint


def test_works_in_a_spawned_worker(splits):
    source = splits["val"]
    source.column("title")
    assert len(pickle.dumps(source)) < 1000
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(source.read, (7,)) == source.read(7)


def test_wrong_names_and_rows_are_refused(splits, tmp_path):
    with pytest.raises(ValueError, match="no split 'valid': choose one of train, val, test"):
        EmojiText("valid")
    with pytest.raises(ValueError, match="no column 'artist'"):
        splits["val"].column("artist")
    for row in (-1, 766):
        with pytest.raises(IndexError, match=f"row {row} of emoji_text/val, which has 766"):
            splits["val"].read(row)
    with pytest.raises(ValueError, match="holds no prepared EmojiText"):
        len(EmojiText("val", tmp_path))


def test_prompts_are_frames_that_captions_use(splits):
    captions = splits["train"].column("title")
    concepts = splits["train"].column("concept")
    for template in TEMPLATES:
        framed = [template.format(concept) for concept in concepts]
        assert sum(map(str.__eq__, captions, framed)) > 50, template


def write_original(folder: Path, source: EmojiText, rows: range) -> list[dict[str, str]]:
    """A pair list and an archive of some rows, as the data set was first made from."""
    columns = {name: source.column(name) for name in COLUMNS}
    table = [{name: columns[name][row] for name in COLUMNS} for row in rows]
    for number, entry in enumerate(table):
        entry["split"] = SPLITS[number % 3]
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for row, entry in zip(rows, table, strict=True):
            archive.writestr(entry["filepath"], source.read(row)[0])
    with open(folder / "pairs.tsv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(
            file, [*COLUMNS, "split"], delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n"
        )
        writer.writeheader()
        writer.writerows(table)
    return table


def build(folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "protoclip_jax.data.emoji_text", "--out", str(folder / "out")]
    files = ["--pairs", str(folder / "pairs.tsv"), "--images", str(folder / "images.zip")]
    return subprocess.run(command + files, capture_output=True, text=True)


def test_made_again_from_the_original_files(splits, tmp_path):
    table = write_original(tmp_path, splits["train"], range(40, 100))
    table[4]["title"] = '"a lone quote, caf\u00e9'
    lines = (tmp_path / "pairs.tsv").read_text(encoding="utf-8").splitlines()
    lines[5] = "\t".join(table[4].values())
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    for split in SPLITS:
        made = EmojiText(split, tmp_path / "out" / "emoji_text" / "1.0.0")
        rows = [entry for entry in table if entry["split"] == split]
        assert len(made) == len(rows)
        for name in COLUMNS:
            assert made.column(name) == [entry[name] for entry in rows]
        with zipfile.ZipFile(tmp_path / "images.zip") as archive:
            for row, entry in enumerate(rows):
                assert made.read(row) == (archive.read(entry["filepath"]), entry["title"])
    again = build(tmp_path)
    assert again.returncode != 0
    assert "is there already" in again.stderr


def test_a_list_without_a_column_is_refused(splits, tmp_path):
    write_original(tmp_path, splits["val"], range(3))
    text = (tmp_path / "pairs.tsv").read_text()
    (tmp_path / "pairs.tsv").write_text(text.replace("subgroup", "kind", 1))
    assert "add ['subgroup']" in build(tmp_path).stderr
