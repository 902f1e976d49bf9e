"""Every option of config.py, changed once: what reaches the rooms changes as it should, and nothing
else does. A new option without a line here fails.
"""

import dataclasses
from pathlib import Path

import pytest
from rehearsal import rehearse
from tiny_run import small_config

from protoclip_jax.config import REFERENCE_FLAGS, Config, flatten
from protoclip_jax.data.augmentation import AUGMENTATIONS, MEAN, STD, Augmentation, Colour
from protoclip_jax.data.kept import Keep
from protoclip_jax.models.presets import ProjectionConfig
from protoclip_jax.recipe import from_flat, option_types

DEFAULTS = {
    "seed": 0,
    "parity": "",
    "model.name": "RN50",
    "model.projection": 1,
    "model.projection_hidden": 2048,
    "model.projection_width": 128,
    "model.batch_norm_group": None,
    "model.weights": None,
    "model.rematerialise": False,
    "model.dtype": "bfloat16",
    "data.train": "",
    "data.image_column": "filepath",
    "data.caption_column": "title",
    "data.separator": "\t",
    "data.image_root": None,
    "data.split": "train",
    "data.image_feature": "image",
    "data.text_feature": "caption",
    "data.limit": None,
    "data.teacher": None,
    "data.augmentation": "light",
    "data.augment_extraction": True,
    "data.workers": 0,
    "data.threads": 8,
    "data.keep": "auto",
    "data.keep_side": 256,
    "data.keep_gigabytes": 4.0,
    "data.max_unreadable": 0.5,
    "data.parity_preprocess": False,
    "episode.count": 100,
    "episode.size": 200_000,
    "episode.warmup": 1,
    "episode.locked": 0,
    "episode.replacement": False,
    "episode.online": None,
    "episode.prototypes": 20_000,
    "episode.external_prototypes": None,
    "episode.iterations": 20,
    "episode.redos": 1,
    "episode.seeding": "d2",
    "episode.empty": "split",
    "episode.spherical": False,
    "objective.clip": 1.0,
    "objective.prototype": 1.0,
    "objective.external": 0.0,
    "objective.temperature": 0.01,
    "objective.back_translation": True,
    "objective.mask_unused": True,
    "objective.freeze": True,
    "optimizer.batch": 512,
    "optimizer.learning_rate": 5e-4,
    "optimizer.text_learning_rate": None,
    "optimizer.warmup_steps": 2000,
    "optimizer.weight_decay": 0.5,
    "optimizer.beta1": 0.9,
    "optimizer.beta2": 0.999,
    "optimizer.epsilon": 1e-8,
    "optimizer.clip_norm": None,
    "optimizer.accumulate": 1,
    "optimizer.max_skipped": 10,
    "optimizer.text_start_episode": 0,
    "optimizer.text_end_episode": None,
    "optimizer.parity_schedule": False,
    "evaluation.suite": "",
    "evaluation.every": 0,
    "checkpoint.every": 1,
    "checkpoint.minutes": 15.0,
    "checkpoint.keep": 2,
    "checkpoint.keep_every": None,
    "checkpoint.best": None,
    "log.every": 50,
    "log.progress": True,
    "log.tensorboard": True,
    "log.wandb_project": None,
    "mesh.fsdp": 1,
}
# A run of three phases in which every option but a few can act.
BASE = {
    "model.name": "test-vit",
    "model.projection_hidden": 24,
    "model.projection_width": 12,
    "model.dtype": "float32",
    "data.train": "pairs.tsv",
    "data.teacher": "teacher.npy",
    "episode.count": 3,
    "episode.size": 40,  # two steps and a tail
    "episode.locked": 1,
    "episode.prototypes": 4,
    "objective.external": 0.5,
    "optimizer.batch": 16,
    "optimizer.warmup_steps": 1,
    "evaluation.suite": "emoji_text",
    "log.every": 2,
}
LIGHT, CLIP = AUGMENTATIONS["light"], AUGMENTATIONS["clip"]
GONE = "nothing was told"
HERE = {"zero_shot/top1": 7.0}  # what the rehearsal's evaluation finds
NO_CACHE = {"cache.": GONE}
NO_COLOURS = {"colour.seed_of_pass_{}": GONE, "colour.settings_of_pass_{}": GONE}
ALL = ("image", "text", "heads")


