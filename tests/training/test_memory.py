"""What a run compiles and holds, beyond what the rooms' own tests look at."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from tiny_run import small_config, tiny_models, write_pairs  # noqa: F401 (a fixture)

from protoclip_jax.training import checkpoint, checksum, loop, state
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.stopwatch import Stopwatch

pytestmark = [pytest.mark.usefixtures("tiny_models")]


def test_episodes_compile_nothing_new_and_features_end_before_training(tmp_path, monkeypatch):
    config = small_config(
        write_pairs(tmp_path / "data"),
        num_devices=8,
        episode__count=3,
        episode__warmup=0,
        episode__size=26,
        data__augmentation="none",
    )
    programs, held = [], []

    def looking(self, *arguments):
        """In place of the training, whose step takes long to compile."""
        held.append([array.shape for array in jax.live_arrays()])
        for _ in range(config.steps_per_episode):
            next(self.batches)
        return {}, 0

    monkeypatch.setattr(loop.Trainer, "train", looking)
    trainer = loop.Trainer(config, tmp_path / "run")
    try:
        with trainer.input.batches() as trainer.batches:
            for episode in range(3):
                with counted() as found:
                    trainer.train_episode(episode, phase_of(config, episode), Stopwatch())
                programs += found
    finally:
        trainer.close()
    assert programs[0] > 0
    assert programs[1:] == [0, 0]
    for shapes in held:
        assert (6, 12) in shapes  # the prototypes
        assert not {(2, 26, 12), (26, 12)} & set(shapes)


EMBEDDING = (49408, 32)  # of the tokens: in the parameters and both moments


def alive(shape: tuple[int, ...]) -> int:
    gc.collect()
    return sum(array.shape == shape for array in jax.live_arrays())


@pytest.fixture
def saved(tmp_path):
    """A workdir with a checkpoint after three steps, and the state in it, off the devices."""
    config = small_config(write_pairs(tmp_path / "data"), num_devices=8, episode__count=2)
    trainer = loop.Trainer(config, tmp_path / "run")
    noise = jax.tree.map(
        lambda leaf: leaf + 1 if leaf.dtype == jnp.float32 else leaf, trainer.state["opt_state"]
    )
    trainer.state |= {"opt_state": noise, "step": jnp.int32(3)}
    trainer.done = 3
    trainer.save()
    trainer.close()
    return config, tmp_path / "run", jax.device_get(trainer.state)


@pytest.fixture
def reading(monkeypatch):
    """Refuses to initialise a model; notes how many embeddings are there when reading begins."""
    found = []
    restore = checkpoint.Checkpoints.restore

    def noting(self, step, like):
        found.append(alive(EMBEDDING))
        return restore(self, step, like)

    def refused(*_):
        raise AssertionError("initialised")

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", noting)
    monkeypatch.setattr(state, "create", refused)
    return found


def places(tree):
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def test_a_resumed_run_holds_its_state_once(saved, reading):
    config, workdir, expected = saved
    gc.collect()
    trainer = loop.Trainer(config, workdir)
    try:
        assert reading == [0]
        assert alive(EMBEDDING) == 3
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(trainer.state), expected)
        assert places(trainer.state) == state.shardings(trainer.like, trainer.mesh)
    finally:
        trainer.close()


def test_a_run_from_other_weights_initialises_no_others(saved, reading, tmp_path):
    _, workdir, expected = saved
    config = small_config(tmp_path / "data" / "pairs.tsv", num_devices=8, model__weights=workdir)
    trainer = loop.Trainer(config, tmp_path / "second")
    try:
        assert reading == [0]
        assert trainer.done == trainer.state["step"] == 0
        for name in ("params", "batch_stats"):
            jax.tree.map(np.testing.assert_array_equal, trainer.state[name], expected[name])
        assert all(np.all(np.asarray(x) == 0) for x in jax.tree.leaves(trainer.state["opt_state"]))
        assert places(trainer.state) == state.shardings(trainer.like, trainer.mesh)
    finally:
        trainer.close()


def test_checksums_hold_no_copy_of_the_whole(monkeypatch):
    """A program that sums holds a copy of what it sums: one large array, or all small ones."""
    rng = np.random.default_rng(0)
    shapes = ((1024, 1024), (7,), (2, 2048, 512), (), (3, 1), (1024, 1024))
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    apart = [int(checksum.checksum([array])[0]) for array in arrays]
    compiled, held = checksum._checksums, []

    def noting(leaves):
        held.append(compiled.lower(leaves).compile().memory_analysis().temp_size_in_bytes)
        return compiled(leaves)

    monkeypatch.setattr(checksum, "_checksums", noting)
    assert checksum.checksum(arrays).tolist() == apart
    assert len(set(apart)) == len(apart)
    assert len(held) == 4
    assert max(held) <= 1.1 * arrays[2].nbytes
    assert checksum.checksum({}).shape == (0,)
