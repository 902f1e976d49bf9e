"""A trained model out of a workdir: the checkpoint that was asked for, and of this model."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import (
    MODELS,
    small_config,
    tiny_models,  # noqa: F401 (a fixture)
)

import protoclip_jax
from protoclip_jax.config import CheckpointConfig, ConfigError
from protoclip_jax.models import presets
from protoclip_jax.training import record, state
from protoclip_jax.training.checkpoint import Checkpoints
from protoclip_jax.training.restore import start_weights

pytestmark = pytest.mark.usefixtures("tiny_models")


def filled(tree, number: float) -> dict:
    return jax.tree.map(lambda leaf: np.full(leaf.shape, number, leaf.dtype), tree)


def numbers(tree) -> set[float]:
    return {float(x) for leaf in jax.tree.leaves(jax.device_get(tree)) for x in np.unique(leaf)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with checkpoints 3 and 6, whose numbers are all 3 and 6 (statistics: 30, 60)."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(presets.PRESETS, "test-vit", MODELS["test-vit"])
        workdir = tmp_path_factory.mktemp("run")
        config = small_config(workdir / "pairs.tsv")
        _, like = state.shapes(config)
        record.write(workdir, config)
        checkpoints = Checkpoints(workdir, CheckpointConfig(keep=5))
        for step in (3, 6):
            trees = {"params": filled(like["params"], step), "opt_state": {}}
            trees |= {"batch_stats": filled(like["batch_stats"], 10 * step)}
            checkpoints.save(step, trees, record.meta(config))
        checkpoints.wait()
        checkpoints.close()
    return workdir


@pytest.mark.parametrize(("step", "expected"), [(None, 6), (3, 3), (6, 6)])
def test_the_checkpoint_that_was_asked_for(run, step, expected):
    encoder = protoclip_jax.load(run, step=step)
    assert numbers(encoder.params) == {expected}
    assert numbers(encoder.batch_stats) == {10 * expected}
    assert encoder.config == state.model_of(small_config("pairs.tsv"))


def test_another_run_starts_from_the_newest(run):
    config = small_config("pairs.tsv", optimizer__batch=16, seed=4)
    _, like = state.abstract(config, state.make_mesh())
    weights = start_weights(run, like, config)
    assert weights.keys() == {"params", "batch_stats"}
    assert numbers(weights["params"]) == {6}
    assert numbers(weights["batch_stats"]) == {60}


def test_weights_of_another_model_are_refused_by_name(run):
    config = small_config("pairs.tsv", model__projection_width=10)
    _, like = state.abstract(config, state.make_mesh())
    with pytest.raises(ConfigError, match="is another model") as caught:
        start_weights(run, like, config)
    assert "projection_head" in str(caught.value)
    assert "(24, 12)" in str(caught.value)
    assert "(24, 10)" in str(caught.value)


@pytest.mark.parametrize("change", ["activation", "heads", "text heads"])
def test_weights_of_equal_shapes_that_mean_something_else_are_refused(run, monkeypatch, change):
    ours = MODELS["test-vit"]
    other = {
        "activation": dataclasses.replace(ours, activation="gelu"),
        "heads": dataclasses.replace(ours, vision=dataclasses.replace(ours.vision, heads=4)),
        "text heads": dataclasses.replace(ours, text=dataclasses.replace(ours.text, heads=4)),
    }[change]
    monkeypatch.setitem(presets.PRESETS, "test-other", other)
    config = small_config("pairs.tsv", model__name="test-other")
    _, like = state.abstract(config, state.make_mesh())
    with pytest.raises(ConfigError, match="is another model") as caught:
        start_weights(run, like, config)
    assert {"activation": "gelu"}.get(change, "heads=4") in str(caught.value)


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def put_there(workdir: Path, step: int, **changes) -> None:
    """A checkpoint of the same shapes and another recipe."""
    config = small_config("pairs.tsv", **changes)
    _, like = state.shapes(config)
    checkpoints = Checkpoints(workdir, CheckpointConfig(keep=9))
    trees = {"params": filled(like["params"], step), "opt_state": {}}
    checkpoints.save(
        step, trees | {"batch_stats": filled(like["batch_stats"], step)}, record.meta(config)
    )
    checkpoints.wait()
    checkpoints.close()


def test_a_checkpoint_of_another_model_in_the_workdir_is_refused(copied, monkeypatch):
    other = dataclasses.replace(MODELS["test-vit"], activation="gelu")
    monkeypatch.setitem(presets.PRESETS, "test-other", other)
    put_there(copied, 9, model__name="test-other")
    for step in (None, 9):
        with pytest.raises(ConfigError, match="checkpoints/9 is of another model") as caught:
            protoclip_jax.load(copied, step=step)
        assert "model.name" in str(caught.value)
    assert numbers(protoclip_jax.load(copied, step=6).params) == {6}


def test_options_that_change_no_model_may_differ(copied):
    put_there(copied, 9, optimizer__learning_rate=0.1, model__rematerialise=True)
    assert numbers(protoclip_jax.load(copied).params) == {9}


def test_what_cannot_be_loaded_is_said_in_a_line(copied):
    with pytest.raises(ConfigError, match="no checkpoint of step 77: there are 3, 6"):
        protoclip_jax.load(copied, step=77)
    shutil.rmtree(copied / "checkpoints" / "6" / "params")
    with pytest.raises(ConfigError, match="checkpoints/6 cannot be read"):
        protoclip_jax.load(copied, step=6)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(ConfigError, match="holds no complete checkpoint yet"):
        protoclip_jax.load(copied)
    assert not (copied / "checkpoints").exists()
