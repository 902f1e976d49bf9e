"""Tar shards in WebDataset's layout: indexed once, read at random, damage refused."""

import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pair_files import caption, picture, write_shards, write_tar

import protoclip_jax.data.tar_index as tar_index
from protoclip_jax.data.sources import PairSource, open_source, where
from protoclip_jax.data.tar_members import members
from protoclip_jax.data.tars import TarPairs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), 3, 4)


def test_pairs_of_a_folder_in_order(folder):
    source = open_source(folder)
    assert isinstance(source, TarPairs)
    assert isinstance(source, PairSource)
    assert len(source) == 12
    for row in range(12):
        assert source.read(row) == (picture(row), caption(row))
        assert source.caption(row) == caption(row)
    assert where(source, 5) == f"{folder}/00001.tar/000000005.jpg"
    with pytest.raises(IndexError):
        source.read(12)


@pytest.mark.parametrize(
    ("spec", "rows"), [("00001.tar", 4), ("{00000..00001}.tar", 8), ("0000*.tar", 12)]
)
def test_single_tars_and_patterns(folder, spec, rows):
    assert len(open_source(f"{folder}/{spec}")) == rows


def test_the_index_is_made_once(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "s", 2, 3)
    first = open_source(folder)
    monkeypatch.setattr(tar_index, "_make", None)
    assert open_source(folder).fingerprint == first.fingerprint
    monkeypatch.undo()
    write_tar(tmp_path / "s" / "00002.tar", {"9.jpg": picture(9), "9.txt": "new"})
    grown = open_source(folder)
    assert len(grown) == 7
    assert grown.fingerprint != first.fingerprint


def test_the_index_lies_in_the_cache_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    folder = write_shards(tmp_path / "s", 1, 3)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    writable = tar_index.writable
    monkeypatch.setattr(
        tar_index, "writable", lambda path: path.parent.name != "s" and writable(path)
    )
    assert open_source(folder).read(2)[1] == caption(2)
    assert not (tmp_path / "s" / ".protoclip_tars").exists()
    assert list((tmp_path / "cache" / "protoclip_jax" / "tars").glob("*.npy"))


def test_fingerprint_follows_captions_and_order(tmp_path):
    def of(name, members):
        return open_source(write_tar(tmp_path / name, members)).fingerprint

    a, b = {"a.jpg": picture(1), "a.txt": "x"}, {"b.jpg": picture(2), "b.txt": "y"}
    prints = [
        of("1.tar", a | b),
        of("2.tar", b | a),
        of("3.tar", a | b | {"b.txt": "z"}),
        of("4.tar", a),
    ]
    assert len(set(prints)) == 4
    assert of("5.tar", a | b) == prints[0]


def test_layouts_and_what_is_left_out(tmp_path):
    source = open_source(
        write_tar(
            tmp_path / "mixed.tar",
            {
                "dir/one.PNG": picture(1, form="PNG"),
                "dir/one.cls": "7",
                "dir/one.json": {"caption": "from json"},
                "other/one.webp": picture(2, form="WEBP"),
                "other/one.txt": "same name, other folder",
                "x.seg.jpg": picture(3),
                "x.txt": "two dots",
                "no_picture.txt": "?",
                "no_caption.jpg": picture(4),
                "blank.jpg": picture(5),
                "blank.txt": " \n",
                "number.jpg": picture(6),
                "number.json": {"caption": 3},
                "latin.jpg": picture(7),
                "latin.txt": "\xe9".encode("latin-1"),
                "half.jpg": picture(8),
                "half.json": '{"caption": "\\ud83d"}',
                "._one.jpg": b"of an archiver",
            },
        )
    )
    assert [source.caption(row) for row in range(3)] == [
        "from json",
        "same name, other folder",
        "two dots",
    ]
    assert source.read(0)[0] == picture(1, form="PNG")
    assert len(source) == 3
    counts = {reason: left.count for reason, left in source.report.items()}
    assert counts == {"no picture": 1, "no caption": 3, "caption not UTF-8": 2}
    assert "mixed.tar: number" in str(source.report["no caption"])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, form):
    names = ["a.jpg", "ä/" * 20 + "b.jpg", "folder/" * 20 + "c.jpg"]
    if form != tarfile.USTAR_FORMAT:
        names.append("folder/" * 30 + "x" * 120 + ".jpg")
    with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
        archive.add(tmp_path, "dir", recursive=False)
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = number * 300, 1e9 + 0.5 * (form == tarfile.PAX_FORMAT)
            archive.addfile(info, io.BytesIO(bytes(info.size)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "to/" * 60
        archive.addfile(link if form != tarfile.USTAR_FORMAT else tarfile.TarInfo("d"))
    with tarfile.open(tmp_path / "a.tar") as archive:
        wanted = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    content = (tmp_path / "a.tar").read_bytes()
    found = list(members(lambda start, length: content[start : start + length]))
    assert found == wanted
    assert len(found) >= len(names)


@pytest.mark.parametrize("cut", [0.3, 0.75, "end"])
def test_a_tar_that_is_cut_short_is_refused(tmp_path, cut):
    folder = Path(write_shards(tmp_path, 1, 3))
    whole = (folder / "00000.tar").read_bytes()
    members = len(whole.rstrip(b"\0"))  # what follows is padding
    length = -(-members // 512) * 512 if cut == "end" else int(members * cut)
    (folder / "00000.tar").write_bytes(whole[:length])
    with pytest.raises(ValueError, match=r"00000.tar is no tar, or cut short"):
        open_source(str(folder))


def test_what_is_no_tar(tmp_path):
    (tmp_path / "none.tar").touch()
    with pytest.raises(ValueError, match=r"none.tar is no tar, or cut short"):
        open_source(str(tmp_path / "none.tar"))
    (tmp_path / "a.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(ValueError, match=r"a.tar is no tar"):
        open_source(str(tmp_path / "a.tar"))
    write_tar(tmp_path / "b.tar", {"a.txt": "alone"})
    with pytest.raises(ValueError, match=r"hold 0 pairs \(no picture: 1"):
        open_source(str(tmp_path / "b.tar"))
    with pytest.raises(FileNotFoundError, match=r"c.tar"):
        open_source(str(tmp_path / "c.tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder without"):
        open_source(str(tmp_path / "empty"))


def test_pickles_as_the_place_of_its_index(folder):
    content = pickle.dumps(open_source(folder))
    assert len(content) < 2000
    again = pickle.loads(content)
    assert isinstance(again._entries, np.memmap)
    assert again.read(7) == (picture(7), caption(7))
