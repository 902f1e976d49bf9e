"""Sets of ArrayRecord shards: what was written comes back, damage is noticed, memory is bounded."""

import json
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pair_files import caption, picture, write_list

import protoclip_jax.data.record_files as record_files
from protoclip_jax.data.array_records import ArrayRecordPairs, fingerprint, pack, unpack
from protoclip_jax.data.decoding import BROKEN, UnreadableImage
from protoclip_jax.data.sources import PairSource, open_source, where
from protoclip_jax.prepare.convert import ConvertSettings, convert

ROWS, SHARD = 23, 5


def made(folder: Path, rows: int = ROWS, faults: dict | None = None) -> str:
    source = open_source(write_list(folder / "list", rows, faults))
    convert(source, folder / "set", ConvertSettings(shard_rows=SHARD), progress=False)
    return str(folder / "set")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return made(tmp_path_factory.mktemp("set"), faults={3: "cut", 7: "missing", 8: "html"})


def test_records_round_trip():
    for row, text, data in ((0, "", b""), (2**40, "ein Käse\n🧀", bytes(range(256)))):
        assert unpack(pack(row, text, data)) == (row, text, data)


def test_pairs_come_back_in_order_with_their_rows(folder):
    source = open_source(folder)
    assert isinstance(source, ArrayRecordPairs)
    assert isinstance(source, PairSource)
    kept = [row for row in range(ROWS) if row not in (3, 7, 8)]
    assert len(source) == len(kept)
    for row, number in enumerate(kept):
        assert source.read(row) == (picture(number), caption(number))
        assert where(source, row).endswith(f"row {row} ({source.meta['source']} row {number})")
    assert source.caption(4) == caption(5)
    with pytest.raises(IndexError):
        source.read(len(kept))


def test_what_the_conversion_left_out_is_reported(folder):
    report = {reason: left.count for reason, left in open_source(folder).report.items()}
    assert report == {
        f"unreadable at conversion, {reason}": 1
        for reason in ("truncated image", "missing file", "not an image")
    }
    assert "row 7" in str(open_source(folder).report["unreadable at conversion, missing file"])


def test_fingerprint_follows_content_and_order(tmp_path, folder):
    again = made(tmp_path / "again", faults={3: "cut", 7: "missing", 8: "html"})
    other = made(tmp_path / "other", faults={4: "cut", 7: "missing", 8: "html"})
    prints = [open_source(path).fingerprint for path in (folder, again, other)]
    assert prints[0] == prints[1] != prints[2]


def test_few_shards_are_open_at_a_time_and_threads_may_share_them(folder, monkeypatch):
    monkeypatch.setattr(record_files, "_OPEN_FILES", 2)
    source = open_source(folder)
    wanted = [source.read(row) for row in range(len(source))]
    rows = [row * 7 % len(source) for row in range(400)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, rows)) == [wanted[row] for row in rows]
    assert len(source._records._open) <= 2


def test_pickles_without_its_open_files(folder):
    source = open_source(folder)
    source.read(0)
    content = pickle.dumps(source)
    assert len(content) < 4000
    assert pickle.loads(content).read(5) == source.read(5)


def test_damage_inside_a_shard_is_an_unreadable_pair(tmp_path):
    folder = Path(made(tmp_path, rows=5))
    shard = next(folder.glob("*.array_record"))
    data = bytearray(shard.read_bytes())
    at = data.index(picture(2))
    data[at + 20 : at + 60] = bytes(40)
    shard.write_bytes(data)
    source = open_source(str(folder))
    assert source.read(1)[1] == caption(1)
    with pytest.raises(UnreadableImage) as caught:
        source.read(2)
    assert caught.value.reason == BROKEN
    assert where(source, 2) == f"{folder} row 2"


