"""Recipes: from a file in configs/ to a checked `Config`.

A recipe is a Python file whose `get_config()` starts from `defaults()` and changes what it needs.
`resolve` checks every type and every impossible combination, and says what is wrong in one line
before anything heavy starts.
"""

import dataclasses
import math
import os
import runpy
import sysconfig
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from protoclip_jax import idle_options
from protoclip_jax.config import REFERENCE_FLAGS, Config, ConfigError, flatten
from protoclip_jax.config_checks import check
from protoclip_jax.data import typed_values
from protoclip_jax.storage.home import at_home
from protoclip_jax.suggestions import no_such_option

OVERRIDE = "--config."
PATHS = ("data.train", "data.image_root", "data.teacher", "model.weights")


def option_types(cls: type = Config, prefix: str = "") -> Iterator[tuple[str, type, bool]]:
    """Yields (dotted path, type, may be none) of every option."""
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            yield from option_types(field.type, f"{path}.")
        else:
            kinds = typing.get_args(field.type) or (field.type,)
            value_type = next(kind for kind in kinds if kind is not types.NoneType)
            yield path, value_type, types.NoneType in kinds


def defaults() -> ml_collections.ConfigDict:
    """A recipe of default settings; `resolve` finds what a recipe misspells in it."""
    recipe = ml_collections.ConfigDict(dataclasses.asdict(Config()))
    for path, value_type, optional in option_types():
        if optional:  # a plain None would refuse a value of any type
            section, name = _section(recipe, path)
            value = section[name]
            del section[name]
            section[name] = config_dict.placeholder(value_type)
            section[name] = value
    return recipe


def load_recipe(path: str) -> ml_collections.ConfigDict:
    """Runs `get_config()` of a recipe file; `file.py:text` calls `get_config(text)`.

    Raises:
      ConfigError: no such file, or the recipe itself fails.
    """
    file, argument = _file_and_argument(path)
    try:
        if not Path(file).is_file():
            raise ConfigError(f"--config={file}: there is no such file")
        get_config = runpy.run_path(file).get("get_config")
        recipe = _called(get_config, argument)
        _check_form(recipe)
        return recipe
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # a recipe is a program: it raises anything
        raise ConfigError(f"--config={_place(error, file)}: {_reason(error)}") from error


def _file_and_argument(path: str) -> tuple[str, str]:
    try:
        path = at_home(path)
    except ValueError as error:
        raise ConfigError(f"--config={error}") from None
    file, mark, argument = path.partition(".py:")
    return (f"{file}.py", argument) if mark else (path, "")


def _called(get_config: Any, argument: str) -> Any:
    if not callable(get_config):
        raise TypeError("a recipe has a function get_config(), which returns its settings")
    return get_config(argument) if argument else get_config()


def _check_form(recipe: Any) -> None:
    """Refuses what is not made of `defaults()`; computes what a recipe computes late.

    Raises:
      TypeError: says what was returned.
    """
    if not isinstance(recipe, ml_collections.ConfigDict) or isinstance(
        recipe, ml_collections.FrozenConfigDict
    ):
        kind = type(recipe).__name__
        raise TypeError(f"get_config() returned a {kind}, wanted the settings from defaults()")
    flatten(recipe.to_dict())
    for path, _, _ in option_types():
        name = path.rpartition(".")[0]
        if name and not isinstance(recipe.get(name), ml_collections.ConfigDict):
            raise TypeError(f"get_config() returned settings without the section {name!r}")


def _place(error: BaseException, file: str) -> str:
    """File and line of a fault in a recipe, or in what it runs of its own."""
    if isinstance(error, SyntaxError) and error.lineno and Path(error.filename or "").is_file():
        return f"{error.filename}:{error.lineno}"
    kinds = ("stdlib", "platstdlib", "purelib", "platlib")
    libraries = (str(Path(__file__).parent) + os.sep, "<", *map(sysconfig.get_path, kinds))
    theirs = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(libraries)
    ]
    return f"{theirs[-1].filename}:{theirs[-1].lineno}" if theirs else file


def _reason(error: BaseException) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def configured(file: str, overrides: Sequence[str], num_devices: int | None) -> Config:
    """The recipe of a file with `--config.SECTION.NAME=VALUE` from a command line.

    Raises:
      ConfigError: it cannot be run.
    """
    recipe = load_recipe(file)
    for override in overrides:
        path, equals, value = override.removeprefix(OVERRIDE).partition("=")
        if not equals:
            raise ConfigError(f"{override}: write {override}=VALUE")
        apply_override(recipe, path, value)
    return resolve(recipe, num_devices)


