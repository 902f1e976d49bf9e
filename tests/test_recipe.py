"""Recipes and overrides: what is wrong is named in one line, before anything heavy starts."""

import dataclasses
from pathlib import Path

import pytest

from protoclip_jax.config import Config, ConfigError, flatten
from protoclip_jax.recipe import (
    REFERENCE_FLAGS,
    apply_override,
    defaults,
    from_flat,
    load_recipe,
    option_types,
    resolve,
)

CONFIGS = Path(__file__).parent.parent / "configs"


def recipe(**overrides):
    config = defaults()
    config.data.train = "emoji_text/train"
    for path, text in overrides.items():
        apply_override(config, path.replace("__", "."), text)
    return config


def test_defaults_are_the_dataclasses_own():
    assert resolve(recipe(data__train="pairs.tsv")) == Config(
        data=dataclasses.replace(Config().data, train="pairs.tsv")
    )


def test_whole_number_becomes_float_and_none_comes_and_goes():
    # Case CFG-03: int for a float, none, 5e-4, and 'false' is not a true text.
    config = recipe(
        optimizer__clip_norm="1",
        optimizer__learning_rate="5e-4",
        objective__back_translation="false",
        objective__temperature="none",
    )
    config = resolve(config)
    assert config.optimizer.clip_norm == 1.0
    assert isinstance(config.optimizer.clip_norm, float)
    assert config.optimizer.learning_rate == 5e-4
    assert config.objective.back_translation is False
    assert config.objective.temperature is None


@pytest.mark.parametrize("path", [p for p, _, optional in option_types() if optional])
def test_every_optional_option_takes_a_value_and_none_again(path):
    kind = next(kind for p, kind, _ in option_types() if p == path)
    config = recipe()
    apply_override(config, path, "7")
    apply_override(config, path, "none")
    section, name = path.split(".")
    assert config[section][name] is None
    apply_override(config, path, "7")
    assert config[section][name] == kind("7")


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("epsiode_size", "episode.size"),  # case CFG-01
        ("batch-size", "optimizer.batch"),  # case CFG-01
        ("epsiode.size", "episode.size"),
        ("episode.batch", "optimizer.batch"),  # right name, wrong section
        ("optimizer.learning_rat", "optimizer.learning_rate"),
        ("model.teacher", "data.teacher"),
    ],
)
def test_unknown_option_names_the_nearest(path, near):
    with pytest.raises(ConfigError, match=f"{path}.*did you mean config.{near}") as caught:
        apply_override(defaults(), path, "3")
    assert "\n" not in str(caught.value)


def test_unknown_option_inside_a_recipe_names_the_nearest():
    config = recipe()
    config.episode.sise = 3
    with pytest.raises(ConfigError, match=r"episode.sise: did you mean config.episode.size"):
        resolve(config)


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        ("optimizer.batch", "3.5", "a whole number"),
        ("optimizer.clip_norm", "ten", "a number or none"),
        ("objective.back_translation", "maybe", "true or false"),
        ("seed", "none", "a whole number"),
    ],
)
def test_wrong_type_is_refused(path, text, wanted):
    with pytest.raises(ConfigError, match=f"config.{path}=.*{wanted}"):
        apply_override(defaults(), path, text)


@pytest.mark.parametrize(
    ("overrides", "numbers"),
    [
        ({"episode__prototypes": "300000"}, ("300000", "200000")),
        ({"optimizer__batch": "300000"}, ("300000", "200000")),
        ({"optimizer__warmup_steps": "100000"}, ("100000", "39000")),
        ({"optimizer__batch": "509"}, ("509", "8")),
        ({"episode__warmup": "101"}, ("101", "100")),
        ({"mesh__fsdp": "3"}, ("3", "8")),
        ({"model__batch_norm_group": "48"}, ("48", "512")),
        ({"episode__locked": "98", "optimizer__warmup_steps": "780"}, ("780", "780")),
        ({"optimizer__text_end_episode": "101"}, ("101", "100")),
        ({"objective__external": "1", "objective__back_translation": "false"}, ("back_transl",)),
        ({"objective__external": "1"}, ("data.teacher",)),
        ({"objective__external": "1", "model__projection": "none"}, ("model.projection",)),
        ({"optimizer__beta2": "1"}, ("beta2", "1")),
        ({"objective__temperature": "0"}, ("temperature", "0")),
        ({"episode__seeding": "kmeans++"}, ("kmeans", "d2")),
        ({"data__train": ""}, ("data.train",)),
        ({"parity": "refrence"}, ("refrence", "reference")),
    ],
)
def test_impossible_settings_are_refused_with_both_numbers(overrides, numbers):
    with pytest.raises(ConfigError) as caught:
        resolve(recipe(**overrides), num_devices=8)
    assert all(number in str(caught.value) for number in numbers), str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_are_checked_before_the_devices_are_known():
    assert resolve(recipe(mesh__fsdp="4"), num_devices=None).mesh.fsdp == 4
    with pytest.raises(ConfigError, match="509 does not divide over 4"):
        resolve(recipe(mesh__fsdp="4", optimizer__batch="509"), num_devices=None)


def test_parity_sets_every_flag_of_the_reference():
    plain, parity = resolve(recipe()), resolve(recipe(parity="reference"))
    values, before = (flatten(dataclasses.asdict(config)) for config in (parity, plain))
    for path, value in REFERENCE_FLAGS.items():
        assert values[path] == value != before[path], path


def test_single_flags_can_be_set_alone():
    assert resolve(recipe(objective__mask_unused="false")).objective.mask_unused is False


def test_stored_recipe_comes_back_equal():
    config = resolve(recipe(optimizer__clip_norm="3"))
    assert from_flat(flatten(dataclasses.asdict(config))) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_every_recipe_resolves_on_eight_devices(path):
    config = resolve(load_recipe(str(path)), num_devices=8)
    assert config.optimizer.batch % 8 == 0
    assert config.total_steps > config.optimizer.warmup_steps


def test_published_setting_is_that_of_the_paper():
    config = resolve(load_recipe(str(CONFIGS / "cc3m.py")), num_devices=8)
    assert config.episode.count * config.episode.size == 32 * 2_500_000
    assert config.prototype_episodes == range(1, 398)
    assert config.steps_per_episode == 390


def test_recipe_file_that_is_missing_or_broken(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_recipe(str(tmp_path / "none.py"))
    broken = tmp_path / "broken.py"
    broken.write_text(
        "from protoclip_jax.recipe import defaults\n"
        "def get_config():\n    config = defaults()\n    config.episode.size = 'big'\n"
    )
    with pytest.raises(
        ConfigError, match=r"broken\.py: TypeError: Could not override field 'size'"
    ):
        load_recipe(str(broken))


def test_recipe_with_an_argument(tmp_path):
    path = tmp_path / "sized.py"
    path.write_text(
        "from protoclip_jax.recipe import defaults\n"
        "def get_config(size):\n    config = defaults()\n    config.episode.size = int(size)\n"
        "    return config\n"
    )
    assert load_recipe(f"{path}:77").episode.size == 77
