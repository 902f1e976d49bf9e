"""Tar shards in WebDataset's layout: indexed once, read at random, damage refused."""

import errno
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pair_files import caption, picture, write_shards, write_tar

import protoclip_jax.data.tar_index as tar_index
from protoclip_jax.data import tar_samples
from protoclip_jax.data.left_out import shown
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
                "other/one.TXT": "same name, other folder",
                "x.seg.jpg": picture(3),
                "x.txt": "of another name",
                "no_image.txt": "?",
                "no_caption.jpg": picture(4),
                "blank.jpg": picture(5),
                "blank.txt": " \n",
                "blank.json": {"caption": "where the text says nothing"},
                "number.jpg": picture(6),
                "number.json": {"caption": 3},
                "deep.jpg": picture(6),
                "deep.json": "[" * 100_000,
                "latin.jpg": picture(7),
                "latin.txt": "\xe9".encode("latin-1"),
                "half.jpg": picture(8),
                "half.json": '{"caption": "\\ud83d"}',
                "long.jpg": picture(9),
                "long.txt": "long " * 2**18,
                "dir.d/._one.jpg": b"of an archiver",
                "README": "?",
            },
        )
    )
    assert [source.caption(row) for row in range(len(source))] == [
        "from json",
        "same name, other folder",
        "where the text says nothing",
    ]
    assert source.read(0)[0] == picture(1, form="PNG")
    assert {reason: str(left) for reason, left in source.report.items()} == {
        "no image": "2 (mixed.tar: x, mixed.tar: no_image)",
        "no caption": "5 (mixed.tar: x.seg.jpg, mixed.tar: no_caption.jpg, mixed.tar: number.jpg, "
        "mixed.tar: deep.jpg, mixed.tar: long.jpg)",
        tar_samples.NOT_UTF8: "2 (mixed.tar: latin.txt, mixed.tar: half.json)",
        "file too large": "1 (mixed.tar: long.txt)",
        "hidden file": "1 (mixed.tar: dir.d/._one.jpg)",
        "neither image nor text by its ending": "2 (mixed.tar: dir/one.cls, mixed.tar: README)",
    }


def pairs_of(tar: str) -> list[tuple[bytes, str]]:
    source = open_source(tar)
    return [source.read(row) for row in range(len(source))]


def test_names_with_dots_are_names_up_to_the_ending(tmp_path):
    """WDS-01."""
    shots = {f"shot_{shot}m": n for n, shot in enumerate(("1.5", "1.8", "2.0"))}
    members = {f"{name}.jpg": picture(n) for name, n in shots.items()}
    texts = {f"{name}.txt": name for name in shots}
    wanted = [(picture(n), name) for name, n in shots.items()]
    assert pairs_of(write_tar(tmp_path / "0.tar", members | texts)) == wanted
    assert pairs_of(write_tar(tmp_path / "1.tar", texts | members)) == wanted
    del texts["shot_1.5m.txt"]  # whose image takes no caption of another
    source = open_source(write_tar(tmp_path / "2.tar", members | texts))
    assert [source.caption(row) for row in range(len(source))] == list(shots)[1:]
    assert str(source.report["no caption"]) == "1 (2.tar: shot_1.5m.jpg)"


@pytest.mark.parametrize("turned", [False, True])
def test_several_images_and_texts_in_either_order(tmp_path, turned):
    members = {
        "a.json": {"caption": "from json"},
        "a.caption": "from caption",
        "a.txt": " from txt",
        "a.png": picture(1, form="PNG"),
        "a.JPG": picture(2),
        "a.jpeg": picture(3),
        "b.jpg": picture(4),
        "b.txt": "the same",
        "b.json": {"caption": "the same "},
    }
    if turned:
        members = dict(reversed(members.items()))
    source = open_source(write_tar(tmp_path / "a.tar", members))
    found = {source.caption(row): source.read(row)[0] for row in range(2)}
    assert found == {" from txt": picture(2), "the same": picture(4)}
    assert {reason: str(left) for reason, left in source.report.items()} == {
        "further image of a sample": "2 (a.tar: a.jpeg, a.tar: a.png)",
        "other caption of a sample": "2 (a.tar: a.caption, a.tar: a.json)",
    }


