"""Data that lies elsewhere is the same data: its fingerprint says so, and not its path."""

import shutil

import jax
import numpy as np
import pytest
from tiny_run import (
    final_state,
    small_config,
    tiny_models,  # noqa: F401 (a fixture)
    write_pairs,
)

from protoclip_jax.config import ConfigError
from protoclip_jax.training import loop, record, requests
from protoclip_jax.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.usefixtures("tiny_models")]


def stored(config, source: str = "a", teacher: str | None = "b") -> dict:
    return record.meta(config) | {"source": source, "teacher": teacher}


def configs(tmp_path, **overrides):
    old = {
        "data__teacher": "old/t.npy",
        "data__image_root": "old/images",
        "objective__external": 1,
    }
    pairs = tmp_path / "pairs.tsv"
    return (
        small_config(pairs, num_devices=1, **old),
        small_config(tmp_path / "new.tsv", num_devices=1, **(old | overrides)),
    )


def test_paths_may_differ_where_fingerprints_are_equal(tmp_path):
    old, new = configs(tmp_path, data__teacher="new/t.npy", data__image_root="new/images")
    record.check_resumable(tmp_path, stored(old), stored(new))


@pytest.mark.parametrize("prints", [{"source": "c"}, {"teacher": "c"}, {"teacher": None}])
def test_other_data_is_refused_with_both_fingerprints(prints, tmp_path):
    old, new = configs(tmp_path)
    name, value = next(iter(prints.items()))
    with pytest.raises(ConfigError, match="holds another run") as caught:
        record.check_resumable(tmp_path, stored(old), stored(new, **prints))
    wanted = "null" if value is None else f'"{value}"'
    before = '"a"' if name == "source" else '"b"'
    assert f"{name}: stored {before}, wanted {wanted}" in str(caught.value)
    assert "data.train" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("data.caption_column", "caption"),
        ("data.separator", ","),
        ("data.split", "train[:50%]"),
        ("data.limit", 12),
        ("data.parity_preprocess", True),
        ("seed", 5),
    ],
)
def test_what_changes_rows_or_captions_is_refused(option, value, tmp_path):
    old, new = configs(tmp_path, **{option.replace(".", "__"): value})
    with pytest.raises(ConfigError, match=rf"\n  {option}: stored"):
        record.check_resumable(tmp_path, stored(old), stored(new))


@pytest.mark.slow
def test_a_run_goes_on_where_its_data_moved(tmp_path):
    def made(folder):
        return small_config(
            folder / "pairs.tsv",
            num_devices=8,
            episode__count=2,
            episode__warmup=1,
            data__teacher=folder / "teacher.npy",
            objective__external=1,
        )

    def stop_at(trainer, step):
        asked = trainer.requests.after_step
        trainer.requests.after_step = lambda: requests.LEAVE if trainer.done == step else asked()

    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    write_pairs(old)
    np.save(old / "teacher.npy", np.random.default_rng(1).normal(size=(40, 5)))
    loop.train(made(old), tmp_path / "whole")
    trainer = loop.Trainer(made(old), tmp_path / "moved")
    stop_at(trainer, 4)
    with pytest.raises(requests.Leaving):
        trainer.run()
    trainer.close()
    new.parent.mkdir()
    shutil.move(old, new)
    loop.train(made(new), tmp_path / "moved")
    assert Checkpoints(tmp_path / "moved").latest() == 6
    states = [final_state(made(new), tmp_path / name) for name in ("whole", "moved")]
    jax.tree.map(np.testing.assert_array_equal, *states)
    # Other rows under the new path are refused.
    lines = (new / "pairs.tsv").read_text().splitlines()
    (new / "pairs.tsv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    with pytest.raises(ConfigError, match=r"source: stored .*wanted "):
        loop.train(made(new), tmp_path / "moved")
