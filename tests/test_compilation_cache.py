"""Where compiled programs are kept."""

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


def test_kinds_of_cpu_do_not_share(monkeypatch, tmp_path):
    folders = set()
    for text in ("flags : sse avx", "flags : sse", "Features : neon"):
        monkeypatch.setattr(Path, "read_text", lambda path, text=text: text)
        folders.add(compilation_cache.default_folder())
    assert len(folders) == 3