def write_members(path, members, form=tarfile.GNU_FORMAT) -> str:
    """A tar of (name or header, content) in this order, equal names included."""
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name) if isinstance(name, str) else name
            data = content.encode() if isinstance(content, str) else content
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def of_kind(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, name
    return info


def test_a_name_that_comes_again_counts_from_its_last_member(tmp_path):
    """WDS-03."""
    members = [("a.jpg", picture(1)), ("a.txt", "old"), ("b.jpg", picture(2)), ("b.txt", "b")]
    members += [
        ("./a.jpg", picture(3)),
        ("/.//a.txt", "new"),
        ("c.jpg", picture(4)),
        ("c.txt", "c"),
    ]
    members += [(of_kind("c.jpg", tarfile.SYMTYPE), b"")]
    tar = write_members(tmp_path / "a.tar", members)
    assert pairs_of(tar) == [(picture(3), "new"), (picture(2), "b")]
    report = open_source(tar).report
    assert str(report["replaced by a later member of the same name"]) == (
        "3 (a.tar: a.jpg, a.tar: a.txt, a.tar: c.jpg)"
    )
    assert str(report["link in the tar, not followed"]) == "1 (a.tar: c.jpg)"


def test_what_is_no_plain_file_is_counted_and_passed_over(tmp_path):
    sparse = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "s.jpg"}
    new, old = tarfile.TarInfo("GNUSparseFile.0/s.jpg"), of_kind("old.jpg", b"S")
    new.pax_headers = sparse
    kinds = {
        "hard.jpg": tarfile.LNKTYPE,
        "self.jpg": tarfile.SYMTYPE,
        "pipe.jpg": b"6",
        "v.jpg": b"M",
    }
    members = [(of_kind(name, kind), b"") for name, kind in kinds.items()]
    members += [(new, b"1\n0\n5\n"), ("a.jpg", picture(1)), ("a.txt", "a")]
    write_members(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    # GNU's old sparse form, whose map goes on in blocks of its own before the content.
    head = bytearray(old.tobuf(tarfile.GNU_FORMAT))
    head[482] = 1
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 256)
    more = bytes(504) + b"\1" + bytes(7) + bytes(512)
    tar = tmp_path / "b.tar"
    tar.write_bytes(bytes(head) + more + (tmp_path / "a.tar").read_bytes())
    assert pairs_of(str(tar)) == [(picture(1), "a")]
    assert {reason: str(left) for reason, left in open_source(str(tar)).report.items()} == {
        "sparse file in the tar": "2 (b.tar: old.jpg, b.tar: s.jpg)",
        "link in the tar, not followed": "2 (b.tar: hard.jpg, b.tar: self.jpg)",
        "neither file, folder nor link in the tar": "2 (b.tar: pipe.jpg, b.tar: v.jpg)",
    }


def test_names_that_are_no_utf8_are_shown_escaped(tmp_path):
    """WDS-05."""
    latin = b"caf\xe9\x1b[31m.jpg".decode(errors="surrogateescape")
    members = [(latin, picture(1)), (f"{latin}.jpg", b"no image"), (f"{latin}.txt", "a")]
    source = open_source(write_members(tmp_path / "a.tar", members))
    assert str(source.report["no caption"]) == r"1 (a.tar: caf\xe9\x1b[31m.jpg)"
    assert where(source, 0) == rf"{tmp_path}/a.tar/caf\xe9\x1b[31m.jpg.jpg"
    assert shown("\ud83d \udce9") == r"\xed\xa0\xbd \xed\xb3\xa9"
    assert shown("ü 😀") == "ü 😀"


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_are_told_whole(tmp_path, form):
    name = "folder/" * 30 + "é.jpg"
    tar = write_members(tmp_path / "a.tar", [(name, picture(1)), (f"{name[:-3]}txt", "a")], form)
    assert where(open_source(tar), 0) == f"{tar}/{name}"


def test_tars_one_behind_the_other_are_read_and_told(tmp_path):
    whole = b""
    for n in range(3):
        tar = write_tar(tmp_path / f"{n}.tar", {f"{n}.jpg": picture(n), f"{n}.txt": f"{n}"})
        whole += Path(tar).read_bytes()
    joined = tmp_path / "joined" / "a.tar"
    joined.parent.mkdir()
    joined.write_bytes(whole)
    source = open_source(str(joined))
    assert [source.caption(row) for row in range(len(source))] == ["0", "1", "2"]
    resumed = source.report.pop(
        "stretch of zeros (end mark, or lost members) with more members behind it"
    )
    assert str(resumed) == "2 (a.tar: from byte 10240 on, a.tar: from byte 20480 on)"
    assert not source.report


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
        wanted = [(m.name, m.offset_data, m.size, "file") for m in archive if m.isreg()]
    content = (tmp_path / "a.tar").read_bytes()
    found = list(members(lambda start, length: content[start : start + length]))
    assert [member for member in found if member.what == "file"] == wanted
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
    with pytest.raises(ValueError, match=r"hold 0 pairs \(no image: 1"):
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


