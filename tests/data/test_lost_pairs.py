"""What is near a source's pairs and is none of them, or was lost, is told."""

import os
import socket
import tarfile
from pathlib import Path

import pytest
from pair_files import caption, picture, write_list, write_shards, write_tar

from protoclip_jax.data import pair_list, tar_index, tar_members, tar_samples, tars
from protoclip_jax.data.pair_list import PairList
from protoclip_jax.data.sources import open_source
from protoclip_jax.data.start_check import check_start, equal_captions
from protoclip_jax.data.tars import TarPairs
from protoclip_jax.data.teacher import open_teacher


def told(source) -> dict[str, str]:
    return {reason: str(left) for reason, left in source.report.items()}


def members(count: int) -> dict[str, bytes | str]:
    found = {}
    for number in range(count):
        found |= {f"{number:04}.jpg": picture(number), f"{number:04}.txt": caption(number)}
    return found


def test_tars_of_a_folder_in_upper_case_are_read(tmp_path):
    write_shards(tmp_path, 2, 3)
    os.rename(tmp_path / "00001.tar", tmp_path / "00001.TAR")
    write_tar(tmp_path / ".hidden.tar", members(2))
    source = open_source(str(tmp_path))
    assert len(source) == 6
    assert told(source) == {}


@pytest.mark.parametrize("name", ["1.tar.gz", "1.TAR.GZ", "1.tgz", "1.tar.zst", "1.tar.xz"])
def test_compressed_tars_beside_others_are_named(tmp_path, name):
    write_shards(tmp_path, 1, 3)
    (tmp_path / name).write_bytes(b"?")
    (tmp_path / "00000.tar.idx").write_bytes(b"of WebDataset")
    (tmp_path / "00000_stats.json").write_bytes(b"{}")
    assert told(open_source(str(tmp_path))) == {tars.COMPRESSED: f"1 ({name})"}


def test_tars_below_a_folder_are_named(tmp_path):
    write_shards(tmp_path, 1, 3)
    write_shards(tmp_path / "more", 2, 3)
    (tmp_path / "empty").mkdir()
    assert told(open_source(str(tmp_path))) == {tars.BELOW: "1 (more: 2 tars)"}
    assert told(open_source(str(tmp_path / "00000.tar"))) == {}  # which was meant


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("first", [1, 15, 29])
def test_a_tail_of_zeros_is_told(tmp_path, form, first):
    """As of a download into a file of the final size that broke off between two members."""
    path = write_tar(tmp_path / "0.tar", members(30), form)
    with tarfile.open(path) as archive:
        begin = archive.getmember(f"{first:04}.jpg").offset
    data = bytearray(Path(path).read_bytes())
    data[begin:] = bytes(len(data) - begin)
    data += bytes(-len(data) % 10_240 + 10_240 * 3)
    Path(path).write_bytes(data)
    source = TarPairs(path)
    assert len(source) == first
    assert told(source) == {tar_members.TAIL: f"1 (0.tar: from byte {begin} on)"}
    assert told(TarPairs(path)) == told(source)  # of the kept index


@pytest.mark.parametrize("blocking", [2, 20, 64, 128, 512, 2048])
def test_what_fills_a_tar_up_is_not_told(tmp_path, blocking):
    path = write_tar(tmp_path / "0.tar", members(3))
    data = Path(path).read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % tar_members.BLOCK + 2 * tar_members.BLOCK)
    data += bytes(-len(data) % (blocking * tar_members.BLOCK))
    Path(path).write_bytes(data)
    assert told(TarPairs(path)) == {}


def test_tars_without_a_pair_are_named(tmp_path):
    write_shards(tmp_path, 1, 3)
    (tmp_path / "1.tar").write_bytes(bytes(10_240))
    write_tar(tmp_path / "2.tar", {"a.jpg": picture(1)})
    assert told(open_source(str(tmp_path))) == {
        tar_index.NO_PAIRS: "2 (1.tar, 2.tar)",
        tar_samples.NO_CAPTION: "1 (2.tar: a.jpg)",
    }


