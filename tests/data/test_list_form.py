"""Lists that are none: each is named as what it is, in one line, with the way out."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from protoclip_jax.data import pair_list
from protoclip_jax.data.list_form import HEAD, refuse_other_forms
from protoclip_jax.data.pair_list import PairList
from protoclip_jax.data.sources import open_source
from protoclip_jax.prepare.link_list import find_layout

LIST = b"filepath\ttitle\na.jpg\ta cat\n"


def zipped(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, LIST)
    return file.getvalue()


def tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        info = tarfile.TarInfo("pairs.tsv")
        info.size = len(LIST)
        archive.addfile(info, io.BytesIO(LIST))
    return file.getvalue()


def table(write) -> bytes:
    file = io.BytesIO()
    write(pa.table({"filepath": ["a.jpg"], "title": ["a cat"]}), file)
    return file.getvalue()


def streamed(table: pa.Table, file) -> None:
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


ROWS = [{"filepath": "a.jpg", "title": "a cat"}] * 2
FORMS = {
    "gz": (gzip.compress(LIST), "compressed with gzip: unpack it: `gunzip -k LIST`"),
    "bz2": (bz2.compress(LIST), "compressed with bzip2: unpack it: `bunzip2 -k LIST`"),
    "xz": (lzma.compress(LIST), "compressed with xz: unpack it: `unxz -k LIST`"),
    "zst": (b"\x28\xb5\x2f\xfd\x20" + LIST, "compressed with Zstandard: unpack it: `unzstd LIST`"),
    "zip": (zipped("pairs.tsv"), "a zip archive: unpack it: `unzip LIST`"),
    "xlsx": (zipped("[Content_Types].xml", "xl/workbook.xml"), "an Excel workbook: save it as tab"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504), "an Excel workbook: save it as tab"),
    "tar": (tarred(), "a tar archive: give it a name that ends in .tar"),
    "parquet": (table(pyarrow.parquet.write_table), "a Parquet table: .*read_parquet"),
    "feather": (table(pyarrow.feather.write_feather), "an Arrow .Feather. table: .*read_feather"),
    "arrow": (table(streamed), "an Arrow stream: write it as UTF-8 text"),
    "jsonl": (
        "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        r"an object a line \(jsonl\): .*read_json\(\"LIST\", lines=True\)",
    ),
    "json": (json.dumps(ROWS).encode(), "JSON: .*read_json"),
    "json2": (json.dumps(ROWS, indent=2).encode(), "JSON: .*read_json"),
    "json3": (json.dumps(ROWS * 200).encode(), "JSON: .*read_json"),
    "html": (b"\n<!DOCTYPE html><html>404", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS"),
    "pkl": (b"\x80\x04\x95\x00", "a Python pickle: pickles are not opened"),
    "utf-16": ("\ufeff".encode("utf-16-le") + LIST.decode().encode("utf-16-le"), "UTF-16"),
    "utf-16-be": (LIST.decode().encode("utf-16-be"), "UTF-16 .big endian., .*iconv -f UTF-16"),
    "utf-32-le": (LIST.decode().encode("utf-32-le"), "UTF-32, wanted UTF-8: .*iconv -f UTF-32"),
}


@pytest.mark.parametrize("form", FORMS)
def test_other_forms_are_named_whatever_their_name(tmp_path, form):
    content, told = FORMS[form]
    for name in (f"list.{form}", f"list.tsv.{form}", "list.tsv"):
        path = tmp_path / name
        path.write_bytes(content)
        if form == "tar" and name != "list.tsv":
            continue  # a source of its own
        with pytest.raises(ValueError, match=told.replace("LIST", name)) as error:
            open_source(str(path))
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
    if form not in ("gz", "bz2", "xz"):  # which `download` reads
        with pytest.raises(ValueError, match=told.replace("LIST", "list.tsv")):
            find_layout(str(tmp_path / "list.tsv"))


@pytest.mark.parametrize(
    "head",
    [
        LIST,
        b"\xef\xbb\xbf" + LIST,
        b"[image]\ttitle\n",
        b"{image}\ttitle\n",
        b"PAR1S\ttitle\n",
        b"BZhang\ttitle\n",
        b"name\0of the file\ttitle\n",
        "\u56fe\u50cf\t\u6807\u9898\n".encode(),
        b"",
        b"x",
    ],
)
def test_text_is_let_through(head):
    refuse_other_forms("list.tsv", head[:HEAD])


def refusal(tmp_path, content: str, **options) -> str:
    path = tmp_path / "pairs.tsv"
    path.write_text(content, encoding="utf-8", newline="")
    with pytest.raises(ValueError, match=r"pairs\.tsv") as error:
        PairList(str(path), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_lists_with_other_columns_are_named(tmp_path):
    links = "a red bus\thttps://h.example/{}.jpg\n" * 3
    assert "is separated by ';'" in refusal(tmp_path, "filepath;title\na.jpg;a cat\n")
    assert "separator=';'" in refusal(tmp_path, "filepath;title\na.jpg;a cat\n")
    assert "looks separated by '|'" in refusal(tmp_path, "image|caption\na.jpg|a cat\n")
    for rows in (links, "https://h.example/{}.jpg\ta red bus\n", "a bus,http://h.example/1\n"):
        told = refusal(tmp_path, rows)
        assert "is a list of links without a header" in told
        assert "prepare download" in told
    assert "is a list of links: " in refusal(tmp_path, "caption\turl\n" + links)
    told = refusal(tmp_path, "images/a.jpg\ta cat\n")
    assert "has no header" in told
    assert r"write 'filepath\ttitle' above it" in told
    assert r"write 'title,filepath' above it" in refusal(tmp_path, "a cat,images/a.PNG\n")
    told = refusal(tmp_path, "image\tcaption\na.jpg\ta cat\n")
    assert "has no header" not in told
    assert "set image_column and caption_column" in told


def test_old_line_ends_are_named(tmp_path):
    told = refusal(tmp_path, "filepath\ttitle\ra.jpg\ta cat\rb.jpg\ta dog\r")
    assert "carriage returns alone" in told
    assert r"tr '\r' '\n'" in told
    # A header of today over lines of old: no row is made of several.
    for ends in ("\r", "\r\r"):
        told = refusal(tmp_path, f"filepath\ttitle\na.jpg\ta cat{ends}b.jpg\ta dog{ends}")
        assert f"{pair_list.OLD_LINE_ENDS}: 1 (line 2)" in told
    # Also where two rows together have no more cells than the header.
    told = refusal(tmp_path, "filepath\ttitle\tother\na.jpg\ta cat\rb.jpg\ta dog\n")
    assert f"{pair_list.OLD_LINE_ENDS}: 1 (line 2)" in told
