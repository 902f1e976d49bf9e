"""Lists of links: the columns of the usual ones are found, and every row is a link or counted."""

import bz2
import collections
import gzip
import lzma

import numpy as np
import pytest

from protoclip_jax.prepare.link_list import find_layout, links, photo_ids

URL = "https://example.org/{}.jpg"


def written(tmp_path, lines, name="list.tsv", end="\n"):
    path = tmp_path / name
    path.write_bytes(end.join(lines).encode() + end.encode())
    return str(path)


def read(path, **options):
    dropped = collections.Counter()
    chosen = options.pop("chosen", None)
    layout = find_layout(path, **options)
    return layout, list(links(path, layout, dropped, chosen)), dict(dropped)


def test_conceptual_captions(tmp_path):
    # Captions of CC3M hold bare quotes, which are no quotes.
    lines = [f'a "{i} inch tv\t{URL.format(i)}' for i in range(5)]
    layout, rows, dropped = read(written(tmp_path, lines))
    assert (layout.header, layout.url, layout.captions) == (False, 1, (0,))
    assert "Conceptual Captions" in str(layout)
    assert "no header" in str(layout)
    assert [tuple(row) for row in rows[:2]] == [
        (1, URL.format(0), 'a "0 inch tv'),
        (2, URL.format(1), 'a "1 inch tv'),
    ]
    assert not dropped


def test_cc12m(tmp_path):
    lines = [f"{URL.format(i)}\tcaption {i}, with <PERSON>" for i in range(5)]
    layout, rows, _ = read(written(tmp_path, lines))
    assert (layout.header, layout.url, layout.captions) == (False, 0, (1,))
    assert "CC12M" in str(layout)
    assert rows[4].caption == "caption 4, with <PERSON>"


def test_conceptual_captions_with_labels(tmp_path):
    lines = [f"caption {i}\t{URL.format(i)}\tcat,dog\t/m/1,/m/2" for i in range(5)]
    layout, rows, _ = read(written(tmp_path, lines))
    assert (layout.url, layout.captions) == (1, (0,))
    assert len(rows) == 5


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("caption\turl", "text\t{}"),
        ("URL\tTEXT\tsimilarity", "{}\ttext\t0.3"),
        ("photoid\ttitle\tdownloadurl\tpageurl", "7\ttext\t{}\thttps://page"),
    ],
)
def test_a_header_names_the_columns(tmp_path, header, row):
    layout, rows, _ = read(written(tmp_path, [header] + [row.format(URL.format(1))] * 3))
    assert layout.header
    assert rows[0] == (2, URL.format(1), "text")
    assert len(rows) == 3


def test_a_comma_separated_list_with_quotes(tmp_path):
    lines = ["url,caption", f'{URL.format(1)},"a, b"', f'{URL.format(2)},"open']
    layout, rows, dropped = read(written(tmp_path, lines, "list.csv", end="\r\n"))
    assert layout.separator == ","
    assert rows == [(2, URL.format(1), "a, b")]
    assert dropped == {"quotes that do not end on the line": 1}


def test_given_columns_win(tmp_path):
    lines = [f"1\tdescription {i}\ttitle {i}\t{URL.format(i)}\tx" for i in range(3)]
    path = written(tmp_path, lines)
    with pytest.raises(ValueError, match="no header and 5 columns, links in \\[3\\]"):
        find_layout(path)
    _, rows, _ = read(path, url_column="3", caption_column="2")
    assert rows[1].caption == "title 1"
    named = written(tmp_path, ["a\tb\tlink", f"x\ty\t{URL.format(1)}"], "named.tsv")
    assert read(named, caption_column="b")[1][0].caption == "y"
    with pytest.raises(ValueError, match=r"no column 'c' .*\['a', 'b', 'link'\]"):
        find_layout(named, caption_column="c")
    with pytest.raises(ValueError, match="give --caption-column"):
        find_layout(named)


def test_every_row_is_a_link_or_counted(tmp_path):
    lines = [f"caption {i}\t{URL.format(i)}" for i in range(8)]
    lines += ["caption\tnot a link", "only one column", "", f" \t{URL.format(9)}"]
    path = tmp_path / "list.tsv"
    path.write_bytes(("\ufeff" + "\n".join(lines) + "\n").encode() + b"\xff\t" + b"http://x/y\n")
    _, rows, dropped = read(str(path))
    assert dropped == {
        "no URL": 1, "too few columns": 1, "empty line": 1, "no caption": 1, "not UTF-8": 1
    }  # fmt: skip
    assert rows[0].caption == "caption 0"  # the byte-order mark is none of it
    assert len(rows) + sum(dropped.values()) == len(lines) + 1


def yfcc(
    photo, title="A+title", description="With+%3Cb%3Etags%3C%2Fb%3E+%26amp%3B", video=0, new=True
):
    cells = [str(photo), "user", "nick", "date", "0", "camera", title, description, "tags", ""]
    cells += ["1.5", "2.5", "10", "https://page/1", f"http://farm/{photo}.jpg", "licence"]
    cells += ["https://licence", "1", "2", "secret", "orig", "jpg", str(video)]
    return "\t".join(["0", str(photo), "hash", *cells[1:]] if new else cells)


