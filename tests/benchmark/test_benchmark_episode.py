"""`episode`: the three recipes differ in nothing but the method, and see the same pairs."""

import json

import numpy as np
import pytest
from tiny_run import small_config, tiny_models, write_pairs  # noqa: F401 (a fixture)

from protoclip_jax.benchmark.__main__ import main
from protoclip_jax.benchmark.episode import EpisodeRun, MemoryBatches, contenders
from protoclip_jax.config import ConfigError
from protoclip_jax.training.loop import Trainer

pytestmark = [pytest.mark.usefixtures("tiny_models")]

OPTIONS = {
    "model.name": "test-vit",
    "model.projection_hidden": 8,
    "model.projection_width": 8,
    "episode.size": 64,
    "episode.prototypes": 8,
    "optimizer.batch": 16,
    "optimizer.warmup_steps": 1,
}


def recipes(pairs, **settings):
    return contenders(small_config(pairs, num_devices=8, **settings), 0.5, repeats=1)


@pytest.mark.slow
def test_prints_the_costs_as_numbers(capsys):
    overrides = [f"--config.{name}={value}" for name, value in OPTIONS.items()]
    assert main(["episode", "--repeats=1", "--online=0.5", "--json", *overrides]) == 0
    numbers = json.loads(capsys.readouterr().out)
    seconds = numbers["seconds"]
    assert set(seconds["clip"]) == {"train"}
    assert set(seconds["online"]) == {"sample", "extract", "cluster", "back-translate", "train"}
    for name in ("offline", "online"):
        ratio = sum(seconds[name].values()) / seconds["clip"]["train"]
        assert numbers[f"{name}_cost_ratio"] == pytest.approx(ratio)
    assert numbers["prototypes"] == {"offline": 8, "online": 4}


def test_recipes_have_the_same_pairs_and_points_a_prototype():
    found = recipes("pairs.tsv")
    assert len({(one.episode.size, one.optimizer.batch, one.seed) for one in found.values()}) == 1
    assert found["clip"].model.projection is None
    points = [
        found[name].extracted / found[name].episode.prototypes for name in ("offline", "online")
    ]
    assert points[0] == points[1]


def test_share_that_cannot_be_extracted_is_refused():
    with pytest.raises(ConfigError, match=r"online=1\.5"):
        contenders(small_config("pairs.tsv", num_devices=8), 1.5, repeats=1)


def test_pairs_in_memory_are_those_of_the_pipeline_and_all_different(tmp_path):
    pairs = write_pairs(tmp_path / "data")
    rows = {}
    for name, config in recipes(pairs).items():
        trainer = Trainer(config, tmp_path / name)
        memory = MemoryBatches(trainer)
        extracted = 0 if name == "clip" else -(-config.extracted // config.optimizer.batch)
        batches = [next(memory) for _ in range(extracted + config.steps_per_episode)]
        trained = batches[extracted:]
        rows[name] = np.concatenate([batch["row"] for batch in trained])
        pictures = np.concatenate([batch["image"] for batch in trained])
        assert len({picture.tobytes() for picture in pictures}) == len(pictures)
        np.testing.assert_array_equal(next(memory)["row"], batches[0]["row"])
        trainer.close()
    assert len(set(rows["clip"].tolist())) == len(rows["clip"])
    np.testing.assert_array_equal(rows["clip"], rows["offline"])
    np.testing.assert_array_equal(rows["clip"], rows["online"])


def test_first_episode_is_a_warm_up(tmp_path):
    run = EpisodeRun(recipes(write_pairs(tmp_path / "data"))["clip"], tmp_path / "run")
    run._parts = [{"train": 100.0}, {"train": 1.0}, {"train": 3.0}, {"train": 2.0}]
    assert run.medians() == {"train": 2.0}
    run.close()
