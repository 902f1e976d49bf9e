"""The prompts CLIP was published with: class names and templates of ten classification sets."""

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple


class PromptSet(NamedTuple):
    """Class names in the set's own order, and templates whose `{}` takes a name."""

    names: list[str]
    templates: list[str]


@cache
def _published() -> dict[str, dict[str, list[str]]]:
    text = files("protoclip_jax").joinpath("data/assets/zero_shot.json").read_text("utf-8")
    return json.loads(text)


def prompt_sets() -> list[str]:
    """Names that `prompt_set` knows, sorted."""
    return sorted(_published())


def prompt_set(name: str) -> PromptSet:
    """Class names and templates of a published set, for example "imagenet".

    Raises:
        ValueError: for an unknown name, with the known ones.
    """
    if name not in _published():
        raise ValueError(f"unknown prompt set {name!r}: wanted one of {', '.join(prompt_sets())}")
    entry = _published()[name]
    return PromptSet(list(entry["classnames"]), list(entry["templates"]))