def header(kind: bytes = b"0", size: int | bytes = 0, name: str = "a.jpg") -> bytes:
    """A header as a stranger may write it."""
    head = bytearray(of_kind(name, kind).tobuf(tarfile.GNU_FORMAT))
    head[124:136] = b"%011o\0" % size if isinstance(size, int) else size
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + sum(head[156:]) + 256)
    return bytes(head)


END = bytes(1024)
GIGABYTES = b"\x80" + (2**40).to_bytes(11, "big")
CRAFTED = {
    "a negative size": (header(size=b"-0000001000\0"), "negative"),
    "a negative size in base 256": (header(size=b"\xff" * 11 + b"\0"), "negative"),
    "a size of 2**88": (header(size=b"\x80" + b"\xff" * 11), "too large"),
    "a size of no digits": (header(size=b"12_000\0     "), "no number"),
    "a size in another base": (header(size=b"0o17\0       "), "no number"),
    "a size beyond the end": (header(size=GIGABYTES), "its end is missing"),
    "a PAX header of gigabytes": (header(b"x", GIGABYTES), "a header of 1099511627776 bytes"),
    "a long name of gigabytes": (header(b"L", GIGABYTES), "a header of 1099511627776 bytes"),
    "a PAX header cut short": (header(b"x", 2000), "its end is missing"),
    "PAX lines of length 0": (header(b"x", 512) + b"0 path=a\n".ljust(512, b"\0"), "damaged PAX"),
    "PAX lines of no length": (header(b"x", 512) + b"9" * 512, "damaged PAX"),
    "a PAX line beyond its end": (header(b"x", 9) + b"99 path=a".ljust(512), "damaged PAX"),
    "a PAX size that is negative": (header(b"x", 11) + b"11 size=-9\n".ljust(512), "PAX header"),
    "a PAX size that is huge": (header(b"x", 29) + b"29 size=" + b"9" * 20 + b"\n" * 484, "PAX"),
    "one name for all members": (header(b"g", 10) + b"10 path=a\n".ljust(512), "all members"),
    "a long name of no member": (header(b"L", 5) + b"a.jpg".ljust(512), "belongs to no file"),
    "rubbish behind the end": (END + b"rubbish".ljust(512), "behind an end mark"),
}


@pytest.mark.parametrize("what", CRAFTED)
def test_crafted_headers_are_refused_in_bounded_memory(what):
    crafted, message = CRAFTED[what]
    content = header(size=3) + b"abc".ljust(512) + crafted + END

    reads = []

    def read(start, length):
        reads.append(length)
        assert length <= 2**20
        assert len(reads) < 20, "it goes round and round"
        return content[start : start + length]

    with pytest.raises(ValueError, match=message):
        list(members(read))


def test_chained_headers_end_and_the_last_name_counts():
    chain = b"".join(header(b"L", 8) + b"%05d.jpg".ljust(1) % n + bytes(503) for n in range(500))
    content = chain + header(size=0) + END
    (found,) = members(lambda start, length: content[start : start + length])
    assert found.name == "00499.jp"


def test_a_part_that_became_zeros_is_refused_or_told(tmp_path):
    folder = Path(write_shards(tmp_path, 1, 4))
    tar, whole = folder / "00000.tar", (folder / "00000.tar").read_bytes()
    second, third = (next_header(whole, f"{n:09}.jpg") for n in (1, 2))
    tar.write_bytes(whole[:second] + bytes(third - second) + whole[third:])
    source = open_source(str(folder))
    assert len(source) == 3
    ((reason, left),) = source.report.items()
    assert reason.startswith("stretch of zeros")
    assert str(left) == f"1 (00000.tar: from byte {third} on)"
    tar.write_bytes(whole[:second] + bytes(third + 512 - second) + whole[third + 512 :])
    with pytest.raises(ValueError, match=rf"no header at byte {third + 512}, behind an end mark"):
        open_source(str(folder))


def next_header(tar: bytes, name: str) -> int:
    return tar.index(name.encode())


def index_files(folder: Path) -> list[Path]:
    return sorted((folder / ".protoclip_tars").iterdir())