def no_colours(*passes: int) -> dict[str, str]:
    return {name.format(number): GONE for name in NO_COLOURS for number in passes}


def both(name: str, value) -> dict:
    """Of k-means, for the modalities and for the teacher."""
    return {f"kmeans.{kind}.{name}": value for kind in ("modalities", "teacher")}


def teacher(*rows: int) -> dict:
    """Of which pairs the first position's row is, by episode."""
    points = tuple(round(3 + row / 1000, 4) for row in rows)
    return {"kmeans.teacher.points": points if len(points) > 1 else points[0]}


def keep(form: str = "pixels", side: int = 256, budget: int = 4_000_000_000) -> dict:
    return {"reading.keep": Keep(form, side, budget)}


def projection(hidden_layers: int = 1, hidden: int = 24, width: int = 12) -> dict:
    return {"model.projection": ProjectionConfig(hidden_layers, hidden, width)}


def saves(*steps: int, evaluated: tuple[int, ...] = ()) -> dict:
    """Of which checkpoints, and which have the metrics of an evaluation; the last always has."""
    with_metrics = (*evaluated, steps[-1])
    pairs = tuple((step, HERE if step in with_metrics else None) for step in steps)
    return {"saved": steps, "saved with metrics": pairs}


# By option: another value, and what is then told another way. A name that ends with a point stands
# for all that begin with it. REPLACED: what has to hold besides for the option to act.
CASES = {
    "seed": (3, {
        "source.seed": 3, "model.seed": 3, "reading.seed": 3, "reading.rows": (
            38, 57, 31, 32, 12, 29, 63, 21, 25, 1, 5, 48, 46, 41, 11, 24,
            13, 58, 23, 51, 7, 18, 62, 8, 9, 17, 4, 35, 44, 10, 49, 2,
            45, 26, 28, 34, 54, 14, 36, 33,
        ),
        "colour.seed_of_pass_0": 3, "colour.seed_of_pass_1": 3,
        **both("seed", 3 + 1), **teacher(37),
    }),
    "parity": ("reference", {
        **NO_CACHE, **keep("none"), "reading.parity": True, "start.parity": True,
        "reading.rows": (
            18, 10, 18, 26, 46, 44, 33, 20, 33, 0, 44, 8, 41, 20, 56, 2,
            31, 30, 18, 38, 7, 34, 36, 58, 56, 60, 11, 33, 12, 57, 56, 39,
            56, 37, 24, 38, 15, 59, 56, 22,
        ),
        "loss.mask_unused": False, "loss.compute_all": True, **teacher(26),
        "train.train_image": True, "train.project": True, "adamw.trained": ALL,
    }),
    "model.name": ("test-rn", {"model.vision": "ResNetConfig"}),
    "model.projection": (2, projection(hidden_layers=2)),
    "model.projection_hidden": (48, projection(hidden=48)),
    "model.projection_width": (10, projection(width=10) | {"features.width": 10}),
    "model.batch_norm_group": (4, {"model.batch_norm_group": 4}),
    "model.weights": ("/other", {"model.start": "/other"}),
    "model.rematerialise": (True, {"step.rematerialised": True}),
    "model.dtype": ("bfloat16", {"model.dtype": "bfloat16", "gathered.dtype": "bfloat16"}),
    "data.train": ("other.tsv", {"source.train": "other.tsv"}),
    "data.image_column": ("picture", {"source.image_column": "picture"}),
    "data.caption_column": ("words", {"source.caption_column": "words"}),
    "data.separator": (",", {"source.separator": ","}),
    "data.image_root": ("/images", {"source.image_root": "/images"}),
    "data.split": ("val", {"source.split": "val"}),
    "data.image_feature": ("picture", {"source.image_feature": "picture"}),
    "data.text_feature": ("words", {"source.text_feature": "words"}),
    "data.limit": (50, {"source.limit": 50}),
    "data.teacher": ("other.npy", {"teacher.path": "other.npy"}),
    "data.augmentation": ("clip", {
        "reading.augmentation.train": CLIP, "reading.augmentation.extract": CLIP,
        **no_colours(0, 1), "normalised": "float16",
    }),
    "data.augment_extraction": (False, {
        "reading.augmentation.extract": None,
        **no_colours(1), "normalised": ("bfloat16", "float16"),
    }),
    "data.workers": (3, {"batches.workers": 3}),
    "data.threads": (5, {"batches.threads": 5}),
    "data.keep": ("jpeg", {"cache.wanted": "jpeg", **keep("jpeg")}),
    "data.keep_side": (100, {"cache.side": 100, **keep(side=100)}),
    "data.keep_gigabytes": (2.0, {"cache.budget": 2_000_000_000, **keep(budget=2_000_000_000)}),
    "data.max_unreadable": (0.1, {"start.limit": 0.1}),
    "data.parity_preprocess": (True, {
        "start.parity": True, "cache.parity": True, "reading.parity": True,
    }),
    "episode.count": (4, {
        "progress.total": 8, "phases": ("warmup", "prototype", "prototype", "locked"),
        "walk.passes": (
            ("train", 0, 32), ("extract", 1, 40), ("train", 1, 32),
            ("extract", 2, 40), ("train", 2, 32), ("train", 3, 32),
        ),
        **both("seed", (1, 2)), **teacher(49, 46),
        "rates.image": (5e-4, 5e-4, 4.52e-4, 3.27e-4, 1.73e-4, 4.8e-5, 0, 0),
        "rates.text": (5e-4, 5e-4, 4.75e-4, 4.06e-4, 3.06e-4, 1.94e-4, 9.4e-5, 2.5e-5),
        **saves(2, 4, 6, 8), "evaluated": (0, 8), "logged": (2, 4, 6, 8),
    }),
    "episode.size": (48, {
        "progress.total": 9, "checkpoints.steps_per_episode": 3, "cache.images": 48,
        "reading.size": 48, "reading.rows": (
            42, 58, 57, 39, 61, 56, 43, 36, 52, 41, 59, 54, 33, 18, 50, 8,
            30, 4, 32, 55, 45, 10, 37, 0, 14, 9, 27, 48, 5, 17, 11, 35,
            12, 19, 1, 6, 16, 62, 29, 34, 49, 22, 13, 7, 3, 47, 24, 44,
        ),
        "walk.passes": (
            ("train", 0, 48), ("extract", 1, 48), ("train", 1, 48), ("train", 2, 48),
        ),
        "features.size": 48, **both("count", 48), **teacher(15),
        "rates.image": (5e-4, 5e-4, 4.52e-4, 3.27e-4, 1.73e-4, 4.8e-5, 0, 0, 0),
        "rates.text": (5e-4, 5e-4, 4.81e-4, 4.27e-4, 3.46e-4, 2.5e-4, 1.54e-4, 7.3e-5, 1.9e-5),
        **saves(3, 6, 9), "evaluated": (0, 9), "logged": (2, 3, 4, 6, 8, 9),
    }),
    "episode.warmup": (0, {
        "phases": ("prototype", "prototype", "locked"),
        "walk.passes": (
            ("extract", 0, 40), ("train", 0, 32), ("extract", 1, 40), ("train", 1, 32),
            ("train", 2, 32),
        ),
        **both("seed", (0, 1)), **teacher(42, 49),
        "train.project": (True, False), "adamw.trained": (ALL, ("text",)),
        "loss.weights.proto": (1.0, 0.0), "loss.weights.external": (0.5, 0.0),
        "loss.labels": ({"external": 3015, "image": 1015, "text": 2015}, {}),
        "loss.prototypes": (("external", "image", "text"), ()),
    }),
    "episode.locked": (0, {
        "phases": ("warmup", "prototype", "prototype"),
        "walk.passes": (
            ("train", 0, 32), ("extract", 1, 40), ("train", 1, 32), ("extract", 2, 40),
            ("train", 2, 32),
        ),
        **both("seed", (1, 2)), **teacher(49, 46),
        "train.train_image": True, "adamw.trained": (("image", "text"), ALL),
        "rates.image": (5e-4, 5e-4, 4.52e-4, 3.27e-4, 1.73e-4, 4.8e-5),
    }),
    "episode.replacement": (True, {
        **teacher(26), "reading.rows": (
            18, 10, 18, 26, 46, 44, 33, 20, 33, 0, 44, 8, 41, 20, 56, 2,
            31, 30, 18, 38, 7, 34, 36, 58, 56, 60, 11, 33, 12, 57, 56, 39,
            56, 37, 24, 38, 15, 59, 56, 22,
        ),
    }),
    "episode.online": (0.5, {
        "cache.images": 20, "features.size": 20, **both("count", 20),
        "walk.passes": (
            ("train", 0, 32), ("extract", 1, 20), ("train", 1, 32), ("train", 2, 32),
        ),
        # Whose labels the loss takes, and with what they are compared.
        "loss.labels": ({}, {"external": 103, "image": 101, "text": 102}),
        "online.teacher": [49, 22, 13, 7, 3, 47, 24, 44, 15, 40, 60, 51, 21, 53, 23, 38],
        "online.prototypes": ("external", "image", "text"),
        "online.compared": [101, 1015],
    }),
    "episode.prototypes": (5, both("k", 5) | {"prototypes.external_k": 5}),
    "episode.external_prototypes": (7, {"kmeans.teacher.k": 7, "prototypes.external_k": 7}),
    "episode.iterations": (9, both("iterations", 9)),
    "episode.redos": (2, both("redos", 2)),
    "episode.seeding": ("random", both("seeding", "random")),
    "episode.empty": ("keep", both("empty", "keep")),
    "episode.spherical": (True, both("spherical", True)),
    "objective.clip": (0.25, {"loss.weights.clip": 0.25}),
    "objective.prototype": (0.75, {"loss.weights.proto": (0.0, 0.75)}),
    "objective.external": (1.5, {"loss.weights.external": (0.0, 1.5)}),
    "objective.temperature": (0.5, {"loss.temperature": 0.5}),
    "objective.back_translation": (False, {"loss.back_translation": False}),
    "objective.mask_unused": (False, {"loss.mask_unused": False}),
    "objective.freeze": (False, {
        "train.train_image": True, "train.project": True, "adamw.trained": ALL,
        "loss.compute_all": True,
    }),
    "optimizer.batch": (10, {
        "progress.total": 12, "checkpoints.steps_per_episode": 4, "walk.batch": 10,
        "step.rows": 10, "loss.labels": ({}, {"external": 3009, "image": 1009, "text": 2009}),
        "walk.passes": (
            ("train", 0, 40), ("extract", 1, 40), ("train", 1, 40), ("train", 2, 40),
        ),
        "rates.image": (
            5e-4, 5e-4, 4.75e-4, 4.06e-4, 3.06e-4, 1.94e-4, 9.4e-5, 2.5e-5, 0, 0, 0, 0,
        ),
        "rates.text": (
            5e-4, 5e-4, 4.9e-4, 4.6e-4, 4.14e-4, 3.54e-4, 2.86e-4, 2.14e-4, 1.46e-4, 8.6e-5,
            4e-5, 1e-5,
        ),
        **saves(4, 8, 12), "evaluated": (0, 12), "logged": (2, 4, 6, 8, 10, 12),
    }),
    "optimizer.learning_rate": (2e-3, {
        "rates.image": (2e-3, 2e-3, 1.5e-3, 5e-4, 0, 0),
        "rates.text": (2e-3, 2e-3, 1.809e-3, 1.309e-3, 6.91e-4, 1.91e-4),
    }),
    "optimizer.text_learning_rate": (3e-3, {
        "rates.text": (3e-3, 3e-3, 2.714e-3, 1.964e-3, 1.036e-3, 2.86e-4),
    }),
    "optimizer.warmup_steps": (2, {
        "rates.image": (2.5e-4, 5e-4, 5e-4, 2.5e-4, 0, 0),
        "rates.text": (2.5e-4, 5e-4, 5e-4, 4.27e-4, 2.5e-4, 7.3e-5),
    }),
    "optimizer.weight_decay": (0.25, {"adamw.weight_decay": 0.25}),
    "optimizer.beta1": (0.5, {"adamw.beta1": 0.5}),
    "optimizer.beta2": (0.75, {"adamw.beta2": 0.75}),
    "optimizer.epsilon": (1e-3, {"adamw.eps": 1e-3}),
    "optimizer.clip_norm": (2.5, {"adamw.clip_norm": 2.5}),
    "optimizer.accumulate": (2, {"step.parts": 2}),
    "optimizer.max_skipped": (4, {"skips before the end": 4}),
    "optimizer.text_start_episode": (1, {"rates.text": (0, 0, 5e-4, 5e-4, 3.75e-4, 1.25e-4)}),
    "optimizer.text_end_episode": (2, {"rates.text": (5e-4, 5e-4, 3.75e-4, 1.25e-4, 0, 0)}),
    "optimizer.parity_schedule": (True, {"rates.text": (0, 0, 5e-4, 5e-4, 0, 5e-4)}),
    "evaluation.suite": ("", {
        "evaluation.sets": GONE, "evaluated": GONE,
        "saved with metrics": ((2, None), (4, None), (6, {})),
    }),
    "evaluation.every": (1, {
        "evaluated": (0, 2, 4, 6),
        "saved with metrics": saves(2, 4, 6, evaluated=(2, 4))["saved with metrics"],
    }),
    "checkpoint.every": (2, {"checkpoints.every": 2, **saves(4, 6)}),
    "checkpoint.minutes": (3.0, {"checkpoints.minutes": 3.0, "requests.minutes": 3.0}),
    "checkpoint.keep": (5, {"checkpoints.keep": 5}),
    "checkpoint.keep_every": (2, {"checkpoints.keep_every": 2}),
    "checkpoint.best": ("zero_shot/top1", {"checkpoints.best": "zero_shot/top1"}),
    "log.every": (1, {"logged": (1, 2, 3, 4, 5, 6)}),
    "log.progress": (False, {"progress.enabled": False}),
    "log.tensorboard": (False, {"tensorboard": GONE}),
    "log.wandb_project": ("mine", {"wandb.project": "mine", "wandb.run": "run"}),
    "mesh.fsdp": (2, {"gathered.mesh": {"data": 1, "fsdp": 2}}),
}  # fmt: skip
REPLACED = {
    "optimizer.parity_schedule": {
        "optimizer.text_start_episode": 1, "optimizer.text_end_episode": 2,
    },
}  # fmt: skip
OPTIONS = [path for path, _, _ in option_types()]


