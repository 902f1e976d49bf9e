"""Pair lists: every broken row named, every good one read, at any length."""

import importlib.util
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from protoclip_jax.data import list_lines, pair_list
from protoclip_jax.data.pair_list import PairList

CASES = Path(__file__).parents[1] / "cases"


def case_list(case: str, name: str = "pairs.tsv", **options) -> PairList:
    return PairList(str(CASES / case / name), **options)


def case_facts(case: str) -> dict:
    return json.loads((CASES / case / "case.json").read_text())


def written_rows(case: str, name: str = "pairs.tsv") -> list[list[str]]:
    """The rows of a case's list, read the plain way."""
    text = (CASES / case / name).read_bytes().decode("utf-8-sig", errors="replace")
    return [line.split("\t") for line in text.rstrip("\n").split("\n")[1:]]


def captions(pairs: PairList) -> list[str]:
    return [pairs.cells(row)[1] for row in range(len(pairs))]


def write(folder: Path, content: str | bytes, name: str = "pairs.tsv") -> str:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def assert_good_rows_survive(case: str, reason: str) -> None:
    bad, rows = case_facts(case)["bad_rows"], written_rows(case)
    pairs = case_list(case)
    assert captions(pairs) == [row[1] for i, row in enumerate(rows) if i not in bad]
    assert {name: dropped.count for name, dropped in pairs.report.items()} == {reason: len(bad)}
    assert pairs.report[reason].lines == [i + 2 for i in bad]
    for row in range(len(pairs)):
        data, caption = pairs.read(row)
        assert data[:2] == b"\xff\xd8"
        assert caption != "nan"


def test_missing_captions_are_dropped_and_counted():
    assert_good_rows_survive("TSV-01", pair_list.NO_CAPTION)


def test_quotes_are_ordinary_in_tab_separated_lists():
    pairs = case_list("TSV-03")
    assert captions(pairs) == [row[1] for row in written_rows("TSV-03")]
    assert len(pairs) == case_facts("TSV-03")["n_rows"]
    assert pairs.report == {}


@pytest.mark.parametrize(
    ("name", "found"), [("comma.tsv", "filepath,title"), ("other_names.tsv", "'image', 'caption'")]
)
def test_wrong_columns_are_named_with_the_option(name, found):
    with pytest.raises(ValueError, match="wanted 'filepath' and 'title'") as error:
        case_list("TSV-05", name)
    assert found in str(error.value)
    assert "image_column and caption_column, or separator" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_options_that_the_message_names_help():
    assert len(case_list("TSV-05", "comma.tsv", separator=",")) == 8
    renamed = case_list("TSV-05", "other_names.tsv", image_column="image", caption_column="caption")
    assert len(renamed) == 8


def test_columns_are_found_by_name():
    pairs = case_list("TSV-05", "swapped_ok.tsv")
    assert captions(pairs) == [row[0] for row in written_rows("TSV-05", "swapped_ok.tsv")]
    assert pairs.read(0)[0][:2] == b"\xff\xd8"


def test_byte_order_mark_is_not_part_of_a_name():
    assert len(case_list("TSV-07")) == case_facts("TSV-07")["n_rows"]


def test_a_row_that_is_not_utf8_is_dropped_with_its_line():
    assert_good_rows_survive("TSV-09", pair_list.NOT_UTF8)


def test_utf16_is_refused_by_name():
    with pytest.raises(ValueError, match=r"utf16.tsv is encoded in UTF-16 .* wanted UTF-8"):
        case_list("TSV-09", "utf16.tsv")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_without_a_mark_too(tmp_path, encoding):
    path = write(tmp_path, "filepath\ttitle\na.jpg\ta cat\n".encode(encoding))
    with pytest.raises(ValueError, match=f"is encoded in {encoding[:6].upper()}"):
        PairList(path)


@pytest.mark.parametrize("name", ["zero.tsv", "header_only.tsv"])
def test_lists_without_pairs_are_refused(name):
    with pytest.raises(ValueError, match="0 pairs"):
        case_list("TSV-11", name)


