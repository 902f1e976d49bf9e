"""A run of several processes that is over is not waited for again."""

import json
from pathlib import Path

import pytest
from absl import flags
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


def test_process_that_comes_back_alone_does_not_wait(over, tmp_path, capsys):
    several = {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 0}
    with flagsaver.flagsaver(**several):
        assert main._over(over, tmp_path)
        assert f"is finished: {over.total_steps} steps" in capsys.readouterr().err
        assert not main._over(over, None)
        steps = json.loads((tmp_path / finished.FILE).read_text())["steps"]
        assert steps == over.total_steps
        (tmp_path / finished.FILE).unlink()
        assert not main._over(over, tmp_path)
    finished.mark(tmp_path, over)
    assert flags.FLAGS.num_processes is None
    assert not main._over(over, tmp_path)  # one process looks at the run, and shows its table


@pytest.mark.parametrize("marked", [True, False])
def test_command_asks_before_it_joins(tmp_path, monkeypatch, marked):
    joined = []

    def join(*members, search):
        joined.append(members)
        raise ConfigError("nobody comes")

    monkeypatch.setattr(distributed, "join", join)
    config = configured(QUICKSTART, [], num_devices=None)
    if marked:
        finished.mark(tmp_path, config)
    (tmp_path / "checkpoints" / str(config.total_steps)).mkdir(parents=True)
    given = {"config": QUICKSTART, "workdir": str(tmp_path)}
    several = {"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 1}
    with flagsaver.flagsaver(**given, **several):
        code = main._run(["main", []])
    assert (code, joined) == ((0, []) if marked else (2, [("127.0.0.1:1", 2, 1)]))