@pytest.mark.parametrize("encoding", ["utf-16le", "utf-16be", "utf-32le"])
def test_texts_with_nul_bytes_are_no_captions(tmp_path, encoding):
    others = {f"{n}.jpg": picture(n) for n in range(4)}
    texts = {"0.txt": "cap 0".encode(encoding), "1.json": {"caption": "a\0b"}}
    texts |= {"2.txt": b"of a C program\0", "3.txt": "plain"}
    source = TarPairs(write_tar(tmp_path / "0.tar", others | texts))
    assert [source.caption(row) for row in range(len(source))] == ["of a C program\0", "plain"]
    assert told(source) == {tar_samples.NOT_UTF8: "2 (0.tar: 0.txt, 0.tar: 1.json)"}
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"filepath\ttitle\n0.jpg\tc\0a\0p\0\n1.jpg\tplain\n\0.jpg\tplain\n")
    pairs = PairList(str(path))
    assert [pairs.caption(row) for row in range(len(pairs))] == ["plain"]
    assert {why: found.lines for why, found in pairs.report.items()} == {pair_list.NUL: [2, 4]}


@pytest.mark.parametrize("name", ["f.tsv", "f.tar", "f.npy"])
@pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    else:
        path.symlink_to("/dev/zero")
    opened = open_source if name != "f.npy" else lambda path: open_teacher(path, 3)
    with pytest.raises((ValueError, OSError), match="no regular file"):
        opened(str(path))


@pytest.mark.parametrize("separator", [",", ";"])
@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ('filepath,"a,b",title,extra', "{path},zz,{caption},EXTRA"),
        ('"a,""b""",filepath,title', "zz,{path},{caption}"),
        ('"title","x,y,z","filepath"', "{caption},zz,{path}"),
    ],
)
def test_a_header_is_read_as_the_rows_are(tmp_path, header, cells, separator):
    lines = [header, *(cells.format(path=f"{n}.jpg", caption=f"caption {n}") for n in range(3))]
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(line.replace(",", separator) for line in lines) + "\n")
    pairs = PairList(str(path), separator=separator)
    assert [pairs.cells(row) for row in range(len(pairs))] == [
        (str(tmp_path / f"{n}.jpg"), f"caption {n}") for n in range(3)
    ]


def test_one_column_is_not_both(tmp_path):
    with pytest.raises(ValueError, match="image_column and caption_column are both 'filepath'"):
        PairList(write_list(tmp_path, 3), caption_column="filepath")


def test_quotes_and_spaces_that_mislead_are_named(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("filepath\ttitle\n" + "".join(f'"{n}.jpg"\t"caption {n}"\n' for n in range(9)))
    with pytest.raises(ValueError, match="its quotes belong to the name"):
        check_start(PairList(str(path)))
    path.write_text('filepath, title\n0.jpg, "cap, 0"\n1.jpg, cap 1\n')
    pairs = PairList(str(path), separator=",")
    assert {why: found.lines for why, found in pairs.report.items()} == {
        pair_list.SPACE_AT_QUOTES: [2]
    }


class Captions:
    name = fingerprint = "captions"

    def __init__(self, texts):
        self.texts = texts

    def read(self, row):
        return b"", self.texts[row]

    def __len__(self):
        return len(self.texts)

    def caption(self, row):
        return self.texts[row]


@pytest.mark.parametrize("text", ["None", "nan", "a photo"])
def test_captions_that_are_one_text_are_told(text):
    different = [f"caption {n}" for n in range(100)]
    line = equal_captions(Captions([text] * 300 + different))
    assert line is not None
    assert line.startswith(f"warning: 48 of 64 captions looked at are {text!r}: ")
    assert equal_captions(Captions([text] * 90 + different)) is None
    assert equal_captions(Captions([text] * 3)) is None  # nobody trains on these