def test_a_list_of_bad_rows_says_why_it_holds_no_pairs(tmp_path):
    path = write(tmp_path, "filepath\ttitle\na.jpg\t\n\tb\n")
    with pytest.raises(ValueError, match=r"0 pairs .*no caption: 1 \(line 2\); no path: 1"):
        PairList(path)


def test_relative_paths_start_at_the_list(tmp_path, monkeypatch):
    monkeypatch.chdir(CASES)
    pairs = PairList(os.path.join("TSV-13", "pairs.tsv"))
    monkeypatch.chdir(tmp_path)
    pairs = pickle.loads(pickle.dumps(pairs))
    assert pairs.where(0) == str(CASES / "TSV-13" / "images" / "ok00.jpg")
    assert pairs.read(0)[0]
    assert {reason: dropped.count for reason, dropped in pairs.report.items()} == {
        pair_list.NO_PATH: 1
    }


def test_relative_paths_start_at_the_image_root(tmp_path):
    path = write(tmp_path, f"filepath\ttitle\nok00.jpg\ta\n{CASES}/TSV-13/images/ok01.jpg\tb\n")
    pairs = PairList(path, image_root=str(CASES / "TSV-13" / "images"))
    assert pairs.read(0)[0] != pairs.read(1)[0]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_line_ends(tmp_path, end, last):
    content = end.join(["filepath\ttitle", "a.jpg\ta cat", "b.jpg\ta dog"]) + end * last
    pairs = PairList(write(tmp_path, content))
    assert captions(pairs) == ["a cat", "a dog"]
    assert pairs.report == {}


def test_every_kind_of_bad_row_is_named(tmp_path):
    lines = {
        "a.jpg\tone": None,
        "": pair_list.EMPTY_LINE,
        "b.jpg\t\u3000\u00a0": pair_list.NO_CAPTION,
        "c.jpg\t\u732b": None,
        " \ttwo": pair_list.NO_PATH,
        "d.jpg\tthree\tfour": pair_list.TOO_MANY_COLUMNS,
        "e.jpg\tline\u2028separators\x0bare\x85text": None,
        "\u56fe.jpg\tfive": None,
    }
    pairs = PairList(write(tmp_path, "\n".join(["filepath\ttitle", *lines])))
    assert captions(pairs) == [
        line.split("\t")[1] for line, reason in lines.items() if reason is None
    ]
    found = {reason: dropped.lines for reason, dropped in pairs.report.items()}
    assert found == {
        reason: [i + 2] for i, reason in enumerate(lines.values()) if reason is not None
    }


def test_commas_follow_csv_within_a_line(tmp_path):
    rows = [
        'a.jpg,"a cat, asleep"',
        'b.jpg,"a ""big"" dog"',
        'c.jpg,a 12" record',
        'd.jpg,"a caption',
        'over two lines"',
        "e.jpg,plain",
        'f.jpg,"one" two',
    ]
    pairs = PairList(
        write(tmp_path, "\n".join(["filepath,title", *rows, ""]), "p.csv"), separator=","
    )
    assert captions(pairs) == ["a cat, asleep", 'a "big" dog', 'a 12" record', "plain", "one two"]
    assert {reason: dropped.lines for reason, dropped in pairs.report.items()} == {
        pair_list.BROKEN_QUOTES: [5],
        pair_list.CONTINUED: [6],
    }


def plain_reading(content: bytes) -> list[tuple[str, str]]:
    pairs = []
    for line in content.removesuffix(b"\n").split(b"\n")[1:]:
        try:
            cells = line.decode().split("\t")
        except UnicodeDecodeError:
            continue
        if len(cells) in (2, 3) and cells[0].strip() and cells[1].strip():
            pairs.append((cells[0], cells[1]))
    return pairs


