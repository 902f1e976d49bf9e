"""What a run compiles and holds, beyond what the rooms' own tests look at."""

import jax
import pytest
from compilations import counted
from tiny_run import small_config, tiny_models, write_pairs  # noqa: F401 (a fixture)

from protoclip_jax.training import loop
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
