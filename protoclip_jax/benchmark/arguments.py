"""What several benchmarks ask for on the command line."""

import argparse

from protoclip_jax.config import Config
from protoclip_jax.data.typed_values import above_zero
from protoclip_jax.recipe import configured

__all__ = ["above_zero", "add_recipe", "recipe"]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """--config, and any number of --config.SECTION.NAME=VALUE."""
    parser.add_argument(
        "--config",
        default="configs/quickstart.py",
        help="a recipe; default: configs/quickstart.py. --config.SECTION.NAME=VALUE changes it",
    )


def recipe(options: argparse.Namespace, num_devices: int) -> Config:
    """The recipe of --config with the overrides of the command line.

    Raises:
      ConfigError: it cannot be run.
    """
    return configured(options.config, options.overrides, num_devices)
