"""Files of a source that are written anew while a run reads them: told, and never other pairs."""

import importlib.util
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow_datasets as tfds
from pair_files import caption, picture, write_list, write_tar
from small_batches import Shuffled, open_batches

from protoclip_jax.data import pair_list
from protoclip_jax.data.seen_files import SeenFiles, SourceChanged, SourceError, states_of
from protoclip_jax.data.sources import open_source
from protoclip_jax.prepare.convert import ConvertSettings, convert

ROOT = Path(__file__).parents[2]
ROWS = 6


@pytest.mark.parametrize("how", ["shorter", "other"])
def test_list_written_again_in_place_is_told(how, tmp_path):
    """LIST-04: it was a bus error, and rows of another list in silence."""
    script = ROOT / "tests" / "cases" / "LIST-04" / "rewrite.py"
    found = subprocess.run(
        [sys.executable, str(script), str(tmp_path), how],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert found.returncode == 1, (found.returncode, found.stderr[-2000:])
    assert "row 1900 is now" not in found.stdout
    last = found.stderr.strip().splitlines()[-1]
    assert "SourceChanged" in last
    assert f"{tmp_path}/pairs.tsv has changed under the run (" in last


def a_list(folder: Path, first: int = 0) -> str:
    """A list of numbered pairs; another `first` gives other pairs in a file of the same size."""
    path = Path(write_list(folder, ROWS + first))
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], *lines[1 + first :]]) + "\n", encoding="utf-8")
    return str(path)


def tars(folder: Path, first: int = 0) -> str:
    members = {}
    for row in range(first, first + ROWS):
        members |= {f"{row}.jpg": picture(row), f"{row}.txt": caption(row)}
    write_tar(folder / "set" / "0.tar", members)
    return str(folder / "set")


def converted(folder: Path, first: int = 0) -> str:
    source = open_source(a_list(folder / "list", first))
    convert(source, folder / "set", ConvertSettings(side=0), progress=False)
    return str(folder / "set")


class NumberedPairs(tfds.core.GeneratorBasedBuilder):
    """Pairs from a number on, which is read from the environment."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = Path(__file__)

    def _info(self):
        features = {"image": tfds.features.Image(), "caption": tfds.features.Text()}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(int(os.environ["FIRST_PAIR"]))}

    def _generate_examples(self, first):
        for row in range(first, first + ROWS):
            yield row, {"image": io.BytesIO(picture(row)), "caption": caption(row)}


def prepared(folder: Path, first: int = 0) -> str:
    os.environ["FIRST_PAIR"] = str(first)
    NumberedPairs(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder / "numbered_pairs" / "1.0.0")


def tf_records(folder: Path, first: int = 0) -> str:
    """A prepared set, its examples in a TFRecord file (whose checksums nobody looks at)."""
    made = Path(prepared(folder / "arrays", first))
    raw = tfds.builder_from_directory(str(made)).as_data_source(
        "train", deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    out = folder / "records"
    out.mkdir()
    for path in made.glob("*.json"):
        shutil.copy(path, out)
    info = json.loads((out / "dataset_info.json").read_text())
    info["fileFormat"] = "tfrecord"
    (out / "dataset_info.json").write_text(json.dumps(info))
    with open(out / "numbered_pairs-train.tfrecord-00000-of-00001", "wb") as file:
        for row in range(len(raw)):
            file.write(struct.pack("<QI", len(raw[row]), 0) + raw[row] + bytes(4))
    return str(out)


KINDS = {
    "list": (a_list, "pairs.tsv"),
    "tars": (tars, "0.tar"),
    "converted": (converted, "*.array_record"),
    "tfds": (prepared, "*.array_record*"),
    "tfrecord": (tf_records, "*.tfrecord*"),
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Of each kind a set of pairs, and one of other pairs; as folders to copy."""
    made = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("FIRST_PAIR", "0")
        for kind, (make, _) in KINDS.items():
            folder = tmp_path_factory.mktemp(kind)
            made[kind] = [make(folder / name, first) for name, first in (("a", 0), ("b", 3))]
    return made


class Copied:
    """A set that a test may change."""

    def __init__(self, kind: str, sets: dict, folder: Path):
        specs = [Path(spec) for spec in sets[kind]]
        folders = [spec.parent if spec.is_file() else spec for spec in specs]
        shutil.copytree(folders[0], folder / "set")
        name = specs[0].name if specs[0].is_file() else "."
        self.spec = str(folder / "set" / name)
        pattern = KINDS[kind][1]
        (self.file,) = (folder / "set").glob(pattern)
        (self.other,) = folders[1].glob(pattern)

    def source(self):
        return open_source(self.spec)


@pytest.fixture(params=list(KINDS))
def copied(request, sets, tmp_path, monkeypatch) -> Copied:
    if request.param == "tfrecord":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    return Copied(request.param, sets, tmp_path)


def later(file: Path) -> None:
    """Moves a file's time, where the test is quicker than the clock of the file system."""
    found = file.stat()
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


def rewritten(copied: Copied) -> None:
    copied.file.write_bytes(copied.other.read_bytes())
    later(copied.file)


def replaced(copied: Copied) -> None:
    part = copied.file.with_name("part")
    shutil.copy(copied.other, part)
    os.replace(part, copied.file)
    later(copied.file)


