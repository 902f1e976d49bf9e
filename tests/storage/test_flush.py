"""What was told up to a checkpoint is in the workdir before the checkpoint is."""

import jax
import numpy as np
import pytest
from tiny_run import small_config, write_pairs
from tiny_run import tiny_models as tiny_models

from protoclip_jax.data.augmentation import augmentation_named
from protoclip_jax.data.kept import Keep
from protoclip_jax.data.pipeline import Batches
from protoclip_jax.data.reader import Reading
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.data.walk import Section, Walk
from protoclip_jax.storage.paths import workdir_at
from protoclip_jax.storage.retries import Unreachable
from protoclip_jax.training import loop
from protoclip_jax.training.logging import read_metrics


@pytest.mark.slow
@pytest.mark.parametrize("remote", [False, True])
def test_a_run_that_goes_on_from_a_checkpoint_lacks_no_line(
    bucket, tmp_path, tiny_models, monkeypatch, remote
):
    pairs = write_pairs(tmp_path / "data", 24)
    settings = {"episode__count": 2, "episode__warmup": 2, "checkpoint__minutes": "none"}
    config = small_config(pairs, num_devices=jax.device_count(), log__every=1, **settings)
    workdir = workdir_at(f"{bucket.url}/run" if remote else tmp_path / "run")
    saved, save = {}, loop.Checkpoints.save

    def noted(self, step, *arguments):
        saved[step] = [line["step"] for line in read_metrics(workdir)]
        (events,) = (workdir / "tensorboard").iterdir()
        assert events.read_bytes().count(b"train/loss/total") == step
        save(self, step, *arguments)

    monkeypatch.setattr(loop.Checkpoints, "save", noted)
    loop.train(config, workdir)
    # A line a step, and that of each episode.
    assert saved == {3: [1, 2, 3, 3], 6: [1, 2, 3, 3, 4, 5, 6, 6]}


class OutOfReach:
    """A source whose bucket gives no answer."""

    name = fingerprint = "gs://b/pairs"

    def __len__(self) -> int:
        return 8

    def read(self, row: int):
        raise Unreachable("gs://b/1.jpg: no answer (tried 9 times in 300 s)")


def in_order(episode: int) -> np.ndarray:
    return np.arange(8)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_outage_ends_the_batches_by_its_name(workers):
    reading = Reading(
        source=OutOfReach(),
        tokenizer=Tokenizer(16),
        rows_of_episode=in_order,
        size=8,
        seed=0,
        image_size=24,
        augmentation={"train": augmentation_named("none"), "extract": None},
        parity=False,
        keep=Keep(),
    )
    walk = Walk([Section("train", 0, 8)], 4, workers=workers, rows=np.arange(4))
    with (
        Batches(walk, reading, workers=workers, threads=2) as batches,
        pytest.raises(Unreachable, match=r"tried 9 times in 300 s"),
    ):
        next(batches)
