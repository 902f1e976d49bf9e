"""Converting: every row accounted for, at any moment of a kill, on any number of workers."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from pair_files import Unlooked, caption, picture, write_list, write_shards
from PIL import Image

import protoclip_jax.storage.atomic as atomic
from protoclip_jax.data.array_records import ArrayRecordPairs, unpack
from protoclip_jax.data.decoding import decode
from protoclip_jax.data.sources import open_source
from protoclip_jax.prepare.__main__ import main
from protoclip_jax.prepare.convert import ConvertSettings, convert
from protoclip_jax.prepare.picture import stored

FAULTS = {2: "missing", 9: "cut", 10: "empty", 11: "html", 24: "cut"}


def rows_of(folder: Path) -> tuple[list[int], dict[int, str]]:
    """Source rows of the records in order, and the unreadable ones with their reasons."""
    source = ArrayRecordPairs(folder)
    written = []
    for row in range(len(source)):
        origin, text, data = unpack(source._record(row))
        assert text == caption(origin)
        decode(data)
        written.append(origin)
    lines = (folder / "unreadable.tsv").read_text().splitlines()
    return written, {int(line.split("\t")[0]): line.split("\t")[2] for line in lines}


def assert_all_rows(folder: Path, count: int, faults: dict[int, str]) -> None:
    written, unreadable = rows_of(folder)
    assert written == [row for row in range(count) if row not in faults]
    assert sorted(unreadable) == sorted(faults)
    names = {"missing": "missing file", "cut": "truncated image", "empty": "empty file"}
    for row, fault in faults.items():
        assert unreadable[row] == names.get(fault, "not an image")
    assert not list(folder.rglob("*.part"))


def test_pairs_without_a_caption_are_listed(tmp_path):
    source = Unlooked([caption(0), "&nbsp;", caption(2)])
    convert(source, tmp_path, ConvertSettings(), progress=False)
    assert rows_of(tmp_path) == ([0, 2], {1: "no caption"})


def test_every_row_is_written_or_listed(tmp_path, capsys):
    path = write_list(tmp_path / "list", 30, FAULTS)
    out = tmp_path / "set"
    assert main(["convert", path, "--out", str(out), "--workers", "1", "--shard-rows", "7"]) == 0
    assert_all_rows(out, 30, FAULTS)
    said = capsys.readouterr().out
    assert "30 rows = 25 pairs + 5 unreadable" in said
    assert "truncated image: 2" in said
    assert len(list(out.glob("*.array_record"))) == 5
    # Once more: nothing to do.
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.array_record")}
    assert main(["convert", path, "--out", str(out), "--workers", "1", "--shard-rows", "7"]) == 0
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("*.array_record")}
    assert "all 5 shards are there" in capsys.readouterr().out


def test_workers_write_the_same_set(tmp_path):
    source = open_source(write_list(tmp_path / "list", 20, {3: "cut"}))
    settings = ConvertSettings(shard_rows=6)
    one = convert(source, tmp_path / "one", settings, progress=False)
    two = convert(source, tmp_path / "two", settings, workers=2, progress=False)
    assert one == two
    for path in (tmp_path / "one").glob("*.array_record"):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_subset_keeps_the_rows_of_the_whole(tmp_path):
    source = open_source(write_list(tmp_path / "list", 40), limit=9, seed=1)
    convert(source, tmp_path / "set", ConvertSettings(shard_rows=4), progress=False)
    assert rows_of(tmp_path / "set")[0] == source.rows.tolist()


def test_tars_and_sets_are_sources_too(tmp_path):
    tars = open_source(write_shards(tmp_path / "tars", 2, 3))
    convert(tars, tmp_path / "a", ConvertSettings(), progress=False)
    convert(open_source(str(tmp_path / "a")), tmp_path / "b", ConvertSettings(), progress=False)
    a, b = ArrayRecordPairs(tmp_path / "a"), ArrayRecordPairs(tmp_path / "b")
    assert [a.read(row) for row in range(6)] == [b.read(row) for row in range(6)]
    assert a.fingerprint == b.fingerprint


@pytest.mark.parametrize("moment", range(12))
def test_stopped_between_any_two_steps(tmp_path, monkeypatch, moment):
    # Every file gets its name by os.replace; the run ends before or after the n-th of them.
    source = open_source(write_list(tmp_path / "list", 12, {4: "cut"}))
    settings, out = ConvertSettings(shard_rows=5), tmp_path / "set"
    calls, replace = 0, os.replace

    def stops(part, path):
        nonlocal calls
        calls += 1
        if calls == moment // 2 + 1:
            if moment % 2:
                replace(part, path)
            raise KeyboardInterrupt
        replace(part, path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", stops)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, settings, progress=False)
    convert(source, out, settings, progress=False)
    assert_all_rows(out, 12, {4: "cut"})


def test_stopped_in_the_middle_of_a_shard(tmp_path, monkeypatch, capsys):
    source = open_source(write_list(tmp_path / "list", 12))
    settings, out = ConvertSettings(shard_rows=5), tmp_path / "set"
    read = type(source).read

    def stops(self, row):
        if row == 8:
            raise KeyboardInterrupt
        return read(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(type(source), "read", stops)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, settings, progress=False)
    with pytest.raises(ValueError, match="not finished"):
        open_source(str(out))
    convert(source, out, settings, progress=False)
    assert "1 of 3 shards are there; 1 unfinished files removed" in capsys.readouterr().out
    assert_all_rows(out, 12, {})


def kill_and_resume(tmp_path: Path, count: int, kills: int, seed: int) -> None:
    """SIGKILL at random moments, the same command again, until it comes to its end."""
    faults = {row: ("cut", "missing", "html")[row % 3] for row in range(5, count, 17)}
    path = write_list(tmp_path / "list", count, faults, size=(1200, 900))
    out = tmp_path / "set"
    command = [sys.executable, "-m", "protoclip_jax.prepare", "convert", path]
    command += ["--out", str(out), "--workers", "2", "--shard-rows", "6"]
    rng = np.random.default_rng(seed)
    root = Path(__file__).parents[2]
    killed = 0
    for turn in range(kills + 1):
        run = subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        if turn < kills:
            # Once it writes: the first time at once, then at a random moment, by which a quick
            # run has ended by itself.
            while run.poll() is None and not list(out.glob("*.part")):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5) if turn else 0)
            try:
                children = psutil.Process(run.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                children = []
            run.send_signal(signal.SIGKILL)
            killed += run.wait() == -signal.SIGKILL
            run.stdout.close()
            _, alive = psutil.wait_procs(children, timeout=10)
            assert not alive, "workers outlive their parent"
        else:
            said = run.communicate(timeout=120)[0]
            assert run.returncode == 0, said
    assert killed
    assert_all_rows(out, count, faults)
    assert f"{count} rows = {count - len(faults)} pairs + {len(faults)} unreadable" in said


def test_killed_and_resumed(tmp_path):
    kill_and_resume(tmp_path, count=60, kills=2, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_and_resumed_many_times(tmp_path, seed):
    kill_and_resume(tmp_path, count=400, kills=8, seed=seed + 1)


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (["--side", "64"], ("side", "256", "64")),
        (["--encoding", "webp"], ("encoding", "'jpeg'", "'webp'")),
        (["--limit", "3"], ("rows", "8", "3")),
    ],
)
def test_another_form_in_the_same_folder_is_refused(tmp_path, capsys, change, values):
    command = ["convert", write_list(tmp_path / "list", 8), "--out", str(tmp_path / "set")]
    assert main([*command, "--workers", "1"]) == 0
    assert main([*command, "--workers", "1", *change]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(value in said for value in values), said


def test_another_list_in_the_same_folder_is_refused(tmp_path, capsys):
    out = ["--out", str(tmp_path / "set"), "--workers", "1"]
    assert main(["convert", write_list(tmp_path / "a", 8), *out]) == 0
    path = Path(write_list(tmp_path / "b", 8))
    path.write_text(path.read_text().replace("no. 3", "no. x"))
    assert main(["convert", str(path), *out]) == 2
    assert "fingerprint" in capsys.readouterr().err


def test_folders_of_others_and_two_at_once_are_refused(tmp_path, capsys):
    path = write_list(tmp_path / "list", 3)
    assert main(["convert", path, "--out", str(tmp_path / "list")]) == 2
    assert "holds other files" in capsys.readouterr().err
    assert main(["convert", path, "--out", path]) == 2
    assert "is a file" in capsys.readouterr().err
    assert main(["convert", path, "--out", "gs://bucket/set"]) == 2
    assert "local folder" in capsys.readouterr().err
    from protoclip_jax.storage.lock import locked

    (tmp_path / "set").mkdir()
    with locked(tmp_path / "set"):
        assert main(["convert", path, "--out", str(tmp_path / "set")]) == 2
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err


def test_all_unreadable_is_said(tmp_path):
    source = open_source(write_list(tmp_path / "list", 3, dict.fromkeys(range(3), "cut")))
    meta = convert(source, tmp_path / "set", ConvertSettings(), progress=False)
    assert meta["pairs"] == 0
    with pytest.raises(ValueError, match="holds 0 pairs"):
        open_source(str(tmp_path / "set"))


def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    import protoclip_jax.prepare.shard as shard

    class Full:
        def __init__(self, *_):
            pass

        def write(self, _):
            raise RuntimeError("write() failed: No space left on device")

        def close(self):
            pass

    monkeypatch.setattr(shard.array_record_module, "ArrayRecordWriter", Full)
    path = write_list(tmp_path / "list", 3)
    assert main(["convert", path, "--out", str(tmp_path / "set"), "--workers", "1"]) == 2
    assert "No space left" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_worker_that_is_killed_is_one_line(tmp_path, monkeypatch, capsys):
    import protoclip_jax.prepare.pool as pool

    monkeypatch.setattr(pool, "_work", os._exit)
    path = write_list(tmp_path / "list", 6)
    command = ["convert", path, "--out", str(tmp_path / "set"), "--shard-rows", "2"]
    assert main([*command, "--workers", "2"]) == 2
    assert "a worker process was killed" in capsys.readouterr().err


# The form of pictures.


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_large_pictures_shrink_and_small_ones_stay_byte_for_byte():
    large = stored(picture(1, (640, 512)), 256, "jpeg", 95)
    assert (opened(large).size, opened(large).format) == ((320, 256), "JPEG")
    for size in ((256, 300), (40, 30)):
        assert stored(picture(2, size), 256, "jpeg", 95) == picture(2, size)
    assert stored(picture(1, (640, 512)), 0, "jpeg", 95) == picture(1, (640, 512))
    webp = stored(picture(3), 256, "webp", 90)
    assert opened(webp).format == "WEBP"
    assert stored(webp, 256, "webp", 90) == webp


def test_odd_pictures_become_plain(tmp_path):
    image = opened(picture(1, (40, 30)))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    turned = opened(stored(file.getvalue(), 256, "jpeg", 95))
    assert turned.size == (30, 40)
    assert turned.getexif().get(0x0112, 1) == 1
    file = io.BytesIO()
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(file, "PNG")
    assert opened(stored(file.getvalue(), 256, "jpeg", 95)).getpixel((4, 4)) == (255, 255, 255)
    file = io.BytesIO()
    image.convert("CMYK").save(file, "JPEG")
    assert opened(stored(file.getvalue(), 256, "jpeg", 95)).mode == "RGB"


def test_meta_says_what_the_set_is(tmp_path):
    source = open_source(write_list(tmp_path / "list", 5, {1: "cut"}))
    settings = ConvertSettings(side=20, encoding="webp", quality=80, shard_rows=2)
    convert(source, tmp_path / "set", settings, progress=False)
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    assert (meta["pairs"], meta["source_rows"], len(meta["shards"])) == (4, 5, 3)
    assert (meta["side"], meta["encoding"], meta["quality"]) == (20, "webp", 80)
    assert meta["source_fingerprint"] == source.fingerprint
    assert meta["unreadable"] == {"truncated image": {"count": 1, "examples": ["row 1"]}}
    assert min(opened(ArrayRecordPairs(tmp_path / "set").read(0)[0]).size) == 20
