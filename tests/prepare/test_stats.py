"""Statistics of a source against a plain count of the same."""

import json
import os
import sys

import pytest
from pair_files import Unlooked, picture, spoiled, write_shards

from protoclip_jax.data.sources import open_source
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.prepare.__main__ import main
from protoclip_jax.prepare.scripts import scripts_of
from protoclip_jax.prepare.stats import describe, measure
from protoclip_jax.storage.screen import CUT

LONG = "word " * 100


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("list")
    rows = [
        ("a.jpg", "a red kite"),
        ("b.jpg", "Привет, kite"),
        ("copy_of_a.jpg", "a red kite"),  # pair, picture and caption repeated
        ("a.jpg", LONG),  # picture repeated
        ("c.png", "風船 🎈"),
        ("d.jpg", "123 !?"),
        ("cut.jpg", "cut"),
        ("missing.jpg", "gone"),
        ("e.webp", "ελληνικά"),
        ("f.jpg", ""),  # left out by the list
    ]
    for name, number, size, form in (
        ("a.jpg", 1, (40, 30), "JPEG"),
        ("copy_of_a.jpg", 1, (40, 30), "JPEG"),
        ("b.jpg", 2, (100, 200), "JPEG"),
        ("c.png", 3, (50, 50), "PNG"),
        ("d.jpg", 4, (64, 48), "JPEG"),
        ("e.webp", 5, (80, 60), "WEBP"),
    ):
        (folder / name).write_bytes(picture(number, size, form))
    (folder / "cut.jpg").write_bytes(spoiled(picture(6), "cut"))
    lines = ["filepath\ttitle", *("\t".join(row) for row in rows)]
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / "pairs.tsv")


def test_pairs_without_a_caption_are_counted():
    numbers = measure(Unlooked(["a dog", "&nbsp;", "\u200b"]), progress=False)
    assert (numbers["readable"], numbers["unreadable"]) == (1, {"no caption": 2})


def test_every_number(path):
    numbers = measure(open_source(path), progress=False)
    assert numbers["rows"] == 9
    assert numbers["left_out"] == {"no caption": 1}
    assert numbers["readable"] == 7
    assert numbers["unreadable"] == {"truncated image": 1, "missing file": 1}
    assert numbers["repeated"] == {"pictures": 2, "captions": 1, "pairs": 1}
    captions = numbers["captions"]
    assert captions["scripts"] == {
        "Latin": 4, "Cyrillic": 1, "Han": 1, "no letters": 1, "Greek": 1
    }  # fmt: skip
    assert captions["share_cut"] == 1 / 7
    lengths = Tokenizer().lengths(["a red kite", LONG])
    assert captions["tokens"]["most"] == lengths[1] > 77
    assert captions["characters"]["least"] == len("風船 🎈")
    assert captions["characters"]["most"] == len(LONG)
    pictures = numbers["pictures"]
    assert pictures["formats"] == {"JPEG": 5, "PNG": 1, "WebP": 1}
    assert pictures["shorter_side"] == {
        "least": 30, "5 %": 30, "median": 48, "95 %": 100, "most": 100,
        "mean": round((30 * 3 + 100 + 50 + 48 + 60) / 7, 2),
    }  # fmt: skip
    assert pictures["longer_side"]["most"] == 200


def test_workers_count_the_same(path, monkeypatch):
    import protoclip_jax.prepare.stats as stats

    source = open_source(path)
    whole = measure(source, progress=False)
    monkeypatch.setattr(stats, "_BLOCK", 2)
    assert measure(source, progress=False) == whole
    assert measure(source, workers=2, progress=False) == whole


def test_text_and_json(path, tmp_path, capsys):
    target = tmp_path / "stats.json"
    assert main(["stats", path, "--workers", "1", "--json", str(target)]) == 0
    said = capsys.readouterr().out
    numbers = json.loads(target.read_text())
    assert numbers == measure(open_source(path), progress=False)
    assert describe(numbers) in said
    for part in ("9 rows", "truncated image       1 (11.11%)", "cut at 77 tokens       14.29%"):
        assert part in said


@pytest.mark.parametrize("lines", [1, 5000])
def test_a_reader_that_has_left_ends_it_quietly(path, lines, tmp_path, capsys, monkeypatch):
    import protoclip_jax.prepare.stats as stats

    # Less and more than what Python holds back.
    monkeypatch.setattr(stats, "describe", lambda numbers: "a line\n" * lines)
    command = ["stats", path, "--workers", "1", "--json", str(tmp_path / "stats.json")]
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w") as out:
        patch.setattr(sys, "stdout", out)
        assert main(command) == CUT
        out.flush()
    assert "Broken pipe" not in capsys.readouterr().err
    assert json.loads((tmp_path / "stats.json").read_text())["rows"] == 9


def test_of_tars(tmp_path):
    numbers = measure(open_source(write_shards(tmp_path, 2, 2)), progress=False)
    assert (numbers["rows"], numbers["readable"]) == (4, 4)


def test_nothing_readable(tmp_path):
    (tmp_path / "pairs.tsv").write_text("filepath\ttitle\na.jpg\tb\n")
    numbers = measure(open_source(str(tmp_path / "pairs.tsv")), progress=False)
    assert numbers["readable"] == 0
    assert "missing file" in describe(numbers)


def test_a_missing_source_is_one_line(capsys):
    assert main(["stats", "nowhere"]) == 2
    assert "no such file or folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "scripts"),
    [
        ("plain", {"Latin"}),
        ("Käse", {"Latin"}),
        ("12 + 3", set()),
        ("カメラ and 写真", {"Katakana", "Latin", "Han"}),
        ("한국", {"Hangul"}),
        ("قطة", {"Arabic"}),
        ("🎈", set()),
        ("1º piso, 2ª", {"Latin"}),  # letters whose names begin with MASCULINE and FEMININE
        ("\uff21\uff22 ｶﾒﾗ", {"Latin", "Katakana"}),
        ("コーヒー", {"Katakana"}),  # with a mark that is of both kana
        ("\U0001d41b\U0001d428", {"Common"}),
        ("ᓄᓇᕗᑦ", {"Canadian Aboriginal"}),
        ("ߒߞߏ ᥖᥭᥰ", {"Nko", "Tai Le"}),
        ("ɢʰ ℵ", {"Latin"}),
        ("नमस्ते", {"Devanagari"}),
        ("〆切 々", {"Han"}),
    ],
)
def test_scripts(text, scripts):
    assert scripts_of(text) == scripts
