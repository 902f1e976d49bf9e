"""Sources in a bucket give what they give from a local folder."""

import json
import pickle

import numpy as np
import pytest
from pair_files import caption, picture, write_list, write_shards

from protoclip_jax import teacher
from protoclip_jax.data import seen_files
from protoclip_jax.data.decoding import MISSING, UnreadableImage
from protoclip_jax.data.emoji_text import embedded_directory
from protoclip_jax.data.seen_files import SeenFiles, SourceChanged
from protoclip_jax.data.sources import PairSource, open_source, where
from protoclip_jax.data.teacher import open_teacher
from protoclip_jax.data.teacher_note import TeacherNote, write_note
from protoclip_jax.prepare import __main__ as prepare
from protoclip_jax.prepare.convert import ConvertSettings, convert
from protoclip_jax.storage import paths


def assert_same(remote: PairSource, local: PairSource, rows) -> None:
    assert len(remote) == len(local)
    assert remote.fingerprint == local.fingerprint
    worker = pickle.loads(pickle.dumps(remote))
    for row in rows:
        assert remote.read(row) == worker.read(row) == local.read(row)


def test_a_list_and_its_pictures(bucket, tmp_path):
    local = write_list(tmp_path / "data", 4, {2: "missing", 3: "empty"})
    remote = f"{bucket.put(tmp_path / 'data')}/pairs.tsv"
    source = open_source(remote)
    assert source.name == remote
    assert where(source, 1) == remote.replace("pairs.tsv", "1.jpg")
    assert_same(source, open_source(local), [0, 1])
    for row, reason in ((2, MISSING), (3, "empty file")):
        with pytest.raises(UnreadableImage) as caught:
            source.read(row)
        assert caught.value.reason == reason


def test_a_local_list_of_remote_pictures(bucket, tmp_path):
    write_list(tmp_path / "data", 2)
    folder = bucket.put(tmp_path / "data")
    local = tmp_path / "pairs.tsv"
    local.write_text(f"filepath\ttitle\n{folder}/1.jpg\ta\n")
    assert open_source(str(local)).read(0) == (picture(1), "a")
    local.write_text("filepath\ttitle\n1.jpg\ta\n")
    assert open_source(str(local), image_root=folder).read(0) == (picture(1), "a")


def test_a_picture_costs_one_request(bucket, tmp_path):
    write_list(tmp_path / "data", 2)
    source = open_source(f"{bucket.put(tmp_path / 'data')}/pairs.tsv")
    before = len(bucket.requests())
    source.read(1)
    assert len(bucket.requests()) == before + 1


@pytest.mark.parametrize("spec", ["", "/", "/00000.tar", "/0*.tar", "/{00000..00001}.tar"])
def test_tars(bucket, tmp_path, spec):
    local = write_shards(tmp_path / "shards", 2, 3)
    remote = open_source(f"{bucket.put(tmp_path / 'shards')}{spec}")
    assert_same(remote, open_source(f"{local}{spec}"), range(len(remote)))
    before = len(bucket.requests())
    remote.read(1)  # picture and caption are neighbours
    assert len(bucket.requests()) == before + 1


def test_another_tar_under_the_same_name_is_indexed_again(bucket, tmp_path):
    write_shards(tmp_path / "shards", 1, 3)
    folder = bucket.put(tmp_path / "shards")
    first = open_source(folder)
    write_shards(tmp_path / "shards", 1, 2)
    bucket.put(tmp_path / "shards")
    assert (len(first), len(open_source(folder))) == (3, 2)


def test_a_converted_set(bucket, tmp_path):
    source = open_source(write_list(tmp_path / "list", 13, {3: "cut", 7: "missing"}))
    convert(source, tmp_path / "set", ConvertSettings(shard_rows=5), progress=False)
    remote = bucket.put(tmp_path / "set")
    ours = open_source(remote)
    assert_same(ours, open_source(str(tmp_path / "set")), range(len(ours)))
    assert ours.report["unreadable at conversion, truncated image"].count == 1
    # A shard that goes, and one that was replaced by another.
    shards = [shard["file"] for shard in ours.meta["shards"]]
    bucket.files.rm_file(f"{remote}/{shards[0]}")
    for one in (ours, opened_anew(ours)):
        with pytest.raises(SourceChanged, match=rf"{shards[0]} is no longer there"):
            one.read(0)
    with pytest.raises(FileNotFoundError, match=shards[0]):
        open_source(remote)
    bucket.files.pipe_file(f"{remote}/{shards[0]}", b"other")
    with pytest.raises(ValueError, match=r"has 5 bytes and was written with .*: copy it again"):
        open_source(remote)


def opened_anew(source):
    """The same source, whose files are opened anew."""
    return pickle.loads(pickle.dumps(source))


def test_an_unfinished_set_and_a_foreign_one(bucket, tmp_path):
    source = open_source(write_list(tmp_path / "list", 3))
    convert(source, tmp_path / "set", ConvertSettings(), progress=False)
    remote = bucket.put(tmp_path / "set")
    bucket.files.rm_file(f"{remote}/meta.json")
    with pytest.raises(ValueError, match="is not finished"):
        open_source(remote)
    bucket.files.pipe_file(f"{remote}/meta.json", b"{}")
    with pytest.raises(ValueError, match="is damaged or not made by `prepare convert`"):
        open_source(remote)


