"""Teacher files: checked whole at the start, read a few rows at a time."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from protoclip_jax.data import npy_table
from protoclip_jax.data import teacher as teacher_module
from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.data.seen_files import SourceChanged
from protoclip_jax.data.sources import open_source
from protoclip_jax.data.teacher import embedded_teacher, open_teacher
from protoclip_jax.data.teacher_note import TeacherNote, note_path, write_note
from protoclip_jax.episodes import kmeans_lloyd

CASES = Path(__file__).parents[1] / "cases"


def saved(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def rows_of(case: str) -> int:
    return len(open_source(str(CASES / case / "pairs.tsv")))


def refused(path: Path, rows: int) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        open_teacher(path, rows)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("file", "count"), [("teacher_11.npy", 11), ("teacher_13.npy", 13)])
def test_another_number_of_rows_is_refused(file, count):
    """TEACH-01."""
    message = refused(CASES / "TEACH-01" / file, rows_of("TEACH-01"))
    assert f"{count} rows" in message
    assert "12 pairs" in message


def test_an_object_array_is_refused_and_never_loaded():
    """TEACH-03."""
    assert "object array" in refused(CASES / "TEACH-03" / "teacher.npy", rows_of("TEACH-03"))


def test_rows_that_are_not_finite_are_refused():
    """TEACH-05."""
    message = refused(CASES / "TEACH-05" / "teacher.npy", rows_of("TEACH-05"))
    assert "2 rows" in message
    assert "row 4 " in message


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(12, np.float32),
        np.zeros((12, 2, 2), np.float32),
        np.zeros((12, 0), np.float32),
        np.zeros((12, 4), np.int32),
        np.zeros((12, 4), np.complex64),
        np.array([["a"]] * 12),
    ],
    ids=lambda array: f"{array.dtype.name}{array.shape}",
)
def test_what_is_no_table_of_numbers_is_refused(array, tmp_path):
    assert "(12, width)" in refused(saved(tmp_path / "t.npy", array), 12)


def test_other_files_are_refused(tmp_path):
    whole = saved(tmp_path / "whole.npy", np.zeros((12, 4), np.float32)).read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-8])
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "t.npz", np.zeros((12, 4)))
    for name in ("cut.npy", "empty.npy", "t.npz"):
        assert "not a .npy file" in refused(tmp_path / name, 12)
    with pytest.raises(FileNotFoundError):
        open_teacher(tmp_path / "none.npy", 12)


def normal(rows: int = 12, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(rows, 4)) * scale).astype(np.float32)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((12, 4), np.float32), "all 12 rows are 0"),
        (-np.zeros((12, 4), np.float16), "all 12 rows are 0"),
        (normal(scale=1e-30), "all 12 rows are 0, or too small to be squared"),
        (normal().astype(np.float64) * 1e-200, "all 12 rows are 0, or too small to be squared"),
        (np.ones((12, 4), np.float32), "all 12 rows are alike"),
        (np.tile(np.float64([1, 2, 3, 4]), (12, 1)), "all 12 rows are alike"),
        # They differ in float64 only.
        (1 + np.arange(48).reshape(12, 4) * 1e-12, "all 12 rows are alike"),
        (normal(scale=1e30), "12 rows with numbers that are not finite, or whose squares"),
    ],
)
def test_features_that_say_nothing_are_refused(array, words, tmp_path, monkeypatch):
    assert words in refused(saved(tmp_path / "t.npy", array), 12)
    monkeypatch.setattr(npy_table, "_BLOCK", 50)  # a few rows
    assert words in refused(saved(tmp_path / "t.npy", array), 12)


def test_one_row_whose_square_is_too_large_is_refused(tmp_path):
    array = normal()
    array[7] = 1e19
    assert "row 7 " in refused(saved(tmp_path / "t.npy", array), 12)


def test_empty_rows_are_counted(tmp_path):
    array = normal()
    assert open_teacher(saved(tmp_path / "t.npy", array), 12).empty == 0
    array[[2, 5]], array[9] = 0, 1e-30
    assert open_teacher(saved(tmp_path / "t.npy", array), 12).empty == 3
    assert open_teacher(saved(tmp_path / "one.npy", array[:1]), 1).empty == 0  # alike, but one


def test_clustering_takes_the_lengths_that_are_taken_here():
    assert kmeans_lloyd._LARGEST_SQUARE == teacher_module.LONGEST


def test_too_large_for_float32_is_not_finite(tmp_path):
    array = np.zeros((5, 3))
    array[2, 1] = 1e300
    assert "row 2 " in refused(saved(tmp_path / "t.npy", array), 5)


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("block", [1, 1000, 2**26])
def test_rows_come_in_the_order_asked_for_as_float32(dtype, order, block, tmp_path, monkeypatch):
    monkeypatch.setattr(npy_table, "_BLOCK", block)
    rng = np.random.default_rng(0)
    array = np.asarray(rng.normal(size=(97, 5)), dtype=dtype, order=order)
    teacher = open_teacher(saved(tmp_path / "t.npy", array), 97)
    assert (len(teacher), teacher.width) == (97, 5)
    indices = rng.integers(0, 97, 40)
    found = teacher.rows(indices)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array[indices].astype(np.float32))
    np.testing.assert_array_equal(teacher.rows(np.arange(97)[::-1]), array[::-1].astype(np.float32))
    assert teacher.rows(np.zeros(0, np.int64)).shape == (0, 5)
    for outside in (-1, 97):
        with pytest.raises(IndexError, match=f"row {outside} of"):
            teacher.rows(np.array([3, outside]))


def test_fingerprint_tells_rows_and_their_order(tmp_path, monkeypatch):
    array = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)
    swapped, changed = array.copy(), array.copy()
    swapped[[7, 8]] = swapped[[8, 7]]
    changed[49, 3] += 1e-6
    files = {
        name: saved(tmp_path / f"{name}.npy", content)
        for name, content in (
            ("first", array),
            ("same", array),
            ("swapped", swapped),
            ("changed", changed),
            ("half", array.astype(np.float16)),
        )
    }
    prints = {name: open_teacher(file, 50).fingerprint for name, file in files.items()}
    assert prints["first"] == prints["same"]
    assert len(set(prints.values())) == 4
    monkeypatch.setattr(npy_table, "_BLOCK", 100)
    assert open_teacher(files["first"], 50).fingerprint == prints["first"]


def test_memory_grows_by_what_is_read_not_by_the_file(tmp_path):
    code = f"""
