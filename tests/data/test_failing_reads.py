"""Disks and networks that fail: tried again for a while, and never called a broken image."""

import builtins
import errno
import os
import time
from pathlib import Path

import pytest
from pair_files import caption, picture, write_list, write_shards

from protoclip_jax.data import record_files, tars
from protoclip_jax.data.decoding import MISSING, NO_ACCESS, UnreadableImage
from protoclip_jax.data.files import read_picture
from protoclip_jax.data.seen_files import SourceError
from protoclip_jax.data.sources import open_source
from protoclip_jax.prepare.convert import ConvertSettings, convert
from protoclip_jax.storage import disks
from protoclip_jax.storage.disks import patient

PASSING = ("EIO", "ETIMEDOUT", "ESTALE", "EAGAIN", "EINTR", "EBUSY", "ECONNRESET", "ENETUNREACH")
LASTING = ("ENOENT", "EACCES", "EPERM", "EISDIR", "ENOTDIR", "ENAMETOOLONG", "ELOOP", "EINVAL")


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """What was waited, without waiting."""
    waited = []
    monkeypatch.setattr(disks.time, "sleep", waited.append)
    return waited


class Failing:
    """A function that fails a few times before it works; for paths of one ending only."""

    def __init__(self, function, error: Exception, times: int, ending: str = ""):
        self.function, self.error, self.left, self.ending = function, error, times, ending

    def __call__(self, *arguments, **options):
        if self.left and "".join(map(str, arguments[:1])).endswith(self.ending):
            self.left -= 1
            raise self.error
        return self.function(*arguments, **options)


def data() -> bytes:
    return b"data"


def fault(name: str) -> OSError:
    return OSError(getattr(errno, name), os.strerror(getattr(errno, name)))


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_waited_out(name, waits):
    assert patient(Failing(data, fault(name), 3)) == b"data"
    assert waits == sorted(waits)
    assert len(waits) == 3


def test_faults_without_a_number_pass_too(waits):
    for error in (TimeoutError("slow"), ConnectionResetError("reset"), BrokenPipeError()):
        assert patient(Failing(data, error, 1)) == b"data"
    assert len(waits) == 3


@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_lasts_is_not_tried_again(name, waits):
    with pytest.raises(OSError, match=os.strerror(getattr(errno, name))):
        patient(Failing(data, fault(name), 1))
    assert waits == []


def test_the_waits_come_to_an_end(waits):
    with pytest.raises(OSError, match="Input/output"):
        patient(Failing(data, fault("EIO"), 10**9))
    assert len(waits) == 4
    assert sum(waits) < 10


def test_another_error_is_none_of_its_business(waits):
    with pytest.raises(ValueError, match="no fault"):
        patient(Failing(data, ValueError("no fault of a disk"), 1))
    assert waits == []


def opens(monkeypatch, error: OSError, times: int, ending: str) -> None:
    """The next so many times that a file of this ending is opened, it fails."""
    monkeypatch.setattr(builtins, "open", Failing(builtins.open, error, times, ending))


def test_an_image_whose_disk_fails(tmp_path, monkeypatch, waits):
    path = tmp_path / "a.jpg"
    path.write_bytes(picture(1))
    opens(monkeypatch, fault("EIO"), 2, "a.jpg")
    assert read_picture(str(path)) == picture(1)
    opens(monkeypatch, fault("EIO"), 10**9, "a.jpg")
    with pytest.raises(UnreadableImage, match="Input/output error") as caught:
        read_picture(str(path))
    assert caught.value.reason == NO_ACCESS
    opens(monkeypatch, fault("ENOENT"), 1, "a.jpg")
    with pytest.raises(UnreadableImage) as caught:
        read_picture(str(path))
    assert caught.value.reason == MISSING


def test_a_tar_whose_disk_fails(tmp_path, monkeypatch, waits):
    source = open_source(write_shards(tmp_path, 1, 3))
    parts = tars._parts
    monkeypatch.setattr(tars, "_parts", Failing(parts, fault("ESTALE"), 2))
    assert source.read(1) == (picture(1), caption(1))
    monkeypatch.setattr(tars, "_parts", Failing(parts, fault("EIO"), 10**9))
    with pytest.raises(UnreadableImage) as caught:
        source.read(1)
    assert caught.value.reason == NO_ACCESS


class Reader:
    """Says what the ArrayRecord reader says: recorded from one whose reads were made to fail."""

    said = (
        "{}() failed: Input/output error; reading {}; at byte 2522976; Could not read from the "
        "underlying reader; at byte 0"
    )

    def __init__(self, reader, path: str, times: int, said: str = said):
        self.reader, self.path, self.left, self.text = reader, path, times, said

    def read(self, rows):
        if self.left:
            self.left -= 1
            raise RuntimeError(self.text.format("pread", self.path))
        return self.reader.read(rows)


