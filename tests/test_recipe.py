"""Recipes and overrides: what is wrong is named in one line, before anything heavy starts."""

import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_collections
import pytest

from protoclip_jax import idle_options
from protoclip_jax.config import REFERENCE_FLAGS, Config, ConfigError, flatten
from protoclip_jax.recipe import (
    PATHS,
    apply_override,
    configured,
    defaults,
    from_flat,
    load_recipe,
    option_types,
    resolve,
)

CONFIGS = Path(__file__).parent.parent / "configs"
CASES = Path(__file__).parent / "cases"


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


def test_misspelt_options_of_the_case_stop_the_run():
    """CFG-01: each one alone, by its key, with the nearest real one."""
    case = json.loads((CASES / "CFG-01" / "overrides.json").read_text())
    near = {"epsiode_size": "episode.size", "batch-size": "optimizer.batch"}
    for overrides in case.values():
        ((key, value),) = overrides.items()
        message = f"there is no option config.{key}: did you mean config.{near.pop(key)}"
        with pytest.raises(ConfigError, match=message):
            configured(str(CONFIGS / "quickstart.py"), [f"--config.{key}={value}"], None)
    assert not near


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
    stored = flatten(dataclasses.asdict(config))
    assert from_flat(stored) == config
    for name in ("episode.new", "new.seed", "data", "Seed"):
        with pytest.raises(ConfigError, match=f"config.{name}=3, which this version does not know"):
            from_flat(stored | {name: 3})
    del stored["seed"]
    assert from_flat(stored).seed == defaults().seed


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
        ConfigError, match=r"broken\.py:4: TypeError: Could not override field 'size'"
    ):
        load_recipe(str(broken))


START = "from protoclip_jax.recipe import defaults\nconfig = defaults()\n"
GIVE = "def get_config():\n    return config\n"

