"""Options that cannot act: every one of config.py is asked when that is so."""

import pytest
from tiny_run import CONFIGS

from protoclip_jax.config import ConfigError
from protoclip_jax.idle_options import told
from protoclip_jax.recipe import apply_override, defaults, load_recipe, option_types, resolve

OPTIONS = [path for path, _, _ in option_types()]
CLIP = {"model.projection": "none"}
ALL_WARMUP = {"episode.warmup": "100"}

# Where each option has no effect, and is told with its value.
IDLE = {
    "model.projection_hidden": [CLIP, {"model.projection": "0"}],
    "model.projection_width": [CLIP],
    "model.batch_norm_group": [CLIP | {"model.name": "ViT-B-32"}],
    "data.image_column": [{"data.train": "emoji_text/val"}, {"data.train": "shards/0.tar"}],
    "data.caption_column": [{"data.train": "tfds:coco"}],
    "data.separator": [{"data.train": "gs://b/{0..9}.tar"}],
    "data.image_root": [{"data.train": "folder"}],
    "data.split": [{"data.train": "x.TSV"}, {"data.train": "emoji_text/val"}],
    "data.image_feature": [{"data.train": "a.csv"}],
    "data.text_feature": [{"data.train": "0.tar"}],
    "data.teacher": [{}],
    "data.augment_extraction": [CLIP, ALL_WARMUP, {"data.augmentation": "none"}],
    "data.threads": [{"data.workers": "2"}],
    "data.keep_side": [{"data.keep": "none"}],
    "data.keep_gigabytes": [CLIP, ALL_WARMUP, {"data.keep": "none"}],
    "episode.online": [CLIP, ALL_WARMUP],
    "episode.prototypes": [CLIP, ALL_WARMUP, {"objective.prototype": "0"}],
    "episode.external_prototypes": [CLIP, ALL_WARMUP, {}],
    "episode.iterations": [CLIP, ALL_WARMUP],
    "episode.redos": [CLIP, ALL_WARMUP],
    "episode.seeding": [CLIP, ALL_WARMUP],
    "episode.empty": [CLIP, ALL_WARMUP],
    "episode.spherical": [CLIP, ALL_WARMUP],
    "objective.temperature": [
        CLIP,
        {"objective.prototype": "0", "objective.external": "1", "data.teacher": "emoji_text"},
    ],
    "objective.back_translation": [CLIP, ALL_WARMUP],
    "objective.mask_unused": [CLIP, ALL_WARMUP],
    "objective.freeze": [CLIP, {"episode.warmup": "0"}],
    "optimizer.parity_schedule": [{}, {"optimizer.text_end_episode": "100"}],
    "evaluation.every": [{}, {"evaluation.suite": "emoji_text", "episode.count": "50"}],
    "checkpoint.keep_every": [{}, {"checkpoint.every": "5", "episode.count": "50"}],
}
# Another value than the default of each.
VALUES = {
    "model.projection_hidden": "64",
    "model.projection_width": "64",
    "model.batch_norm_group": "64",
    "data.image_column": "x",
    "data.caption_column": "x",
    "data.separator": ",",
    "data.image_root": "x",
    "data.split": "val",
    "data.image_feature": "x",
    "data.text_feature": "x",
    "data.teacher": "x.npy",
    "data.augment_extraction": "false",
    "data.threads": "3",
    "data.keep_side": "300",
    "data.keep_gigabytes": "7",
    "episode.online": "0.5",
    "episode.prototypes": "50",
    "episode.external_prototypes": "50",
    "episode.iterations": "7",
    "episode.redos": "3",
    "episode.seeding": "random",
    "episode.empty": "keep",
    "episode.spherical": "true",
    "objective.temperature": "0.5",
    "objective.back_translation": "false",
    "objective.mask_unused": "false",
    "objective.freeze": "false",
    "optimizer.parity_schedule": "true",
    "evaluation.every": "50",
    "checkpoint.keep_every": "101",
}
# They act in every recipe, or are refused where they could not.
ALWAYS = {
    "seed", "parity", "model.name", "model.projection", "model.weights", "model.rematerialise",
    "model.dtype", "data.train", "data.limit", "data.augmentation", "data.workers", "data.keep",
    "data.max_unreadable", "data.parity_preprocess", "episode.count", "episode.size",
    "episode.warmup", "episode.locked", "episode.replacement", "objective.clip",
    "objective.prototype", "objective.external", "optimizer.batch", "optimizer.learning_rate",
    "optimizer.text_learning_rate", "optimizer.warmup_steps", "optimizer.weight_decay",
    "optimizer.beta1", "optimizer.beta2", "optimizer.epsilon", "optimizer.clip_norm",
    "optimizer.accumulate", "optimizer.max_skipped", "optimizer.text_start_episode",
    "optimizer.text_end_episode", "evaluation.suite", "checkpoint.every", "checkpoint.minutes",
    "checkpoint.keep", "checkpoint.best", "log.every", "log.progress", "log.tensorboard",
    "log.wandb_project", "mesh.fsdp",
}  # fmt: skip