def cut(copied: Copied) -> None:
    os.truncate(copied.file, copied.file.stat().st_size // 3)


def emptied(copied: Copied) -> None:
    os.truncate(copied.file, 0)


def grown(copied: Copied) -> None:
    with copied.file.open("ab") as file:
        file.write(b"9.jpg\tmore\n" * 100)


def gone(copied: Copied) -> None:
    copied.file.unlink()


def one_caption(copied: Copied) -> None:
    """The same size, and other letters in a caption."""
    data = copied.file.read_bytes()
    wanted, other = caption(4).encode(), caption(4).replace("no. 4", "no. 7").encode()
    assert wanted in data
    copied.file.write_bytes(data.replace(wanted, other))
    later(copied.file)


FAULTS = (rewritten, replaced, cut, emptied, grown, gone)


def assert_told(source, file: Path, row: int) -> None:
    for read in (source.read, source.caption):
        with pytest.raises(SourceChanged) as caught:
            read(row)
        message = str(caught.value)
        assert str(file) in message
        assert "\n" not in message
        if file.exists():
            assert "has changed under the run" in message
        else:
            assert "is no longer there" in message


@pytest.mark.parametrize("fault", FAULTS)
def test_reads_after_a_change_tell_it(copied, fault):
    source = copied.source()
    unread = pickle.loads(pickle.dumps(source))  # as a worker that starts later
    assert source.read(4)[1] == caption(4)
    read = pickle.loads(pickle.dumps(source))
    assert read.read(4)[1] == caption(4)
    fault(copied)
    for one in (source, unread, read):
        assert_told(one, copied.file, 4)
        assert_told(one, copied.file, 0)


@pytest.mark.parametrize("copied", ["list", "tars", "converted"], indirect=True)
def test_a_caption_of_the_same_length(copied):
    """Of a TFDS shard its end is compared, which has the places of all records."""
    source = copied.source()
    source.read(4)
    one_caption(copied)
    assert_told(source, copied.file, 0)


def test_a_touched_file_and_an_equal_copy_are_the_same(copied):
    source = copied.source()
    unread = pickle.loads(pickle.dumps(source))
    wanted = [source.read(row) for row in range(ROWS)]
    later(copied.file)
    assert [source.read(row) for row in range(ROWS)] == wanted
    part = copied.file.with_name("part")
    shutil.copyfile(copied.file, part)
    os.replace(part, copied.file)
    later(copied.file)
    later(copied.file)
    for one in (source, unread):
        assert [one.read(row) for row in range(ROWS)] == wanted
    rewritten(copied)
    later(copied.file)
    later(copied.file)
    for one in (source, unread):
        assert_told(one, copied.file, 1)


def test_a_subset_tells_it_too(copied):
    source = open_source(copied.spec, limit=4)
    cut(copied)
    assert_told(source, copied.file, 2)


def test_a_description_that_changes_before_a_worker_reads_it(sets, tmp_path):
    copied = Copied("tfds", sets, tmp_path)
    source = copied.source()
    info = copied.file.parent / "dataset_info.json"
    wanted, text = source.read(2), info.read_text()
    later(info)
    assert pickle.loads(pickle.dumps(source)).read(2) == wanted
    info.write_text(text[: len(text) // 2])
    with pytest.raises(SourceChanged, match=r"dataset_info.json has changed"):
        pickle.loads(pickle.dumps(source)).read(2)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", ["list", "tars"])
def test_batches_end_with_the_error(kind, workers, sets, tmp_path):
    """It reaches the run from threads and from worker processes as it is."""
    copied = Copied(kind, sets, tmp_path)
    source = copied.source()
    episodes = list(range(40))
    rows = Shuffled(ROWS, ROWS)
    with open_batches(
        source, workers=workers, batch=2, episodes=episodes, rows_of_episode=rows
    ) as batches:
        next(batches)
        rewritten(copied)
        with pytest.raises(SourceChanged, match="has changed under the run"):
            list(batches)


def test_a_list_that_is_written_while_it_is_opened(tmp_path, monkeypatch):
    path = Path(a_list(tmp_path))

    def slow(chunk):
        with path.open("a") as file:
            file.write("9.jpg\tmore\n")
        return found(chunk)

    found = pair_list.lines
    monkeypatch.setattr(pair_list, "lines", slow)
    with pytest.raises(SourceChanged, match="has changed"):
        open_source(str(path))


def test_a_file_that_changes_while_it_is_compared(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    seen = SeenFiles.now([str(path)])
    later(path)

    def same():
        later(path)
        return True

    with pytest.raises(SourceChanged):
        seen.check(str(path), same)


def test_a_comparison_is_made_once(tmp_path):
    path = tmp_path / "a"
    path.write_text("one")
    seen, calls = SeenFiles.now([str(path)]), []
    copy = pickle.loads(pickle.dumps(seen))
    later(path)
    for _ in range(3):
        seen.check(str(path), lambda: bool(calls.append(1)) or True)
    assert len(calls) == 1
    with pytest.raises(SourceChanged, match="other content of the same size"):
        copy.check(str(path), lambda: False)


def test_a_file_that_cannot_be_reached_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("one")
    seen = SeenFiles({str(path): states_of([str(path)])[0]})
    later(path)

    def same():
        raise PermissionError(13, "Permission denied")

    with pytest.raises(SourceError, match=r"a can no longer be read \(Permission denied\)") as told:
        seen.check(str(path), same)
    assert not isinstance(told.value, SourceChanged)


def test_fingerprints_do_not_depend_on_the_place(copied, tmp_path):
    first = copied.source()
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "set", tmp_path / "elsewhere" / "moved")
    spec = Path(copied.spec)
    name = spec.name if spec.name == "pairs.tsv" else "."
    moved = open_source(str(tmp_path / "elsewhere" / "moved" / name))
    assert moved.fingerprint == first.fingerprint
    assert [moved.caption(row) for row in range(ROWS)] == [caption(row) for row in range(ROWS)]
