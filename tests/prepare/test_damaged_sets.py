"""Converting into a folder whose files were damaged or exchanged, and into none."""

import json
import shutil
from pathlib import Path

import pytest
from pair_files import picture, write_list

from protoclip_jax.data.sources import open_source
from protoclip_jax.prepare.__main__ import main
from protoclip_jax.prepare.convert import ConvertSettings, convert


def zeroed(shard: Path) -> None:
    shard.write_bytes(bytes(shard.stat().st_size))


def exchanged(shard: Path) -> None:
    other = shard.with_name(shard.name.replace("-00001-", "-00000-"))
    content = shard.read_bytes()
    shard.write_bytes(other.read_bytes())
    other.write_bytes(content)


def with_other_bytes(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[data.index(picture(4)) + 30] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("change", [zeroed, exchanged, with_other_bytes, Path.unlink])
def test_a_finished_shard_that_is_another_now_is_made_again(tmp_path, capsys, change):
    source = open_source(write_list(tmp_path / "list", 9))
    settings, out = ConvertSettings(shard_rows=3), tmp_path / "set"
    meta = convert(source, out, settings, progress=False)
    change(out / "pairs-00001-of-00003.array_record")
    capsys.readouterr()
    assert convert(source, out, settings, progress=False) == meta
    assert open_source(str(out)).fingerprint == meta["fingerprint"]
    assert "all 3 shards are there" not in capsys.readouterr().out


OTHERS = "../other/pairs-00001-of-00003.array_record"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b"\xff", b"[" * 100_000, {"file": OTHERS}, {"file": 5},
     {"rows": [0, 3]}, {"rows": 3}, {"pairs": True}, {"pairs": 2}, {"bytes": "9"}, {"digest": ""},
     {"unreadable": [[1]]}, {"unreadable": {}}, {"odd": []}, {"odd": {"a": 5}}, {"samples": []}],
)  # fmt: skip
def test_a_damaged_outcome_counts_as_not_finished(tmp_path, capsys, content):
    source = open_source(write_list(tmp_path / "list", 7))
    settings, out = ConvertSettings(shard_rows=3), tmp_path / "set"
    meta = convert(source, out, settings, progress=False)
    (tmp_path / "other").mkdir()
    shutil.copy(out / Path(OTHERS).name, tmp_path / "other")
    outcome = out / "outcomes" / "00001.json"
    if isinstance(content, dict):
        content = json.dumps(json.loads(outcome.read_text()) | content).encode()
    outcome.write_bytes(content)
    capsys.readouterr()
    assert convert(source, out, settings, progress=False) == meta
    if b'unreadable": {}' not in content:  # as good as an empty list
        assert "2 of 3 shards are there" in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"5", b"\xff", b"[" * 100_000])
def test_damaged_settings_of_a_set_are_one_line(tmp_path, capsys, content):
    command = ["convert", write_list(tmp_path / "list", 3), "--out", str(tmp_path / "set")]
    assert main([*command, "--workers", "1"]) == 0
    (tmp_path / "set" / "convert.json").write_bytes(content)
    assert main([*command, "--workers", "1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "set/convert.json is damaged" in said[0]
    assert "choose another --out" in said[0]


@pytest.mark.parametrize(
    "command",
    [["convert", "x.tsv", "--out", ""], ["convert", "x.tsv", "--out", " "],
     ["download", "x.tsv", "--out", ""], ["stats", "x.tsv", "--json", ""]],
)  # fmt: skip
def test_an_empty_place_to_write_is_refused(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 2
    assert "it is empty: name where to write" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_set_without_a_readable_pair_is_a_failure(tmp_path, capsys):
    path = write_list(tmp_path / "list", 3, dict.fromkeys(range(3), "cut"))
    command = ["convert", path, "--out", str(tmp_path / "set"), "--workers", "1"]
    for _ in range(2):  # and when it is found to be done
        assert main(command) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "holds 0 pairs" in said
        assert "unreadable.tsv says why" in said