DAMAGES = {
    "cut notes": (".json", lambda data: data[:-20]),
    "notes of nothing": (".json", lambda data: b"[]"),
    "deep notes": (".json", lambda data: b"[" * 100_000),
    "other numbers": (".json", lambda data: data.replace(b'"ends": [4]', b'"ends": [3]')),
    "another fingerprint": (
        ".json",
        lambda data: data.replace(b'"fingerprint": "', b'"fingerprint": "0'),
    ),
    "other reports": (".json", lambda data: data.replace(b'"report": {', b'"report": {"a": 3')),
    "cut entries": (".npy", lambda data: data[:-9]),
    "no entries": (".npy", lambda data: b""),
    "turned bits": (".npy", lambda data: data[:-30] + bytes([data[-30] ^ 1]) + data[-29:]),
    "a pickle": (".npy", lambda data: pickle.dumps([1])),
}


def test_a_damaged_index_is_made_anew(tmp_path, caplog):
    folder = Path(write_shards(tmp_path, 1, 4))
    open_source(str(folder))
    whole = [file.read_bytes() for file in index_files(folder)]
    for what, (suffix, damage) in DAMAGES.items():
        file = next(file for file in index_files(folder) if file.suffix == suffix)
        file.write_bytes(damage(file.read_bytes()))
        assert open_source(str(folder)).read(3) == (picture(3), caption(3)), what
        assert [file.read_bytes() for file in index_files(folder)] == whole, what
        assert "is damaged: it is made anew" in caplog.text, what
        caplog.clear()


def test_an_index_that_points_outside_of_its_tar_is_not_used(tmp_path):
    folder = Path(write_shards(tmp_path, 1, 4))
    open_source(str(folder))
    notes, numbers = index_files(folder)
    entries = np.load(numbers)
    entries["size"][2] = 2**31
    np.save(numbers, entries)
    told = json.loads(notes.read_bytes().partition(b"\n")[2])
    told["entries"] = tar_index._hash(entries.view(np.uint8))
    text = json.dumps(told).encode()
    notes.write_bytes(f"{tar_index._hash(text)}\n".encode() + text)
    assert open_source(str(folder)).read(2) == (picture(2), caption(2))


def test_an_index_belongs_to_its_tars_alone(tmp_path, monkeypatch):
    """Equal names, sizes and times in a cache that many folders share."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tar_index, "_FOLDER", "set.tar/no_folder")  # beside the tars: not to write
    texts = {"a": ("one", "two"), "b": ("three", "fo")}
    for folder, (first, second) in texts.items():
        members = {f"{text}.jpg": picture(1) for text in (first, second)}
        members |= {f"{text}.txt": text for text in (first, second)}
        write_tar(tmp_path / folder / "set.tar", dict(sorted(members.items())))

    def read(folder):
        os.utime(tmp_path / folder / "set.tar", (1e9, 1e9))
        source = open_source(str(tmp_path / folder))
        return [source.caption(row) for row in range(len(source))]

    assert len({(tmp_path / folder / "set.tar").stat().st_size for folder in texts}) == 1
    assert read("a") == ["one", "two"]
    assert read("b") == ["fo", "three"]
    os.replace(tmp_path / "b" / "set.tar", tmp_path / "a" / "set.tar")  # of the same time, too
    assert read("a") == ["fo", "three"]


def test_hosts_with_equal_process_ids_make_one_index(tmp_path, monkeypatch):
    """WDS-10: just before one names its file, another does all of that from first to last."""
    folder, replace = write_shards(tmp_path, 1, 3), os.replace
    waiting, others = [1, 2], []

    def late(part, path):
        if waiting:
            waiting.pop()
            others.append(open_source(folder))
        replace(part, path)

    monkeypatch.setattr(os, "getpid", lambda: 7)
    monkeypatch.setattr(os, "replace", late)
    for source in (open_source(folder), *others):
        assert len(others) == 2
        assert Path(source._path).parent == Path(folder) / ".protoclip_tars"
        assert source.read(2) == (picture(2), caption(2))
    assert [file.suffix for file in index_files(Path(folder))] == [".json", ".npy"]


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize("why", ["nothing can be written", "the disks are full"])
def test_without_a_home_and_a_place_to_write_the_index_is_in_memory(tmp_path, monkeypatch, why):
    """RUN-04."""
    folder = write_shards(tmp_path / "s", 1, 3)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    if why == "nothing can be written":
        monkeypatch.setattr(tar_index, "writable", lambda path: False)
    else:
        monkeypatch.setattr(tar_index, "_keep", full)
    source = open_source(folder)
    assert source.read(2) == (picture(2), caption(2))
    assert pickle.loads(pickle.dumps(source)).read(1) == source.read(1)


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
