"""A run of several processes that is over is not waited for again."""

from pathlib import Path

import pytest
from absl.testing import flagsaver
from tiny_run import small_config

from protoclip_jax import distributed, main
from protoclip_jax.config import ConfigError
from protoclip_jax.recipe import configured
from protoclip_jax.training import finished

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.py")


@pytest.fixture
def over(tmp_path):
    config = small_config(tmp_path / "pairs.tsv", data__keep="pixels")
    finished.mark(tmp_path, config)
    (tmp_path / "checkpoints" / str(config.total_steps)).mkdir(parents=True)
    return config


def test_mark_is_of_this_recipe_with_its_last_checkpoint(over, tmp_path):
    assert finished.is_marked(tmp_path, over)
    elsewhere = {"log__every": 7, "data__workers": 2}
    same = small_config(tmp_path / "copy.tsv", data__keep="pixels", **elsewhere)
    assert finished.is_marked(tmp_path, same)
    for other in ({"seed": 3}, {"episode__count": over.episode.count + 1}):
        longer = small_config(tmp_path / "pairs.tsv", **{"data__keep": "pixels"} | other)
        assert not finished.is_marked(tmp_path, longer)
    (tmp_path / "checkpoints" / str(over.total_steps)).rmdir()
    assert not finished.is_marked(tmp_path, over)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": 6, "recipe": []}', "[" * 100_000])
def test_damaged_mark_is_none(over, tmp_path, text):
    (tmp_path / finished.FILE).write_text(text)
    assert not finished.is_marked(tmp_path, over)


def test_the_command_says_so_where_nobody_comes(over, tmp_path, monkeypatch):
    asked = []

    def join(*members, search, over):
        asked.append((members, search, over()))
        raise ConfigError("nobody comes")

    monkeypatch.setattr(distributed, "join", join)
    config = configured(QUICKSTART, [], num_devices=None)
    (tmp_path / "checkpoints" / str(config.total_steps)).mkdir(parents=True)
    place = {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 1}
    for given in ({"workdir": str(tmp_path)}, {"dry_run": True}):
        with flagsaver.flagsaver(config=QUICKSTART, **place, **given):
            assert main._run(["main", []]) == 2
    finished.mark(tmp_path, config)
    with flagsaver.flagsaver(config=QUICKSTART, workdir=str(tmp_path), **place):
        assert main._run(["main", []]) == 2
    assert [members for members, *_ in asked] == [("127.0.0.1:1", 2, 1)] * 3
    *before, (_, _, after) = asked
    assert [said for *_, said in before] == [None, None]
    assert f"is finished: {config.total_steps} steps" in after