def recipe(overrides: dict) -> Config:
    values = DEFAULTS | BASE | overrides
    if values["parity"] == "reference":
        values |= REFERENCE_FLAGS
    return from_flat(values)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What the rooms are told in a run with some options of its own; each is made once."""
    made: dict[str, dict] = {}

    def run(overrides: dict) -> dict:
        key = repr(overrides)
        if key not in made:
            folder = tmp_path_factory.mktemp("rehearsal") / "run"
            folder.mkdir()
            made[key] = rehearse(recipe(overrides), folder)
        return made[key]

    return run


def spread(expected: dict, names) -> dict:
    """Entries that stand for several names, as those."""
    found = {}
    for name, value in expected.items():
        own = [other for other in names if other.startswith(name)] if name[-1] == "." else [name]
        found |= dict.fromkeys(own, value)
    return found


def test_every_option_has_a_case_with_another_value():
    assert list(CASES) == OPTIONS
    for path, (value, expected) in CASES.items():
        assert value != (DEFAULTS | BASE)[path]
        assert expected


@pytest.mark.parametrize("path", OPTIONS)
def test_an_option_changes_what_it_should(told, path):
    value, expected = CASES[path]
    before = told(REPLACED.get(path, {}))
    after = told(REPLACED.get(path, {}) | {path: value})
    names = before.keys() | after.keys()
    changed = {
        name: after.get(name, GONE)
        for name in names
        if after.get(name, GONE) != before.get(name, GONE)
    }
    assert changed == spread(expected, names)


def test_every_room_gets_what_is_meant_for_it(told):
    """The run that the others differ from: images are 1, captions 2, the teacher's rows 3, each
    with its row or position behind it."""
    found = told({})
    expected = {
        "phases": ("warmup", "prototype", "locked"),
        "kmeans.modalities.points": [1.0, 2.0],
        "kmeans.teacher.points": 3.049,
        "kmeans.modalities.k": 4,
        "kmeans.teacher.k": 4,
        "prototypes.of": {
            "image": 1.0, "text": 2.0, "image clusters": 1.0, "text clusters": 2.0,
            "external": 3000,
        },
        "loss.labels": ({}, {"external": 3015, "image": 1015, "text": 2015}),
        "loss.weights.proto": (0.0, 1.0),
        "loss.weights.external": (0.0, 0.5),
        "loss.back_translation": True,
        "loss.mask_unused": True,
        "loss.compute_all": False,
        "extract.train_image": None,
        "extract.project": True,
        "extract.image_type": "float32",
        "train.train_image": (True, False),
        "train.project": (False, True),
        "train.image_type": "float32",
        "normalised": "bfloat16",  # after the colours
        "colour.settings_of_pass_0": LIGHT.colour,
        "colour.settings_of_pass_1": LIGHT.colour,
        "adamw.trained": (("image", "text"), ALL, ("text",)),
        "rates.image": (5e-4, 5e-4, 3.75e-4, 1.25e-4, 0, 0),
        "rates.text": (5e-4, 5e-4, 4.52e-4, 3.27e-4, 1.73e-4, 4.8e-5),
        "evaluation.sets": ("train", "test", "val"),
        **saves(2, 4, 6),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_defaults_are_pinned():
    assert flatten(dataclasses.asdict(Config())) == DEFAULTS


def test_flags_of_the_reference_are_pinned():
    assert REFERENCE_FLAGS == {
        "data.keep": "none",
        "data.parity_preprocess": True,
        "episode.replacement": True,
        "objective.mask_unused": False,
        "objective.freeze": False,
        "optimizer.parity_schedule": True,
    }
    resolved = small_config(Path("pairs.tsv"), parity="reference")
    values = flatten(dataclasses.asdict(resolved))
    assert {name: values[name] for name in REFERENCE_FLAGS} == REFERENCE_FLAGS


def test_constants_of_the_augmentations_are_pinned():
    assert MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert STD == (0.26862954, 0.26130258, 0.27577711)
    ratio = (3 / 4, 4 / 3)
    colour = Colour(
        jitter=0.2,
        grey=0.2,
        blur=0.2,
        brightness=0.8,
        contrast=0.8,
        saturation=0.8,
        hue=0.2,
        blur_sigma=(0.1, 2.0),
        blur_radius=10,
    )
    assert list(AUGMENTATIONS) == ["none", "clip", "light"]
    assert AUGMENTATIONS["none"] is None
    assert AUGMENTATIONS["clip"] == Augmentation(
        scale=(0.9, 1.0), ratio=ratio, flip=False, colour=None
    )
    assert AUGMENTATIONS["light"] == Augmentation(
        scale=(0.5, 1.0), ratio=ratio, flip=True, colour=colour
    )
