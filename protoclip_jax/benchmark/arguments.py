"""What several benchmarks ask for on the command line."""

import argparse
from collections.abc import Sequence

from protoclip_jax.config import Config


def above_zero(text: str) -> int:
    """A whole number above 0."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 is needed")
    return value


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """--config, and any number of --config.SECTION.NAME=VALUE."""
    parser.add_argument(
        "--config",
        default="configs/quickstart.py",
        help="a recipe; default: configs/quickstart.py. --config.SECTION.NAME=VALUE changes it",
    )


def overrides(texts: Sequence[str]) -> list[str]:
    """Those of the form --config.SECTION.NAME=VALUE."""
    # Late, as in `recipe`: what takes no recipe does without the package it is written with.
    from protoclip_jax.recipe import OVERRIDE

    return [text for text in texts if text.startswith(OVERRIDE)]


def recipe(options: argparse.Namespace, num_devices: int) -> Config:
    """The recipe of --config with the overrides of the command line.

    Raises:
      ConfigError: it cannot be run.
    """
    from protoclip_jax.recipe import configured

    return configured(options.config, options.overrides, num_devices)
