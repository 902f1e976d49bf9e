"""Machines with little room: one line that names the place and the way out."""

import errno
import os
import resource

import pytest
from tiny_run import CONFIGS

from protoclip_jax import machine_faults, main
from protoclip_jax.config import ConfigError
from protoclip_jax.data import workers
from protoclip_jax.data.seen_files import SourceError
from protoclip_jax.storage import atomic


def fault(name: str, *place: str) -> OSError:
    number = getattr(errno, name)
    return OSError(number, os.strerror(number), *place)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (fault("ENOSPC", "/w/recipe.json"), ("/w/recipe.json: No space left", "make room")),
        (fault("EMFILE", "/w/x"), ("Too many open files", "ulimit -n")),
        (fault("EIO", "/data/a.tar"), ("/data/a.tar: Input/output error", "disk or its network")),
        (fault("ESTALE"), ("Stale", "mount")),
    ],
)
def test_a_fault_of_the_machine_is_a_line(error, parts, capsys):
    assert main._told(error) == 1
    told = capsys.readouterr().err
    assert len(told.splitlines()) == 1
    for part in parts:
        assert part in told


@pytest.mark.parametrize(
    "error", [fault("ENOENT", "/w/x"), OSError("no number"), ValueError("ours")]
)
def test_other_errors_keep_their_traceback(error):
    assert main._told(error) is None


def test_the_limit_on_open_files_is_raised_or_told(monkeypatch):
    limits, set_to = {}, []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: set_to.append(pair))
    limits["now"] = (64, 4096)
    assert machine_faults.raise_open_files() is None
    assert set_to == [(4096, 4096)]
    limits["now"] = (1024, resource.RLIM_INFINITY)
    assert machine_faults.raise_open_files() is None
    limits["now"] = (64, 64)
    line = machine_faults.raise_open_files()
    assert "may open 64 files only" in line
    assert "ulimit -n" in line


@pytest.mark.parametrize(
    ("error", "part"),
    [
        (fault("ENOSPC"), "has no room"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -7."), "no room"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code -9."), "memory"),
        (RuntimeError("Worker process was terminated unexpectedly with exit code 1."), "by itself"),
    ],
)
def test_shared_memory_is_named(error, part):
    """RUN-06. What grain says was recorded with a /dev/shm of 64 KB and of 1 MB."""
    found = workers.explained(error, 2)
    assert isinstance(found, SourceError)
    assert part in str(found)
    if "room" in part:
        assert str(found).startswith("/dev/shm has no room (")
        assert "data.workers=0" in str(found)
    assert workers.explained(error, 0) is None


def test_a_shared_memory_that_cannot_be_written(monkeypatch):
    monkeypatch.setattr(workers.os, "access", lambda *_: False)
    assert "/dev/shm cannot be written" in str(workers.explained(fault("EACCES"), 1))
    monkeypatch.setattr(workers.os, "access", lambda *_: True)
    assert workers.explained(fault("EACCES", "/data/pairs.tsv"), 1) is None
    assert workers.explained(RuntimeError("something else"), 1) is None


def test_a_file_system_without_fsync(tmp_path, monkeypatch):
    """Of folders, or of files too; a disk that is full or fails is another matter."""
    for name in ("EINVAL", "ENOSYS", "EOPNOTSUPP"):

        def refused(file, name=name):
            raise fault(name)

        monkeypatch.setattr(atomic.os, "fsync", refused)
        atomic.write_text(tmp_path / "a", name)
        assert (tmp_path / "a").read_text() == name
    for name in ("EIO", "ENOSPC"):

        def failing(file, name=name):
            raise fault(name)

        monkeypatch.setattr(atomic.os, "fsync", failing)
        with pytest.raises(OSError, match=os.strerror(getattr(errno, name))) as caught:
            atomic.write_text(tmp_path / "a", "lost")
        assert caught.value.filename == str(tmp_path / "a")
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        assert (tmp_path / "a").read_text() == "EOPNOTSUPP"


@pytest.mark.parametrize("place", ["file", "file/below/it", "link/below"])
def test_a_workdir_that_is_no_folder_is_refused_at_once(tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"--workdir=.*is no folder"):
        main._workdir(str(tmp_path / place))
    assert main._workdir(str(tmp_path / "new" / "run")) == tmp_path / "new" / "run"
    assert not (tmp_path / "new").exists()


def test_a_workdir_that_cannot_be_written_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match="cannot be written"):
        main._workdir(str(tmp_path / "run"))


def test_a_platform_that_is_not_there(monkeypatch):
    import jax

    def none():
        raise RuntimeError("Unable to initialize backend 'cuda': no such thing\nmore")

    monkeypatch.setattr(jax, "local_devices", none)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ConfigError, match=r"JAX_PLATFORMS=cuda: Unable to initialize") as caught:
        main._check_platform()
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.delenv("JAX_PLATFORMS")
    with pytest.raises(RuntimeError):
        main._check_platform()


def test_double_precision_is_refused(monkeypatch, capsys, tmp_path):
    import jax
    from absl.testing import flagsaver

    monkeypatch.setattr(type(jax.config), "jax_enable_x64", True)
    with flagsaver.flagsaver(config=str(CONFIGS / "quickstart.py"), workdir=str(tmp_path / "run")):
        assert main.run(["main", []]) == 2
    assert "JAX_ENABLE_X64 is set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