# A recipe, the line of its fault (None: of the file as a whole), and what is said.
FAULTY = {
    "syntax": ("x = 1\nif x\n", 2, "SyntaxError"),
    "indent": ("def get_config():\nreturn 1\n", 2, "IndentationError"),
    "bytes": (b"x = 1\ny = '\xff'\n", 2, "SyntaxError"),
    "zero": (b"x = 1\0\n", None, "null bytes"),
    "import": ("import no_such_package\n", 1, "ModuleNotFoundError: No module named 'no_such_pack"),
    "name": (START + "config.seed = sead\n", 3, "NameError: name 'sead' is not defined"),
    "division": (START + GIVE + "\n1 / 0\n", 6, "ZeroDivisionError"),
    "inside": ("def get_config():\n    return [][1]\n", 2, "IndexError"),
    "empty": ("def get_config():\n    raise ValueError\n", 2, "ValueError"),
    "assertion": ("assert False\n", 1, "AssertionError"),
    "lines": ("raise RuntimeError('\\n\\none\\ntwo')\n", 1, "RuntimeError: one"),
    "exit": ("import sys\nsys.exit(0)\n", 2, "SystemExit: 0"),
    "recursion": ("def get_config():\n    return get_config()\n", 2, "RecursionError"),
    "file": ("open('/nowhere/at/all')\n", 1, "FileNotFoundError"),
    "nothing": ("x = 1\n", None, "TypeError: a recipe has a function get_config()"),
    "no function": ("get_config = 3\n", None, "TypeError: a recipe has a function get_config()"),
    "argument": ("def get_config(size):\n    return size\n", None, "missing 1 required positional"),
    "no return": ("def get_config():\n    pass\n", None, "get_config() returned a NoneType"),
    "dict": ("def get_config():\n    return {'seed': 1}\n", None, "get_config() returned a dict"),
    "frozen": (
        START + "import ml_collections\ndef get_config():\n"
        "    return ml_collections.FrozenConfigDict(config)\n",
        None,
        "returned a FrozenConfigDict",
    ),
    "section": (START + "del config.optimizer\n" + GIVE, None, "without the section 'optimizer'"),
    "late": (
        START + "config.seed = 1\nconfig.episode.size = 2 // config.get_ref('seed')\n"
        "config.seed = 0\n" + GIVE,
        None,
        "ZeroDivisionError",
    ),
    "json": ('{"seed": null}', 1, "NameError: name 'null' is not defined"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_any_fault_of_a_recipe_is_one_line_with_its_place(name, tmp_path):
    text, line, message = FAULTY[name]
    path = tmp_path / "wrong.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        configured(str(path), ["--config.optimizer.batch=64"], None)
    place = f"--config={path}:" + (f"{line}: " if line else " ")
    assert str(caught.value).startswith(place), str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_fault_in_what_a_recipe_runs_is_placed_there(tmp_path):
    (tmp_path / "base.py").write_text(START + "config.episode.size = 'big'\n" + GIVE)
    (tmp_path / "cut.py").write_text("\n\nx = (\n")
    for name, place in (("base", "base.py:3: TypeError"), ("cut", "cut.py:3: SyntaxError")):
        path = tmp_path / "outer.py"
        path.write_text(
            "from pathlib import Path\nfrom runpy import run_path\ndef get_config():\n"
            f"    return run_path(str(Path(__file__).with_name('{name}.py')))['get_config']()\n"
        )
        with pytest.raises(ConfigError, match=f"--config={tmp_path}/{place}"):
            load_recipe(str(path))


def test_faults_are_told_before_jax_is_imported(tmp_path):
    """Exit code 2 and one line, by the command itself; a process for all of them."""
    for number, (text, *_) in enumerate(FAULTY.values()):
        data = text if isinstance(text, bytes) else text.encode()
        (tmp_path / f"{number}.py").write_bytes(data)
    script = textwrap.dedent(
        f"""
        import sys
        from protoclip_jax import main
        for number in range({len(FAULTY)}):
            words = ["main", f"--config={tmp_path}/{{number}}.py", "--workdir=x"]
            print(main.run(main.parse(words)), "jax" in sys.modules)
        """
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=CONFIGS.parent
    )
    assert found.stdout.splitlines() == ["2 False"] * len(FAULTY), found.stderr
    lines = found.stderr.splitlines()
    assert len(lines) == len(FAULTY)
    assert all(line.startswith(f"protoclip_jax: --config={tmp_path}/") for line in lines)


def test_home_folder_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(START + "config.data.train = '~/pairs.tsv'\n" + GIVE)
    (tmp_path / "sized.py").write_text(
        START + "def get_config(size):\n    config.data.train = size\n    return config\n"
    )
    assert configured("~/mine.py", [], None).data.train == f"{tmp_path}/pairs.tsv"
    assert configured("~/sized.py:a:b", [], None).data.train == "a:b"
    for path in PATHS:
        config = resolve(recipe(**{path.replace(".", "__"): "~/some/where"}))
        assert flatten(dataclasses.asdict(config))[path] == f"{tmp_path}/some/where"
        with pytest.raises(ConfigError, match=rf"config.{path}=~nobody-here/x: there is no home"):
            resolve(recipe(**{path.replace(".", "__"): "~nobody-here/x"}))
    for untouched in ("gs://bucket/~/x.tsv", "a/~/b.tsv", "tfds:coco"):
        assert resolve(recipe(data__train=untouched)).data.train == untouched


def test_every_option_that_is_a_path_is_known():
    """Options of a text are these, or paths: a new one has to be put in one of the two."""
    texts = {path for path, kind, _ in option_types() if kind is str}
    assert texts - set(PATHS) == {
        "parity", "model.name", "model.dtype", "data.image_column", "data.caption_column",
        "data.separator", "data.split", "data.image_feature", "data.text_feature",
        "data.augmentation", "data.keep", "episode.seeding", "episode.empty", "evaluation.suite",
        "checkpoint.best", "log.wandb_project",
    }  # fmt: skip


def test_a_tab_as_a_shell_gives_it():
    assert resolve(recipe(data__separator="\\t")).data.separator == "\t"
    assert resolve(recipe(data__separator=",")).data.separator == ","


@pytest.mark.parametrize("path", [p for p, kind, _ in option_types() if kind is float])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_at_once(path, text):
    with pytest.raises(ConfigError, match=rf"config.{path}=-?(nan|inf): it must be a finite"):
        apply_override(defaults(), path, text)
    config = recipe()
    section, name = path.split(".")
    with config[section].ignore_type():
        config[section][name] = float(text)
    with pytest.raises(ConfigError, match=rf"config.{path}=-?(nan|inf): it must be a finite"):
        resolve(config)


def test_whole_number_beyond_all_floats_is_refused():
    values = recipe().to_dict()
    values["optimizer"]["weight_decay"] = 10**400
    config = ml_collections.ConfigDict(values)
    with pytest.raises(ConfigError, match="weight_decay=inf: it must be a finite"):
        resolve(config)


NUMBERS = {path: kind for path, kind, _ in option_types() if kind in (int, float)}


@pytest.mark.parametrize("path", NUMBERS)
def test_numbers_that_nothing_can_hold_are_refused(path):
    texts = ["1" + 20 * "0", "9" * 400] if NUMBERS[path] is int else ["1e300", "1e39"]
    for text in texts:
        with pytest.raises(ConfigError, match=rf"^config\.{path}=.* is too large") as caught:
            resolve(recipe(**{path.replace(".", "__"): text}), num_devices=None)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("text", ["-1" + 20 * "0", str(2**31 - 1), str(2**40), "10000", "1"])
def test_extreme_numbers_are_taken_or_refused_in_a_line(path, text):
    message = None
    try:
        idle_options.told(resolve(recipe(**{path.replace(".", "__"): text}), num_devices=None))
    except ConfigError as error:
        message = str(error)
    assert message is None or message.count("\n") == 0


@pytest.mark.parametrize("path", [path for path, kind in NUMBERS.items() if kind is float])
@pytest.mark.parametrize("text", ["1e-300", "1e-40"])
def test_numbers_that_are_0_in_float32_are_refused(path, text):
    if path == "data.keep_gigabytes":  # of the host: no float32
        return
    with pytest.raises(ConfigError, match=rf"^config\.{path}=.* is too small for float32"):
        resolve(recipe(**{path.replace(".", "__"): text}))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"data__keep_gigabytes": "1e10"}, "at most 1000000000"),
        ({"data__workers": "10001"}, "at most 10000"),
        ({"model__projection_hidden": "40001"}, "at most 40000"),
        ({"model__projection_width": str(2**31 - 1)}, "at most 40000"),
        ({"episode__count": "1000001"}, "at most 1000000"),
        ({"episode__count": "1000000", "episode__size": "2000000000"}, "too many to be counted"),
    ],
)
def test_bounds_are_named(overrides, words):
    with pytest.raises(ConfigError, match=words):
        resolve(recipe(**overrides))