def test_sets_that_are_not_whole_are_refused(tmp_path):
    folder = Path(made(tmp_path, rows=5))
    shard = next(folder.glob("*.array_record"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=rf"{len(whole) // 2} bytes .* with {len(whole)}"):
        open_source(str(folder))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        open_source(str(folder))
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"version": 9}))
    with pytest.raises(ValueError, match="version 9"):
        open_source(str(folder))
    (folder / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        open_source(str(folder))
    (folder / "meta.json").unlink()
    with pytest.raises(ValueError, match="not finished"):
        open_source(str(folder))


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """A set of the same source in another form, whose shards have the same sizes."""
    folder = tmp_path_factory.mktemp("other")
    source = open_source(write_list(folder / "list", ROWS, {3: "cut", 7: "missing", 8: "html"}))
    settings = ConvertSettings(side=20, shard_rows=SHARD)
    convert(source, folder / "set", settings, progress=False)
    return folder / "set"


def copied(folder: str, tmp_path: Path) -> tuple[Path, list[Path]]:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    return copy, sorted(copy.glob("*.array_record"))


def exchanged(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    assert len(first) == len(second)
    one.write_bytes(second)
    two.write_bytes(first)


@pytest.mark.parametrize("number", [0, 2, -1])
def test_a_shard_of_another_conversion_is_refused(tmp_path, folder, other, number):
    copy, shards = copied(folder, tmp_path)
    assert open_source(str(copy)).fingerprint == open_source(folder).fingerprint
    size = shards[number].stat().st_size
    shutil.copy(other / shards[number].name, shards[number])
    assert shards[number].stat().st_size == size
    with pytest.raises(ValueError, match=f"{shards[number].name} is a shard of another set"):
        open_source(str(copy))


def test_exchanged_shards_and_those_without_records_are_refused(tmp_path, folder):
    copy, shards = copied(folder, tmp_path)
    exchanged(shards[2], shards[3])
    with pytest.raises(ValueError, match=f"{shards[3].name} begins with row 10 of the source"):
        open_source(str(copy))
    exchanged(shards[2], shards[3])
    exchanged(shards[2], shards[-1])  # of 5 records and of 3
    with pytest.raises(ValueError, match=f"{shards[2].name} holds 3 records, and its set says 5"):
        open_source(str(copy))
    exchanged(shards[2], shards[-1])
    shards[1].write_bytes(bytes(shards[1].stat().st_size))
    with pytest.raises(ValueError, match=f"{shards[1].name} (is damaged|holds 0 records)"):
        open_source(str(copy))


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: {"shards": meta["shards"][::-1]},
        lambda meta: {"shards": meta["shards"][:-1]},
        lambda meta: {"shards": meta["shards"] + meta["shards"][:1]},
        lambda meta: {"fingerprint": "f" * 32},
        lambda meta: {"pairs": meta["pairs"] + 1},
        lambda meta: {"pairs": True},
        lambda meta: {"pairs": None},
        lambda meta: {"shards": [meta["shards"][0] | {"pairs": True}, *meta["shards"][1:]]},
        lambda meta: {"shards": [meta["shards"][0] | {"samples": ["0"]}, *meta["shards"][1:]]},
        lambda meta: {"shards": [meta["shards"][0] | {"samples": 5}, *meta["shards"][1:]]},
    ],
)
def test_a_description_that_does_not_add_up_is_refused(tmp_path, folder, change):
    copy, _ = copied(folder, tmp_path)
    meta = json.loads((copy / "meta.json").read_text())
    (copy / "meta.json").write_text(json.dumps(meta | change(meta)))
    with pytest.raises(ValueError, match=r"meta.json (was changed|is damaged).*copy it again"):
        open_source(str(copy))


def test_a_description_of_another_set_and_a_wrong_number_of_pairs_are_refused(
    tmp_path, folder, other
):
    copy, shards = copied(folder, tmp_path)
    meta = json.loads((copy / "meta.json").read_text())
    shutil.copy(other / "meta.json", copy)
    with pytest.raises(ValueError, match="is a shard of another set"):
        open_source(str(copy))
    one = {key: value for key, value in meta["shards"][2].items() if key != "samples"}
    changed = meta | {"shards": [one | {"pairs": 4}], "pairs": 4}
    changed["fingerprint"] = fingerprint([one["digest"]])
    (copy / "meta.json").write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=f"{shards[2].name} holds 5 records, and its set says 4"):
        open_source(str(copy))


def test_sets_made_before_samples_were_noted_open(tmp_path, folder):
    copy, _ = copied(folder, tmp_path)
    meta = json.loads((copy / "meta.json").read_text())
    for shard in meta["shards"]:
        del shard["samples"]
    (copy / "meta.json").write_text(json.dumps(meta))
    source, before = open_source(str(copy)), open_source(folder)
    assert source.fingerprint == before.fingerprint
    assert source.read(5) == before.read(5)
    shards = sorted(copy.glob("*.array_record"))
    exchanged(shards[2], shards[3])
    with pytest.raises(ValueError, match=f"{shards[3].name} begins with row 10 of the source"):
        open_source(str(copy))
    exchanged(shards[2], shards[3])
    shutil.copy(shards[2], shards[3])
    with pytest.raises(ValueError, match=f"{shards[3].name} begins with row 10 of the source"):
        open_source(str(copy))