def config_of(overrides: dict[str, str]):
    recipe = defaults()
    for path, text in ({"data.train": "pairs.tsv"} | overrides).items():
        apply_override(recipe, path, text)
    return resolve(recipe, num_devices=8)


def test_every_option_is_asked():
    assert set(IDLE) == set(VALUES)
    assert set(IDLE) | ALWAYS == set(OPTIONS)
    assert not set(IDLE) & ALWAYS


@pytest.mark.parametrize(
    ("path", "situation"), [(path, where) for path, all_ in IDLE.items() for where in all_]
)
def test_option_without_effect_is_told_once(path, situation):
    lines = told(config_of(situation | {path: VALUES[path]}))
    assert sum(f" {path}=" in line for line in lines) == 1, lines
    assert all("\n" not in line for line in lines)
    # Not without it.
    assert not any(f" {path}=" in line for line in told(config_of(situation)))


@pytest.mark.parametrize("path", IDLE)
def test_option_with_effect_is_not_told(path):
    acting = {
        "data.separator": {"data.train": "x.csv"},
        "data.split": {"data.train": "tfds:coco"},
        "data.image_feature": {"data.train": "tfds:coco"},
        "data.text_feature": {"data.train": "folder"},
        "data.teacher": {"objective.external": "1"},
        "episode.external_prototypes": {"objective.external": "1", "data.teacher": "x.npy"},
        "objective.freeze": {"episode.warmup": "1"},
        "optimizer.parity_schedule": {"episode.locked": "1"},
        "evaluation.every": {"evaluation.suite": "emoji_text"},
        "checkpoint.keep_every": {"episode.count": "202"},
    }.get(path, {})
    assert told(config_of(acting | {path: VALUES[path]})) == []


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_published_recipes_set_nothing_idle(path):
    """But those of plain CLIP, which are ProtoCLIP's with the heads taken away."""
    lines = told(resolve(load_recipe(str(path)), num_devices=8))
    assert len(lines) == ("clip" in path.stem)
    assert all(line.endswith("model.projection=none is plain CLIP") for line in lines)


def test_what_parity_sets_is_nobodys_mistake():
    assert told(config_of({"parity": "reference"})) == []
    assert told(config_of(CLIP | {"parity": "reference"})) == []


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (ALL_WARMUP, "objective.prototype=1: warm-up and locked episodes take all"),
        ({"episode.warmup": "60", "episode.locked": "40"}, "take all of episode.count=100"),
        (
            ALL_WARMUP | {"objective.external": "1", "data.teacher": "x.npy"},
            "objective.prototype=1, objective.external=1: warm-up",
        ),
        ({"optimizer.learning_rate": "0"}, "nothing will be trained"),
        ({"data.keep_gigabytes": "0"}, "no picture is kept"),
        (
            {"checkpoint.best": "zero_shot/top1", "evaluation.suite": "emoji_text"},
            "only the last checkpoint is evaluated (evaluation.every=0",
        ),
        (
            {
                "checkpoint.best": "-geometry/modality_gap",
                "evaluation.suite": "emoji_text",
                "evaluation.every": "7",
                "checkpoint.every": "15",
            },
            "only the last checkpoint is evaluated (evaluation.every=7, checkpoint.every=15)",
        ),
    ],
)
def test_other_things_that_cannot_act_are_told(overrides, line):
    (found,) = told(config_of(overrides))
    assert line in found


def test_best_with_an_evaluation_beside_a_checkpoint_is_not_told():
    overrides = {"checkpoint.best": "zero_shot/top1", "evaluation.suite": "emoji_text"}
    assert told(config_of(overrides | {"evaluation.every": "10", "checkpoint.every": "5"})) == []
    only_text = {"optimizer.learning_rate": "0", "optimizer.text_learning_rate": "1"}
    assert told(config_of(only_text)) == []


