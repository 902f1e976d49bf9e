"""What several benchmarks ask for on the command line."""

import argparse
from collections.abc import Sequence

from protoclip_jax.config import Config
from protoclip_jax.data.typed_values import above_zero

__all__ = ["above_zero", "add_recipe", "recipe"]


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