def apply_override(recipe: ml_collections.ConfigDict, path: str, text: str) -> None:
    """Sets `recipe.path` from the command line's `text` by the type of the option.

    Raises:
      ConfigError: no such option (the nearest is named) or not a value of its type.
    """
    options = {name: (kind, optional) for name, kind, optional in option_types()}
    if path not in options:
        raise ConfigError(no_such_option(path, options))
    kind, optional = options[path]
    value = _parse(path, text, kind, optional)
    section, name = _section(recipe, path)
    with section.ignore_type():  # a field that holds a value takes none only so
        section[name] = value


def resolve(recipe: ml_collections.ConfigDict, num_devices: int | None = 1) -> Config:
    """Checks a recipe and freezes it.

    Args:
      recipe: what `get_config()` returned, overrides applied.
      num_devices: devices of the run, over which a batch is divided; None: not known yet.

    Raises:
      ConfigError: an unknown option, a value of the wrong type, or an impossible combination.
    """
    options = {name: (kind, optional) for name, kind, optional in option_types()}
    given = flatten(recipe.to_dict())
    for path in given:
        if path not in options:
            raise ConfigError(no_such_option(path, options))
    values = {
        path: _checked(path, given.get(path), *options[path]) for path in options if path in given
    }
    for path in PATHS:
        if values.get(path):
            values[path] = _at_home(path, values[path])
    if "data.separator" in values:
        values["data.separator"] = typed_values.separator(values["data.separator"])
    if values.get("parity") == "reference":
        _refuse_against_parity(values)
        values.update(REFERENCE_FLAGS)
    config = _build(Config, values)
    check(config, num_devices)
    idle_options.refuse(config)
    return config


def _at_home(path: str, value: str) -> str:
    try:
        return at_home(value)
    except ValueError as error:
        raise ConfigError(f"config.{path}={error}") from None


def _refuse_against_parity(values: dict[str, Any]) -> None:
    """Refuses a flag that is set to something of its own, which parity would undo."""
    default = flatten(dataclasses.asdict(Config()))
    for path, wanted in REFERENCE_FLAGS.items():
        if values.get(path, default[path]) not in (default[path], wanted):
            raise ConfigError(
                f"parity=reference sets config.{path}={wanted}, and the recipe "
                f"{values[path]!r}: leave one of them out"
            )


def from_flat(values: dict[str, Any]) -> Config:
    """The `Config` that `flatten` of its dict came from, as workdirs store it.

    Options that they lack, as those of an earlier version do, have their defaults.

    Raises:
      ConfigError: an option is unknown, as to an earlier version than the one that stored it, or a
        value is of another type than its option.
    """
    options = {name: (kind, optional) for name, kind, optional in option_types()}
    for name in values:
        if name not in options:
            raise ConfigError(
                f"the stored recipe has config.{name}={values[name]!r}, which this version does "
                "not know: use the one that stored it (versions and commit are in recipe.json)"
            )
    checked = {name: _checked(name, value, *options[name]) for name, value in values.items()}
    return _build(Config, checked)


def _section(recipe: ml_collections.ConfigDict, path: str) -> tuple[ml_collections.ConfigDict, str]:
    *parents, name = path.split(".")
    for parent in parents:
        recipe = recipe[parent]
    return recipe, name


def _parse(path: str, text: str, kind: type, optional: bool) -> Any:
    if optional and text.lower() in ("none", "null"):
        return None
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        value = kind(text)
    except (KeyError, ValueError):
        raise ConfigError(_wrong_type(path, text, kind, optional)) from None
    return _finite(path, value)


def _finite(path: str, value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"config.{path}={value}: it must be a finite number")
    return value


def _checked(path: str, value: Any, kind: type, optional: bool) -> Any:
    """The value as the option's type: a whole number is a float where a float is wanted."""
    if value is None and optional:
        return None
    if kind is int and isinstance(value, int) and abs(value) >= 2**1023:
        # Python writes no number of thousands of digits into a message.
        raise ConfigError(f"config.{path}=... is too large: it has {value.bit_length()} bits")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return _finite(path, float(value) if abs(value) < 2**1023 else math.inf)
    if isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
        return _finite(path, value)
    raise ConfigError(_wrong_type(path, value, kind, optional))


def _wrong_type(path: str, value: Any, kind: type, optional: bool) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    wanted = names[kind] + (" or none" if optional else "")
    return f"config.{path}={value!r}: it must be {wanted}"


def _build(cls: type, values: dict[str, Any], prefix: str = "") -> Any:
    arguments = {}
    for field in dataclasses.fields(cls):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            arguments[field.name] = _build(field.type, values, f"{path}.")
        elif path in values:
            arguments[field.name] = values[path]
    return cls(**arguments)