@pytest.mark.parametrize("seed", range(8))
def test_scan_equals_a_plain_reading(tmp_path, monkeypatch, seed):
    """Random lists, in chunks of a few lines and with few line starts kept."""
    rng = np.random.default_rng(seed)
    monkeypatch.setattr(list_lines, "_CHUNK", int(rng.integers(1, 200)))
    monkeypatch.setattr(pair_list, "_STRIDE", int(rng.integers(1, 9)))
    cells = [
        b"x",
        b"",
        b" ",
        "\u732b".encode(),
        b"\xff",
        b'5"',
        b"a longer cell",
        "\u3000".encode(),
    ]
    lines = [
        b"\t".join(cells[i] for i in rng.integers(0, len(cells), rng.integers(0, 5)))
        for _ in range(int(rng.integers(100, 300)))
    ]
    content = b"filepath\ttitle\tother\n" + b"\n".join(lines) + b"\n" * int(rng.integers(0, 2))
    expected = plain_reading(content)
    pairs = PairList(write(tmp_path, content))
    root = str(tmp_path)
    assert [pairs.cells(row) for row in range(len(pairs))] == [
        (os.path.join(root, path), caption) for path, caption in expected
    ]
    total = content[content.index(b"\n") + 1 :].removesuffix(b"\n").count(b"\n") + 1
    assert len(pairs) + sum(dropped.count for dropped in pairs.report.values()) == total


def test_rows_outside_are_refused():
    pairs = case_list("TSV-03")
    for row in (-1, len(pairs)):
        with pytest.raises(IndexError, match=f"which has {len(pairs)}"):
            pairs.read(row)


def test_a_copy_for_a_worker_is_small_and_equal(tmp_path):
    line = "images/{:07d}.jpg\ta caption of ordinary length about a picture\n"
    rows = 200_000
    path = write(tmp_path, "filepath\ttitle\n" + "".join(line.format(i) for i in range(rows)))
    pairs = PairList(path)
    shipped = pickle.dumps(pairs)
    assert len(shipped) < 0.3 * rows  # bytes
    copy = pickle.loads(shipped)
    for row in (0, 31, 32, 12_345, rows - 1):
        assert copy.cells(row) == pairs.cells(row)
        assert f"{row:07d}" in copy.where(row)


def test_fingerprint_follows_content_not_place(tmp_path):
    content = "filepath\ttitle\na.jpg\ta cat\nb.jpg\ta dog\n"
    here = PairList(write(tmp_path, content))
    (tmp_path / "other").mkdir()
    assert PairList(write(tmp_path / "other", content)).fingerprint == here.fingerprint
    swapped = "filepath\ttitle\nb.jpg\ta dog\na.jpg\ta cat\n"
    assert PairList(write(tmp_path / "other", swapped)).fingerprint != here.fingerprint
    with_title = content.replace("title", "caption")
    other = PairList(write(tmp_path / "other", with_title), caption_column="caption")
    assert other.fingerprint == here.fingerprint


