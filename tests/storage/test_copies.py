"""A local copy belongs to one object, is whole, and does not pile up."""

import os
import shutil
import time
from pathlib import Path

import pytest

from protoclip_jax.storage import copies, objects
from protoclip_jax.storage.copies import local_copy


@pytest.fixture(autouse=True)
def _nothing_in_use(monkeypatch):
    monkeypatch.setattr(copies, "_in_use", {})


def held(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def leave_a_part(folder: Path, seconds: float) -> Path:
    part = folder / "0-0-x.npy.1.part"
    part.write_bytes(b"half")
    os.utime(part, (time.time() - seconds,) * 2)
    return part


def test_a_copy_is_made_once_and_again_for_another_object(bucket):
    path = f"{bucket.url}/list.tsv"
    objects.write(path, b"one")
    first = Path(local_copy(path))
    assert first.read_bytes() == b"one"
    downloads = len(bucket.requests("alt=media"))
    assert local_copy(path) == str(first)
    assert len(bucket.requests("alt=media")) == downloads
    objects.write(path, b"two")  # as long as the other
    second = Path(local_copy(path))
    assert second.read_bytes() == b"two"
    assert second != first


def test_a_local_file_is_its_own_copy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert local_copy("x.npy") == str(tmp_path / "x.npy")


def test_other_versions_go_when_nobody_uses_them(bucket):
    path = f"{bucket.url}/list.tsv"
    objects.write(path, b"one")
    first = Path(local_copy(path))
    objects.write(path, b"two")
    second = Path(local_copy(path))
    assert held(second) == sorted([first.name, second.name])  # this process uses the first
    copies._in_use.clear()
    objects.write(path, b"three")
    third = Path(local_copy(path))
    assert held(third) == [third.name]


def test_copies_long_unused_and_parts_of_killed_processes_go(bucket):
    for name in ("a.npy", "b.npy"):
        objects.write(f"{bucket.url}/{name}", name.encode())
    first = Path(local_copy(f"{bucket.url}/a.npy"))
    old, fresh = leave_a_part(first.parent, 2 * 86400), leave_a_part(first.parent / "..", 0)
    fresh = fresh.rename(first.parent / "1-1-x.npy.2.part")
    second = Path(local_copy(f"{bucket.url}/b.npy"))
    assert held(second) == sorted([first.name, second.name, fresh.name])
    assert not old.exists()
    copies._in_use.clear()
    os.utime(first, (time.time() - 31 * 86400,) * 2)
    objects.write(f"{bucket.url}/c.npy", b"c")
    third = Path(local_copy(f"{bucket.url}/c.npy"))
    assert held(third) == sorted([second.name, third.name, fresh.name])


def test_an_object_that_changes_while_it_is_copied_is_told(bucket, monkeypatch):
    path = f"{bucket.url}/list.tsv"
    objects.write(path, b"one")
    read = objects.read

    def changed(*arguments):
        content = read(*arguments)
        objects.write(path, b"two")
        return content

    monkeypatch.setattr(objects, "read", changed)
    with pytest.raises(OSError, match="changed while it was read: start again"):
        local_copy(path)
    assert not list((Path(os.environ["XDG_CACHE_HOME"]) / "protoclip_jax" / "copies").iterdir())


def test_large_copies_are_announced_and_need_room(bucket, monkeypatch, capsys):
    path = f"{bucket.url}/teacher.npy"
    objects.write(path, b"x" * 1000)
    monkeypatch.setattr(copies, "_LARGE", 500)
    local_copy(path)
    assert f"copies {path} (0.0 GB) to " in capsys.readouterr().err
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _: usage._replace(free=999))
    objects.write(path, b"y" * 1000)
    with pytest.raises(OSError, match=r"room for .*: make room, or set XDG_CACHE_HOME"):
        local_copy(path)