import resource
import numpy as np
from protoclip_jax.data.teacher import open_teacher

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

rows = 4_000_000
path = {str(tmp_path / "t.npy")!r}
file = np.lib.format.open_memmap(path, "w+", np.float16, (rows, 64))  # 512 MB, a sparse file
file[::1000] = 1
del file
peak_before = peak()
teacher = open_teacher(path, rows)
indices = np.random.default_rng(0).integers(0, rows, 100_000)
features = teacher.rows(indices)  # 26 MB
print(peak() - peak_before)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert float(result.stdout) < 250


@pytest.mark.core
def test_embedded_features_belong_to_emoji_text():
    source = EmojiText("train")
    teacher = open_teacher(embedded_teacher(), len(source))
    assert teacher.width == 64
    assert teacher.path == str(embedded_teacher("train"))
    features = teacher.rows(np.arange(len(source)))
    # Rows with one caption have one row of features.
    captions = source.column("title")
    first = {}
    for row, caption in enumerate(captions):
        first.setdefault(caption, row)
    twins = np.array([first[caption] for caption in captions])
    assert (twins != np.arange(len(captions))).sum() > 500
    np.testing.assert_allclose(features, features[twins], atol=2e-3)
    # Pairs of one concept lie nearer to each other than pairs in general.
    near = {}
    for row, concept in enumerate(source.column("concept")):
        near.setdefault(concept, []).append(features[row])
    within = np.mean([np.var(np.array(rows), axis=0).sum() for rows in near.values()])
    assert within < 0.3 * np.var(features, axis=0).sum()


def test_embedded_features_say_which_pairs_they_are_for():
    note = open_teacher(embedded_teacher(), 6804, EmojiText("train")).note
    assert (note.source, note.pairs, note.dimensions) == ("emoji_text/train", 6804, 64)


class Pairs:
    """A source with a name and a fingerprint."""

    def __init__(self, fingerprint: str, name: str = "pairs.tsv", count: int = 12):
        self.fingerprint, self.name, self.count = fingerprint, name, count

    def __len__(self):
        return self.count

    def read(self, row):
        raise NotImplementedError


