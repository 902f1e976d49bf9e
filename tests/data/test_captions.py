"""What counts as a caption, in every kind of source."""

import collections

import numpy as np
import pytest
from pair_files import Unlooked, picture, write_tar

from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.decoding import NO_CAPTION, UnreadableImage
from protoclip_jax.data.pair_list import PairList
from protoclip_jax.data.sources import open_source, read_pair
from protoclip_jax.data.start_check import check_start
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.prepare.link_list import find_layout, links

BLANK = [
    "",
    " \t ",
    "\u00a0\u3000\u2003",
    "&nbsp;",
    " &nbsp;&ensp;&#160; &#xA0;",
    "&amp;nbsp;",
    "&#8203;",
    "&zwj;&ZeroWidthSpace;&shy;",
    "&#0;\x01\x7f",
    "\u200b\u200c\u200d\u2060\ufeff\u00ad",
    "\u2028\u2029",
    "\u202e\u202c",
    "\ufe0f",
    "\u034f\u3164\u115f\uffa0\u2800",
    "\U000e0001\U000e0041\U000e0100",
    "\u00e2\u20ac\u2039",  # a zero-width space in the wrong encoding
    "\x1b[0m\x1b[36m",
    "<end_of_text>",
    "&lt;end_of_text&gt; a dog",
    "<START_of_text> <end_of_text> a dog",
]
SAID = [
    "a",
    ".",
    "&",
    "&amp;",
    "&nbsp;a",
    "& co",
    "<b>a",
    "a\x1b[0m",
    "&lt;br&gt;",
    "<end>",
    "a <end_of_text>",
    "\u200ba",
    "\u200b犬",
    "狗",
    "🙂",
    "👨\u200d👩",
    "é",
    "e\u0301",
    "\u0301",
    "€",
    "!",
    "\U0001fae9",  # an emoji newer than Python's tables
    "\ue000",  # a font's own
]


@pytest.mark.parametrize("text", BLANK)
def test_text_without_anything_to_see_is_no_caption(text):
    assert not is_caption(text)


@pytest.mark.parametrize("text", SAID)
def test_text_with_anything_to_see_is_a_caption(text):
    assert is_caption(text)


def test_the_short_way_agrees_with_the_long_one():
    """A visible ASCII character settles it; every character of a caption is looked at otherwise."""
    rng = np.random.default_rng(0)
    parts = [text for text in (*BLANK, *SAID) if text and "of_text" not in text]
    for _ in range(300):
        chosen = [parts[i] for i in rng.integers(0, len(parts), 3)]
        text = " ".join(chosen)
        ids = Tokenizer()(text)[0]
        if is_caption(text):
            assert ids.argmax() > 1, text  # the tower sees more than start and end
        else:
            assert all(not is_caption(part) for part in chosen), text


def test_lists_drop_and_count_them(tmp_path):
    blank = [text for text in BLANK if "\t" not in text and text]
    rows = [*blank, *SAID]
    (tmp_path / "0.jpg").write_bytes(picture(0))
    path = tmp_path / "pairs.tsv"
    path.write_text(
        "filepath\ttitle\n" + "".join(f"0.jpg\t{text}\n" for text in rows), encoding="utf-8"
    )
    pairs = PairList(str(path))
    assert [pairs.caption(row) for row in range(len(pairs))] == SAID
    assert {why: dropped.count for why, dropped in pairs.report.items()} == {NO_CAPTION: len(blank)}
    assert pairs.report[NO_CAPTION].lines == [2, 3, 4, 5, 6]


def test_rows_that_are_dropped_enter_the_fingerprint(tmp_path, monkeypatch):
    path = tmp_path / "pairs.tsv"
    path.write_text("filepath\ttitle\na.jpg\t&nbsp;\nb.jpg\tb\n")
    now = PairList(str(path)).fingerprint
    monkeypatch.setattr("protoclip_jax.data.pair_list.is_caption", lambda text: True)
    assert PairList(str(path)).fingerprint != now


def test_tars_leave_them_out(tmp_path):
    members = {}
    for number, text in enumerate([*BLANK, *SAID]):
        members |= {f"{number:03}.jpg": picture(number), f"{number:03}.txt": text}
    source = open_source(write_tar(tmp_path / "set" / "0.tar", members))
    assert [source.caption(row) for row in range(len(source))] == SAID
    assert source.report[NO_CAPTION].count == len(BLANK)


def test_downloads_leave_them_out(tmp_path):
    path = tmp_path / "list.tsv"
    path.write_text("url\tcaption\nhttp://x/1.jpg\t&nbsp;\nhttp://x/2.jpg\ta dog\n")
    dropped = collections.Counter()
    found = list(links(str(path), find_layout(str(path)), dropped))
    assert [link.caption for link in found] == ["a dog"]
    assert dropped == {NO_CAPTION: 1}


def test_other_sources_meet_them_when_they_are_read():
    source = Unlooked([*BLANK, *SAID])
    for row, text in enumerate(source.captions):
        if text in SAID:
            assert read_pair(source, row) == (picture(row), text)
        else:
            with pytest.raises(UnreadableImage, match="no caption"):
                read_pair(source, row)
    share = check_start(source, sample=len(source), limit=1.0)
    assert share == len(BLANK) / len(source)
    with pytest.raises(ValueError, match=r"cannot be read.*no caption"):
        check_start(Unlooked(BLANK))