VIT = {"model.name": "ViT-B-32", "model.projection": "0"}
ONE = {
    "optimizer.batch": "1",
    "optimizer.warmup_steps": "1",
    "episode.size": "8",
    "episode.prototypes": "4",
}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.name": "RN5O"}, 'config.model.name=RN5O: there is no model preset "RN5O"'),
        # A batch of one.
        (ONE, "InfoNCE tells a pair from the others"),
        (ONE | VIT, "InfoNCE tells a pair from the others"),
        (ONE | {"objective.clip": "0", "episode.warmup": "0"}, "statistics of one row"),
        ({"model.batch_norm_group": "1"}, "model.batch_norm_group=1: BatchNorm"),
        (
            {"model.batch_norm_group": "1", "model.name": "ViT-B-32"},
            "model.batch_norm_group=1: BatchNorm",
        ),
        ({"model.batch_norm_group": "1"} | CLIP, "model.batch_norm_group=1: BatchNorm"),
        (
            {"optimizer.batch": "8", "optimizer.accumulate": "8"},
            "optimizer.batch=8 in optimizer.accumulate=8 parts: BatchNorm",
        ),
        # Weights.
        (
            {"objective.clip": "0", "objective.prototype": "0"},
            "every weight is 0, and nothing would be trained",
        ),
        ({"objective.clip": "0"} | CLIP, "every weight is 0"),
        ({"objective.clip": "0"} | ALL_WARMUP, "every weight is 0"),
        ({"objective.clip": "0"}, "1 of 100 episodes have no other loss"),
        ({"objective.clip": "0", "episode.locked": "2"}, "3 of 100 episodes have no other loss"),
        ({"episode.prototypes": "1"}, "episode.prototypes=1: a softmax over one prototype"),
        (
            {
                "episode.external_prototypes": "1",
                "objective.external": "1",
                "data.teacher": "x.npy",
            },
            "episode.external_prototypes=1: a softmax over one prototype",
        ),
        # Spans of the run.
        ({"optimizer.text_start_episode": "100"}, "text_start_episode=100 is not within the run"),
        ({"optimizer.text_start_episode": "1000"}, "text would never be trained"),
        (
            {"optimizer.text_start_episode": "98", "optimizer.warmup_steps": "780"},
            "warmup_steps=780 is not shorter than the 780 steps from text_start_episode=98",
        ),
        ({"optimizer.text_end_episode": "2"}, "warmup_steps=2000 is not shorter than the 780"),
        (
            {
                "optimizer.text_end_episode": "2",
                "optimizer.warmup_steps": "780",
                "optimizer.parity_schedule": "true",
                "episode.locked": "1",
            },
            "warmup_steps=780 is not shorter than the 780",
        ),
        # The best checkpoint: case RUN-10.
        ({"checkpoint.best": "zeroshot/top1"}, "evaluation.suite is empty"),
        ({"checkpoint.best": "zero_shot/top1"}, "evaluation.suite is empty"),
        (
            {"checkpoint.best": "zeroshot/top1", "evaluation.suite": "emoji_text"},
            "no evaluation measures 'zeroshot/top1': did you mean zero_shot/top1?",
        ),
        (
            {"checkpoint.best": "-loss/total", "evaluation.suite": "emoji_text"},
            "no evaluation measures 'loss/total': ",
        ),
        (
            {"checkpoint.best": "", "evaluation.suite": "emoji_text"},
            "config.checkpoint.best is empty",
        ),
        ({"data.max_unreadable": "1.5"}, "max_unreadable=1.5 is a share, at most 1"),
        ({"data.max_unreadable": "50"}, "max_unreadable=50 is a share"),
    ],
)
def test_what_would_be_another_run_is_refused(overrides, message):
    recipe = defaults()
    for path, text in ({"data.train": "pairs.tsv"} | overrides).items():
        apply_override(recipe, path, text)
    with pytest.raises(ConfigError) as caught:
        resolve(recipe, num_devices=1)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ONE | VIT | {"objective.clip": "0", "episode.warmup": "0"},
        {"objective.clip": "0", "episode.warmup": "0"},
        {"optimizer.batch": "8", "optimizer.accumulate": "8"} | VIT,
        {"optimizer.text_start_episode": "99", "optimizer.warmup_steps": "300"},
        {"optimizer.text_end_episode": "2", "optimizer.parity_schedule": "true"},
        {"episode.external_prototypes": "1"},
        {"checkpoint.best": "-geometry/modality_gap", "evaluation.suite": "emoji_text"},
        {"data.max_unreadable": "1"},
    ],
)
def test_what_can_act_is_not_refused(overrides):
    recipe = defaults()
    for path, text in ({"data.train": "pairs.tsv"} | overrides).items():
        apply_override(recipe, path, text)
    resolve(recipe, num_devices=1)