def test_a_shard_whose_disk_fails(tmp_path, monkeypatch, waits):
    listed = open_source(write_list(tmp_path / "list", 4))
    convert(listed, tmp_path / "set", ConvertSettings(side=0), progress=False)
    sources = [open_source(str(tmp_path / "set")) for _ in range(2)]  # which read a little
    opened = record_files.opened
    plan = {"times": 2}
    monkeypatch.setattr(
        record_files, "opened", lambda path: Reader(opened(path), path, plan["times"])
    )
    assert sources[0].read(1) == (picture(1), caption(1))
    assert len(waits) == 2
    plan["times"] = 10**9
    with pytest.raises(UnreadableImage, match="Input/output error") as caught:
        sources[1].read(1)
    assert caught.value.reason == NO_ACCESS


def test_a_shard_that_cannot_be_opened(tmp_path, monkeypatch, waits):
    listed = open_source(write_list(tmp_path / "list", 4))
    convert(listed, tmp_path / "set", ConvertSettings(side=0), progress=False)
    source, later = (open_source(str(tmp_path / "set")) for _ in range(2))
    module = record_files.array_record_module

    class Refusing:
        left = 1

        @classmethod
        def ArrayRecordReader(cls, path, **options):
            if cls.left:
                cls.left -= 1
                raise RuntimeError(
                    f"read() failed: Connection timed out; reading {path}; at byte 4128768; Failed "
                    "to read RiegeliPostscript"
                )
            return module.ArrayRecordReader(path, **options)

    monkeypatch.setattr(record_files, "array_record_module", Refusing)
    assert source.read(1) == (picture(1), caption(1))
    assert len(waits) == 1
    Refusing.left = 10**9
    with pytest.raises(UnreadableImage, match="Connection timed out") as caught:
        later.read(1)
    assert caught.value.reason == NO_ACCESS
    with pytest.raises(OSError, match="Connection timed out"):
        open_source(str(tmp_path / "set"))


def test_a_system_that_refuses_a_shard_is_no_broken_image(tmp_path, monkeypatch, waits):
    """Also in words that are not known to pass."""
    listed = open_source(write_list(tmp_path / "list", 4))
    convert(listed, tmp_path / "set", ConvertSettings(side=0), progress=False)
    source, opened = open_source(str(tmp_path / "set")), record_files.opened
    said = "pread() failed: Key has expired; reading {1}"
    monkeypatch.setattr(
        record_files, "opened", lambda path: Reader(opened(path), path, 10**9, said)
    )
    with pytest.raises(UnreadableImage, match="Key has expired") as caught:
        source.read(1)
    assert caught.value.reason == NO_ACCESS
    assert waits == []


def test_a_list_whose_disk_fails(tmp_path, monkeypatch, waits):
    source = open_source(write_list(tmp_path, 4))
    pread = os.pread
    monkeypatch.setattr(os, "pread", Failing(pread, fault("EIO"), 2))
    assert source.read(1) == (picture(1), caption(1))
    monkeypatch.setattr(os, "pread", Failing(pread, fault("EIO"), 10**9))
    with pytest.raises(SourceError, match=r"pairs.tsv can no longer be read \(Input/output error"):
        source.read(1)


def test_a_mount_that_forgets_open_files(tmp_path, monkeypatch, waits):
    source = open_source(write_list(tmp_path, 4))
    stale, pread = source._file, os.pread

    def forgotten(file, *arguments):
        if file == stale:
            raise fault("ESTALE")
        return pread(file, *arguments)

    monkeypatch.setattr(os, "pread", forgotten)
    assert source.read(1) == (picture(1), caption(1))
    assert len(waits) == 1


def test_a_mount_that_goes_away(tmp_path, monkeypatch, waits):
    source = open_source(write_list(tmp_path, 4))
    stat = os.stat
    monkeypatch.setattr(os, "stat", Failing(stat, fault("ESTALE"), 2, "pairs.tsv"))
    assert source.caption(1) == caption(1)
    monkeypatch.setattr(os, "stat", Failing(stat, fault("ESTALE"), 10**9, "pairs.tsv"))
    with pytest.raises(SourceError, match="can no longer be read"):
        source.caption(1)


def test_real_waits_are_short(tmp_path, monkeypatch):
    path = Path(tmp_path / "a.jpg")
    path.write_bytes(picture(1))
    opens(monkeypatch, fault("EIO"), 1, "a.jpg")
    begin = time.monotonic()
    assert read_picture(str(path)) == picture(1)
    assert 0.05 < time.monotonic() - begin < 5