@pytest.mark.parametrize("separator", ["", "\t\t", '"', "\n", "\u3001"])
def test_impossible_separators(separator):
    with pytest.raises(ValueError, match="one ASCII character"):
        case_list("TSV-03", separator=separator)


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """A quarter of a byte a row is kept."""
    rows, path = 1_000_000, tmp_path / "list.tsv"
    block = "".join(f"{row:05}.jpg\ta caption of this picture\n" for row in range(100_000))
    with path.open("w") as file:
        file.write("filepath\ttitle\n")
        for _ in range(rows // 100_000):
            file.write(block)
    tracemalloc.start()
    try:
        opened = PairList(str(path))
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(opened) == rows
    assert kept < 0.5 * rows
    assert peak < 60e6  # blocks of 4 MB and what is found in them, whatever the length


@pytest.fixture
def readable(monkeypatch):
    """Sets the schemes that can be read."""

    def set_to(*schemes: str) -> None:
        monkeypatch.setattr(pair_list, "readable_schemes", lambda: schemes)
        pair_list._foreign.cache_clear()

    yield set_to
    pair_list._foreign.cache_clear()


def test_foreign_addresses_are_faults_of_their_rows(tmp_path, readable):
    readable("gs")
    rows = {
        "a.jpg\tsee https://example.org for more": None,
        "https://example.org/b.jpg\ta link": pair_list.WEB % "https",
        " HTTP://example.org/c.jpg\ta link": pair_list.WEB % "HTTP",
        "gs://bucket/d.jpg\ta bucket": None,
        "s3a://bucket/e.jpg\tanother": "s3a://: no way to read s3a://, use gs:// or a local path",
        "file:///f.jpg\ta file": "file://: give a local path as it is, without file://",
        "pages/http://g.jpg\ta folder called so": None,
        "xgs://h.jpg\talike": "xgs://: no way to read xgs://, use gs:// or a local path",
        "https.jpg\tplain": None,
    }
    pairs = PairList(write(tmp_path, "\n".join(["filepath\ttitle", *rows])))
    assert {reason: dropped.lines for reason, dropped in pairs.report.items()} == {
        reason: [line] for line, reason in enumerate(rows.values(), 2) if reason
    }
    assert len(pairs) == 4
    assert pairs.where(1) == "gs://bucket/d.jpg"
    assert pairs.where(2).startswith(str(tmp_path))
    only = "filepath\ttitle\nhttps://h.example/a.jpg\ta\nhttps://h.example/b.jpg\tb\n"
    with pytest.raises(ValueError, match=r"0 pairs .*\(https://\): get .*download`: 2 \(line 2, 3"):
        PairList(write(tmp_path, only))
    with pytest.raises(ValueError, match="no way to read https://"):
        PairList(write(tmp_path, "filepath\ttitle\na.jpg\ta\n"), image_root="https://h.example")


def test_a_scheme_without_its_package_says_so(monkeypatch, readable):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    readable()
    assert pair_list._foreign("s3") == "s3:// needs a package: pip install s3fs"


def dropped_lines(pairs: PairList) -> dict[str, list[int]]:
    return {reason: dropped.lines for reason, dropped in pairs.report.items()}


@pytest.mark.parametrize("chunk", [1, 40, 2**22])
def test_a_quoted_caption_over_lines_is_never_cut(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(list_lines, "_CHUNK", chunk)
    rows = ['a.jpg,"one', "evil.jpg,looks like a row", "", 'end"', "b.jpg,two", 'c.jpg,"open']
    pairs = PairList(
        write(tmp_path, "\n".join(["filepath,title", *rows, "d.jpg,three"])), separator=","
    )
    assert captions(pairs) == ["two", "three"]
    assert dropped_lines(pairs) == {pair_list.BROKEN_QUOTES: [2, 7], pair_list.CONTINUED: [3, 4, 5]}
    # With tabs, where the lines are a row together only.
    rows = ['a.jpg\t"one', "", 'end"\tx', "b.jpg\ttwo\tx", 'c.jpg\t"so\tx', 'd.jpg\the" said\tx']
    pairs = PairList(write(tmp_path, "\n".join(["filepath\ttitle\tother", *rows])))
    assert captions(pairs) == ["two", '"so', 'he" said']
    assert dropped_lines(pairs) == {pair_list.BROKEN_QUOTES: [2], pair_list.CONTINUED: [3, 4]}


@pytest.mark.parametrize("separator", ["\t", ","])
@pytest.mark.parametrize("columns", [2, 3])
def test_repeated_pairs_are_counted(tmp_path, monkeypatch, separator, columns):
    monkeypatch.setattr(list_lines, "_CHUNK", 100)
    rows = [(f"{i % 30}.jpg", f"caption {i % 20}", str(i)) for i in range(100)]
    lines = [separator.join(row[:columns]) for row in rows] + ["", f"x{separator}"]
    head = separator.join(["filepath", "title", "other"][:columns])
    pairs = PairList(write(tmp_path, "\r\n".join([head, *lines])), separator=separator)
    repeats = pairs.repeats()
    assert (repeats.count, repeats.one_in) == (100 - len({row[:2] for row in rows}), 1)


def test_repeats_of_many_rows_are_estimated(monkeypatch):
    monkeypatch.setattr(list_lines, "_HASHES", 500)
    repeats = list_lines.Repeats()
    for start in range(0, 20_000, 1000):
        repeats.add([b"%d" % (i % 15_000) for i in range(start, start + 1000)])
    assert repeats.one_in > 1
    assert 3000 < repeats.count < 8000  # 5000
    repeats = list_lines.Repeats()
    for _ in range(5):
        repeats.add([b"same"] * 400)
    assert (repeats.count, repeats.one_in) == (1999, 1)