def test_a_folder_of_tfds(bucket):
    local = embedded_directory()
    remote = bucket.put(local)
    for options in ({"split": "val"}, {"split": "test[3:9]"}):
        ours, theirs = (
            open_source(spec, text_feature="title", **options) for spec in (remote, str(local))
        )
        assert_same(ours, theirs, [0, 2, len(theirs) - 1])


@pytest.mark.parametrize("size", ["other", "same"])
def test_a_tar_that_is_written_again_under_a_run(bucket, tmp_path, monkeypatch, size):
    """Noticed by whoever opens it later, and by the others at their next look."""
    write_shards(tmp_path / "shards", 1, 3)
    folder = bucket.put(tmp_path / "shards")
    source = open_source(folder)
    wanted = [source.read(row) for row in range(3)]
    bucket.put(tmp_path / "shards")  # an equal copy, of another version
    copy = opened_anew(source)
    assert [copy.read(row) for row in range(3)] == wanted
    tar = tmp_path / "shards" / "00000.tar"
    if size == "other":
        write_shards(tmp_path / "shards", 1, 2)
    else:
        content = tar.read_bytes()
        tar.write_bytes(content.replace(caption(1).encode(), caption(7).encode()))
        assert tar.read_bytes() != content
    bucket.put(tmp_path / "shards")
    late = opened_anew(source)
    monkeypatch.setattr(seen_files, "_REMOTE_SECONDS", 0.0)
    for one in (late, copy, source):
        with pytest.raises(SourceChanged, match=r"00000.tar has changed under the run"):
            one.read(1)


def test_a_teacher_and_its_note(bucket, tmp_path):
    source = open_source(write_list(tmp_path / "list", 9))
    np.save(tmp_path / "teacher.npy", np.eye(9, 3, dtype=np.float32))
    numbers = open_teacher(tmp_path / "teacher.npy", 9).fingerprint
    note = TeacherNote(source.name, source.fingerprint, 9, "bert", 3, numbers)
    write_note(tmp_path / "teacher.npy", note)
    remote = bucket.put(tmp_path / "teacher.npy")
    assert open_teacher(remote, 9, source).note is None
    bucket.put(tmp_path / "teacher.npy.json")
    assert open_teacher(remote, 9, source).note == note
    other = open_source(write_list(tmp_path / "other", 10), limit=9)
    with pytest.raises(ValueError, match=rf"{remote} was made for {source.name}"):
        open_teacher(remote, 9, other)


def test_a_teacher(bucket, tmp_path):
    rows = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
    np.save(tmp_path / "teacher.npy", rows)
    remote = bucket.put(tmp_path / "teacher.npy")
    ours, theirs = (open_teacher(path, 9) for path in (remote, tmp_path / "teacher.npy"))
    assert ours.fingerprint == theirs.fingerprint
    np.testing.assert_array_equal(ours.rows(np.array([4, 1])), rows[[4, 1]])


def test_what_is_not_there(bucket, tmp_path):
    write_list(tmp_path / "data", 2)
    remote = bucket.put(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"gs://.*other.tsv does not exist"):
        open_source(f"{remote}/other.tsv")
    with pytest.raises(ValueError, match=r"a folder without meta.json, dataset_info.json or .tar"):
        open_source(remote)
    with pytest.raises(ValueError, match="no such file or folder"):
        open_source(f"{remote}/none")
    with pytest.raises(FileNotFoundError, match=r"00007\.tar"):
        open_source(f"{remote}/00007.tar")
    with pytest.raises(FileNotFoundError):
        open_source("gs://no-such-bucket/pairs.tsv")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gs://b/pairs.tsv", r"pip install 'protoclip_jax\[gcs\]'"),
        ("s3://b/pairs.tsv", "pip install s3fs"),
        ("ftp://b/pairs.tsv", "no way to read ftp://"),
        ("file:///data/pairs.tsv", "give a local path as it is"),
    ],
)
def test_what_cannot_be_read_here_is_told_in_a_line(monkeypatch, path, message):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_array_records_of_another_scheme(monkeypatch):
    from protoclip_jax.data.record_files import RecordFile, RecordFiles

    with pytest.raises(ValueError, match="are read from gs:// or local folders only"):
        RecordFiles([RecordFile("s3://b/x.array_record", 0, 3, "")], SeenFiles({}), str)


def test_tars_are_converted_and_described_from_there(bucket, tmp_path, capsys):
    local = write_shards(tmp_path / "shards", 2, 3)
    remote = bucket.put(tmp_path / "shards")
    prints = [
        convert(open_source(spec), tmp_path / name, ConvertSettings(), progress=False)
        for spec, name in ((local, "one"), (remote, "two"))
    ]
    assert prints[0]["fingerprint"] == prints[1]["fingerprint"]
    described = f"{bucket.url}/stats.json"
    assert prepare.main(["stats", remote, "--json", described, "--workers", "1"]) == 0
    assert json.loads(bucket.files.cat_file(described))["readable"] == 6


@pytest.mark.parametrize(
    "command",
    [
        (prepare.main, ["convert", "emoji_text/val", "--out", "gs://b/set"]),
        (teacher.main, ["emoji_text/val", "--out", "gs://b/teacher.npy"]),
    ],
)
def test_what_is_made_is_written_to_a_local_folder(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, arguments = command
    assert run(arguments) == 2
    assert "written to a local folder, copy them afterwards" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
