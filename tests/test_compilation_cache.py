"""Where compiled programs are kept."""

import os
import tempfile
from pathlib import Path

import jax
import pytest

from protoclip_jax import compilation_cache


@pytest.fixture
def none_configured():
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_users_cache_is_used(none_configured, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compilation_cache.turn_on()
    assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "protoclip_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation_cache.default_folder().parent == tmp_path / ".cache" / "protoclip_jax"


def test_another_choice_stays(none_configured):
    jax.config.update("jax_compilation_cache_dir", "mine")
    compilation_cache.turn_on()
    assert jax.config.jax_compilation_cache_dir == "mine"


def without_home(monkeypatch) -> None:
    """As in a container whose user has no account."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


def test_without_a_home_programs_are_kept_in_the_temporary_folder(monkeypatch, tmp_path):
    """RUN-04."""
    without_home(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert tmp_path in compilation_cache.default_folder().parents


def test_where_nothing_can_be_written_nothing_is_kept(none_configured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilation_cache.turn_on()
    assert jax.config.jax_compilation_cache_dir is None
    without_home(monkeypatch)

    def none():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    assert compilation_cache.default_folder() is None


def test_a_folder_of_somebody_else_is_not_used(monkeypatch, tmp_path):
    """Programs that lie there would be run."""
    without_home(monkeypatch)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = compilation_cache.default_folder()
    folder.chmod(0o777)
    assert compilation_cache.default_folder() is None
    folder.chmod(0o700)
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert compilation_cache.default_folder() is None


def test_kinds_of_cpu_do_not_share(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = set()
    for text in ("flags : sse avx", "flags : sse", "Features : neon"):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        folders.add(compilation_cache.default_folder())
    assert len(folders) == 3