def test_whole_numbers_of_thousands_of_digits_are_refused_in_a_recipe():
    config = recipe()
    config.seed = 10**5000
    with pytest.raises(ConfigError, match=r"^config\.seed=.* is too large: it has 16610 bits$"):
        resolve(config)


def test_what_is_just_within_the_bounds_is_taken():
    largest = {"seed": str(2**62 - 1), "data__limit": str(2**40), "data__keep_gigabytes": "1e9"}
    config = resolve(recipe(**largest))
    assert (config.seed, config.data.limit) == (2**62 - 1, 2**40)


@pytest.mark.parametrize("path", [p for p, kind, _ in option_types() if kind is str])
def test_an_empty_text_is_refused_where_it_means_nothing(path):
    config = recipe(**{path.replace(".", "__"): ""})
    if path in ("parity", "evaluation.suite", "data.image_column", "data.caption_column"):
        assert resolve(config)
        return
    with pytest.raises(ConfigError, match=rf"config\.{path} is empty") as caught:
        resolve(config)
    optional = {name for name, _, optional in option_types() if optional}
    assert str(caught.value).endswith(f"none as config.{path}=none") == (path in optional)


@pytest.mark.parametrize("path", REFERENCE_FLAGS)
def test_parity_and_a_flag_against_it_are_refused(path):
    against = {"data.keep": "jpeg"}
    default = flatten(dataclasses.asdict(Config()))
    changed = recipe(parity="reference")
    apply_override(changed, path, str(default[path]))
    assert resolve(changed).parity == "reference"
    if path in against:
        apply_override(changed, path, against[path])
        with pytest.raises(ConfigError, match=f"parity=reference sets config.{path}"):
            resolve(changed)


def test_recipe_with_an_argument(tmp_path):
    path = tmp_path / "sized.py"
    path.write_text(
        "from protoclip_jax.recipe import defaults\n"
        "def get_config(size):\n    config = defaults()\n    config.episode.size = int(size)\n"
        "    return config\n"
    )
    assert load_recipe(f"{path}:77").episode.size == 77
