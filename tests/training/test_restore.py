"""A trained model out of a workdir: the checkpoint that was asked for, and of this model."""

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
    weights = start_weights(run, like)
    assert weights.keys() == {"params", "batch_stats"}
    assert numbers(weights["params"]) == {6}
    assert numbers(weights["batch_stats"]) == {60}


def test_weights_of_another_model_are_refused_by_name(run):
    config = small_config("pairs.tsv", model__projection_width=10)
    _, like = state.abstract(config, state.make_mesh())
    with pytest.raises(ConfigError, match="is another model") as caught:
        start_weights(run, like)
    assert "projection_head" in str(caught.value)
    assert "(24, 12)" in str(caught.value)
    assert "(24, 10)" in str(caught.value)
