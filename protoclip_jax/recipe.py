"""Recipes: from a file in configs/ to a checked `Config`.

A recipe is a Python file whose `get_config()` starts from `defaults()` and changes what it needs.
`resolve` checks every type and every impossible combination, and says what is wrong in one line
before anything heavy starts.
"""

import dataclasses
import difflib
import runpy
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from ml_collections import config_dict

from protoclip_jax.config import Config, ConfigError, check, flatten

OVERRIDE = "--config."

REFERENCE_FLAGS = {
    "data.keep": "none",
    "data.parity_preprocess": True,
    "episode.replacement": True,
    "objective.mask_unused": False,
    "objective.freeze": False,
    "optimizer.parity_schedule": True,
}


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
    file, _, argument = path.partition(":")
    if not Path(file).is_file():
        raise ConfigError(f"--config={file}: there is no such file")
    try:
        get_config = runpy.run_path(file)["get_config"]
        return get_config(argument) if argument else get_config()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--config={file}: {type(error).__name__}: {reason}") from error


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
        raise ConfigError(_no_such_option(path, options))
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
            raise ConfigError(_no_such_option(path, options))
    values = {
        path: _checked(path, given.get(path), *options[path]) for path in options if path in given
    }
    if values.get("parity") == "reference":
        values.update(REFERENCE_FLAGS)
    config = _build(Config, values)
    check(config, num_devices)
    return config


def from_flat(values: dict[str, Any]) -> Config:
    """The `Config` that `flatten` of its dict came from, as workdirs store it."""
    return _build(Config, values)


def _section(recipe: ml_collections.ConfigDict, path: str) -> tuple[ml_collections.ConfigDict, str]:
    *parents, name = path.split(".")
    for parent in parents:
        recipe = recipe[parent]
    return recipe, name


def _no_such_option(path: str, options: dict) -> str:
    """The error for an unknown option, naming the right section or the nearest name."""
    leaves = {option.split(".")[-1]: option for option in options}
    name = path.split(".")[-1].replace("-", "_")
    near = [leaves[name]] if name in leaves else difflib.get_close_matches(path, options, n=1)
    near = near or [leaves[leaf] for leaf in difflib.get_close_matches(name, leaves, n=1)]
    message = f"there is no option config.{path}"
    return f"{message}: did you mean config.{near[0]}?" if near else message


def _parse(path: str, text: str, kind: type, optional: bool) -> Any:
    if optional and text.lower() in ("none", "null"):
        return None
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise ConfigError(_wrong_type(path, text, kind, optional)) from None


def _checked(path: str, value: Any, kind: type, optional: bool) -> Any:
    """The value as the option's type: a whole number is a float where a float is wanted."""
    if value is None and optional:
        return None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and (kind is not int or not isinstance(value, bool)):
        return value
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