@pytest.fixture
def noted(tmp_path) -> Path:
    """A teacher file of the pairs "abc", with its note."""
    path = saved(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(12, 4)))
    numbers = open_teacher(path, 12).fingerprint
    write_note(path, TeacherNote("pairs.tsv", "abc", 12, "bert", 4, numbers))
    return path


def test_a_file_without_a_note_is_taken(tmp_path):
    path = saved(tmp_path / "t.npy", normal())
    assert open_teacher(path, 12, Pairs("abc")).note is None


def test_a_file_of_other_pairs_is_refused(noted):
    assert open_teacher(noted, 12, Pairs("abc", "moved/pairs.tsv")).note.encoder == "bert"
    with pytest.raises(ValueError, match="was made for") as caught:
        open_teacher(noted, 12, Pairs("abd", "other.tsv"))
    message = str(caught.value)
    for part in ("pairs.tsv", "abc", "other.tsv", "abd", "limit and seed", str(noted)):
        assert part in message
    assert "\n" not in message


def test_another_order_limit_or_seed_is_refused(tmp_path):
    """Each of these sources has 12 pairs."""
    lines = [f"{row}.jpg\tcaption {row}" for row in range(13)]
    for name, rows in (("all", lines), ("first", lines[:12]), ("back", lines[11::-1])):
        (tmp_path / f"{name}.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    sources = [
        open_source(str(tmp_path / "first.tsv")),
        open_source(str(tmp_path / "back.tsv")),
        open_source(str(tmp_path / "all.tsv"), limit=12, seed=1),
        open_source(str(tmp_path / "all.tsv"), limit=12, seed=2),
    ]
    path = saved(tmp_path / "t.npy", normal())
    numbers = open_teacher(path, 12).fingerprint
    for own in sources:
        write_note(path, TeacherNote(own.name, own.fingerprint, 12, "bert", 4, numbers))
        assert open_teacher(path, 12, own).note.source == own.name
        for other in sources:
            if other is not own:
                with pytest.raises(ValueError, match="was made for"):
                    open_teacher(path, 12, other)


def test_another_file_beside_the_note_is_refused(noted):
    array = np.load(noted)
    array[[2, 3]] = array[[3, 2]]
    np.save(noted, array)
    for source in (None, Pairs("abc")):
        with pytest.raises(ValueError, match=r"not the file that t.npy.json was written for"):
            open_teacher(noted, 12, source)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "7", '{"format": "protoclip_jax teacher", "version": 1}']
)
def test_a_damaged_note_is_refused(text, noted):
    Path(note_path(noted)).write_text(text)
    with pytest.raises(ValueError, match=r"t.npy.json is damaged") as caught:
        open_teacher(noted, 12)
    assert "\n" not in str(caught.value)


def test_a_note_of_another_version_is_refused(noted):
    note = Path(note_path(noted))
    note.write_text(note.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match=r"version 2, wanted 'protoclip_jax teacher' 1"):
        open_teacher(noted, 12)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("fault", ["rewritten", "replaced", "cut", "emptied", "gone"])
def test_a_file_that_changes_under_a_run_is_told(order, fault, tmp_path):
    array = np.asarray(np.random.default_rng(0).normal(size=(97, 5)), order=order)
    path = saved(tmp_path / "t.npy", array)
    teacher, unread = open_teacher(path, 97), open_teacher(path, 97)
    wanted = teacher.rows(np.arange(97))
    os.utime(path, ns=(1, 1))  # touched
    np.testing.assert_array_equal(teacher.rows(np.arange(97)), wanted)
    if fault in ("rewritten", "replaced"):
        other = saved(tmp_path / "other.npy", array[::-1] if order == "C" else array + 1)
        if fault == "replaced":
            os.replace(other, path)
        else:
            path.write_bytes(other.read_bytes())
        os.utime(path, ns=(2, 2))
    elif fault == "gone":
        path.unlink()
    else:
        os.truncate(path, 0 if fault == "emptied" else 1000)
    for one in (teacher, unread):
        with pytest.raises(SourceChanged, match=r"t.npy (has changed under|is no longer there)"):
            one.rows(np.arange(97))


def test_splits_without_features_are_named():
    with pytest.raises(ValueError, match="none for 'val'"):
        embedded_teacher("val")
