"""Names of any letters on outputs of any encoding."""

import importlib
import io
import json
import os
import sys

import pytest
from absl import app
from pair_files import write_list

from protoclip_jax import main as training
from protoclip_jax.prepare.__main__ import main as prepare
from protoclip_jax.storage.atomic import write_json
from protoclip_jax.storage.paths import local_only, workdir_at

COMMANDS = ("prepare.__main__", "benchmark.__main__", "evaluate", "teacher", "data.emoji_text")


@pytest.fixture
def strict(monkeypatch):
    """Replaces standard output and error by strict ones; a function, for a test's own moment."""

    def replace(encoding: str) -> io.BytesIO:
        out = io.BytesIO()
        for name in ("stdout", "stderr"):
            stream = io.TextIOWrapper(out, encoding, errors="strict", write_through=True)
            monkeypatch.setattr(sys, name, stream)
        return out

    return replace


def test_every_command_shows_any_text(strict, monkeypatch):
    for name in COMMANDS:
        module = importlib.import_module(f"protoclip_jax.{name}")
        strict("ascii")
        with pytest.raises(SystemExit):
            module.main(["--help"])
        assert sys.stdout.errors == sys.stderr.errors == "backslashreplace", name
    strict("ascii")
    monkeypatch.setattr(app, "run", lambda *args, **kwargs: None)
    training.main()
    assert sys.stdout.errors == sys.stderr.errors == "backslashreplace"


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_prepare_with_names_that_cannot_be_written(tmp_path, strict, encoding):
    """RUN-14, WDS-05: folders with an umlaut and with a byte that is no UTF-8."""
    for folder in ("pärs", os.fsdecode(b"b\xe9d")):
        path = write_list(tmp_path / folder, 4, {2: "missing"})
        out, numbers = strict(encoding), tmp_path / folder / "stats.json"
        assert prepare(["stats", path, "--workers", "1", "--json", str(numbers)]) == 0
        shown = path if encoding == "utf-8" else path.encode("ascii", "backslashreplace").decode()
        assert shown.encode(errors="backslashreplace") in out.getvalue()
        assert json.loads(numbers.read_text(encoding="utf-8"))["source"] == path
        target = tmp_path / f"out{len(os.listdir(tmp_path))}"
        assert prepare(["convert", path, "--workers", "1", "--out", str(target)]) == 0
        assert "2\t" in (target / "unreadable.tsv").read_text(encoding="utf-8")


def test_folders_to_write_to_are_utf8(tmp_path):
    for opens in (workdir_at, lambda path: local_only(path, "shards are")):
        with pytest.raises(ValueError, match="not UTF-8, choose another folder"):
            opens(os.fsdecode(b"b\xe9d"))


def test_json_keeps_names_as_they_are(tmp_path):
    for name in ("pärs", "b\udce9d"):
        write_json(tmp_path / "x.json", {"name": name})
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"name": name}
    assert "\\udce9" in (tmp_path / "x.json").read_text(encoding="utf-8")
