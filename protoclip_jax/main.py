"""Trains ProtoCLIP: starts a run in a workdir, or resumes the one that is there.

  python -m protoclip_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Any option of a recipe is changed by --config.SECTION.NAME=VALUE, for example
  --config.optimizer.batch=256 --config.data.teacher=none
(protoclip_jax/config.py lists them all). --dry_run shows what would run, without training.
The same command goes on where a run stopped, or says that it is finished.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

# XLA's and orbax's chatter would break the progress bar; errors still show.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging

from protoclip_jax.config import Config, ConfigError
from protoclip_jax.recipe import apply_override, load_recipe, resolve

_OVERRIDE = "--config."

_CONFIG = flags.DEFINE_string("config", None, "A recipe, for example configs/quickstart.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: all that it writes.")
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Show shapes, memory, schedule, phases; no training."
)


def run(argv: Sequence[str]) -> int:
    """Trains; returns the exit code.

    0: done. 1: a loss or gradient is not finite. 2: this cannot be run. 130: interrupted.
    """
    *_, overrides = argv
    logging.set_verbosity(logging.WARNING)  # orbax and tfds tell every step of theirs
    try:
        if _CONFIG.value is None:
            raise ConfigError("--config=RECIPE is missing: --config=configs/quickstart.py")
        _config(overrides, num_devices=1)
        if _WORKDIR.value is None and not _DRY_RUN.value:
            raise ConfigError("--workdir=FOLDER is missing, for example --workdir=runs/quickstart")
        # Imported late, so that a wrong option is refused without waiting for JAX.
        import jax

        from protoclip_jax.training import dry_run, loop

        config = _config(overrides, jax.device_count())
        if _DRY_RUN.value:
            print(dry_run.describe(config))
        else:
            loop.train(config, Path(_WORKDIR.value))
    except ConfigError as error:
        print(f"protoclip_jax: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"protoclip_jax: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        return 130
    return 0


def _config(overrides: Sequence[str], num_devices: int) -> Config:
    """The recipe of --config with the overrides of the command line."""
    recipe = load_recipe(_CONFIG.value)
    for override in overrides:
        path, equals, value = override.removeprefix(_OVERRIDE).partition("=")
        if not equals:
            raise ConfigError(f"{override}: write {override}=VALUE")
        apply_override(recipe, path, value)
    return resolve(recipe, num_devices)


def parse(argv: Sequence[str]) -> list:
    """Parses flags; what starts with --config. is left for `run`, as one list at the end."""
    overrides = [text for text in argv if text.startswith(_OVERRIDE)]
    rest = [text for text in argv if not text.startswith(_OVERRIDE)]
    positional = app.parse_flags_with_usage(rest)
    return [*positional, overrides]


def main() -> None:
    """The console entry."""
    app.run(run, flags_parser=parse)


if __name__ == "__main__":
    main()