@pytest.mark.parametrize("new", [False, True])
def test_the_table_of_yfcc100m(tmp_path, new):
    lines = [yfcc(i, new=new) for i in range(4)] + [yfcc(9, video=1, new=new)]
    lines += [yfcc(5, title="", description="", new=new)]
    layout, rows, dropped = read(written(tmp_path, lines))
    assert "YFCC100M" in str(layout)
    assert rows[2] == (3, "http://farm/2.jpg", "A title With tags &")
    assert dropped == {"a video": 1, "no caption": 1}
    ids = np.array([1, 3])
    _, rows, dropped = read(written(tmp_path, lines), chosen=ids)
    assert [row.url for row in rows] == ["http://farm/1.jpg", "http://farm/3.jpg"]
    assert dropped == {"not among the photo ids": 3, "a video": 1}


def test_photo_ids(tmp_path):
    path = written(tmp_path, ["11\t3\tab", "12\t1\tcd"], "ids.tsv")
    assert photo_ids(path).tolist() == [1, 3]
    assert photo_ids(written(tmp_path, ["5", "4"], "plain.txt")).tolist() == [4, 5]
    with pytest.raises(ValueError, match="line 2 holds no photo id"):
        photo_ids(written(tmp_path, ["5", f"{'9' * 30}", "4"], "long.txt"))
    with pytest.raises(ValueError, match="--photo-ids"):
        find_layout(path)


@pytest.mark.parametrize("module", [gzip, bz2, lzma])
def test_compressed_lists_whatever_their_name(tmp_path, module):
    path = tmp_path / "list.tsv"
    whole = module.compress(f"a\t{URL.format(1)}\n".encode())
    path.write_bytes(whole)
    assert read(str(path))[1] == [(1, URL.format(1), "a")]
    path.write_bytes(whole[:-6])
    with pytest.raises(ValueError, match=r"its compression is damaged .*: fetch it anew"):
        read(str(path))
    path.write_bytes(module.compress(b"PK\3\4"))
    with pytest.raises(ValueError, match=r"list\.tsv, unpacked, is a zip archive"):
        read(str(path))


def test_a_first_row_without_a_link_is_a_row(tmp_path):
    """LIST-02."""
    good = [f"caption {i}\t{URL.format(i)}" for i in range(5)]
    for first in ("a red bus\thttps://h.example/a b.jpg", "a red bus by the sea\t", "\tx y z"):
        layout, rows, dropped = read(written(tmp_path, [first, *good]))
        assert not layout.header
        assert (len(rows), dropped) == (5, {"no URL": 1})
    layout, rows, dropped = read(written(tmp_path, ["", "what\twhere", "", *good]))
    assert "a header (what, where)" in str(layout)
    assert (len(rows), dropped) == (5, {"empty line": 2})
    assert rows[0].line == 4


def test_separators_within_captions(tmp_path):
    """LIST-02."""
    url = URL.format(1)
    cc12m = [f"{url}\tfirst", f"{url}\ta dog\tin the park", f"{url}\tx\t\ty"]
    assert [r.caption for r in read(written(tmp_path, cc12m))[1]] == [
        "first", "a dog in the park", "x  y"
    ]  # fmt: skip
    cc3m = [f"first\t{url}", f"a dog\tin the park\t{url}", *[f"more\t{url}"] * 9]
    assert [r.caption for r in read(written(tmp_path, cc3m))[1]][:3] == [
        "first", "a dog in the park", "more"
    ]  # fmt: skip
    commas = ["url,caption", f"{url},a dog, in the park"]
    assert read(written(tmp_path, commas))[1][0].caption == "a dog, in the park"
    # Where the caption is not at an end, nobody knows what is its.
    middle = ["url\tcaption\tscore", f"{url}\ta\t1", f"{url}\ta dog\tin the park\t1"]
    _, rows, dropped = read(written(tmp_path, middle))
    assert (len(rows), dropped) == (1, {"more columns than the header": 1})


def test_quoted_captions_over_lines_are_never_cut(tmp_path):
    url = URL.format(1)
    for separator in "\t,":
        caption_last = [f"url{separator}caption", f'{url}{separator}"two', 'lines"']
        caption_first = [f"caption{separator}url", '"two', f'lines"{separator}{url}']
        for lines in (caption_last, caption_first):
            good = separator.join(["a", url] if lines is caption_first else [url, "a"])
            _, rows, dropped = read(written(tmp_path, [*lines, *[good] * 9]))
            assert [row.caption for row in rows] == ["a"] * 9
            assert sum(dropped.values()) == 2
            assert dropped["quotes that do not end on the line"] == 1
    # Bare quotes of whole rows are characters.
    _, rows, dropped = read(written(tmp_path, [f'"so\t{url}', f'he" said\t{url}']))
    assert (len(rows), dropped) == (2, {})


def test_other_separators_and_line_ends(tmp_path):
    rows = [f"a dog, a cat;{URL.format(i)}" for i in range(3)]
    layout, found, _ = read(written(tmp_path, rows))
    assert layout.separator == ";"
    assert found[0].caption == "a dog, a cat"
    with pytest.raises(ValueError, match="carriage returns alone"):
        read(written(tmp_path, [f"a\t{URL.format(1)}"] * 3, end="\r"))
    glued = [f"{URL.format(1)}\ta", f"{URL.format(2)}\ta\r{URL.format(3)}\tb"]
    _, found, dropped = read(written(tmp_path, glued))
    assert (len(found), list(dropped.values())) == (1, [1])


def test_missing_and_empty_lists(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such list"):
        find_layout(str(tmp_path / "none.tsv"))
    with pytest.raises(ValueError, match="is empty"):
        find_layout(written(tmp_path, [""]))
