"""What a workdir says of its run: recipe, versions, commit; and whether a recipe still fits it."""

import dataclasses
import json
import platform
from pathlib import Path

import jax

from protoclip_jax import versions
from protoclip_jax.config import Config, ConfigError, flatten
from protoclip_jax.training.checkpoint import differences

RECIPE_FILE = "recipe.json"

# What may differ between a stop and a resume without changing any number of the run.
HARMLESS = (
    "log.",
    "checkpoint.",
    "evaluation.",
    "mesh.",
    "data.workers",
    "data.threads",
    "data.keep_gigabytes",
    "data.max_unreadable",
    "model.rematerialise",
    "model.weights",
    "optimizer.max_skipped",
)


def write(workdir: Path, config: Config) -> None:
    """Stores the resolved recipe with versions, commit and devices in `recipe.json`."""
    if jax.process_index():
        return
    devices = jax.devices()
    record = {
        **meta(config),
        "versions": versions.versions(),
        "python": platform.python_version(),
        "commit": versions.commit(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
    (workdir / RECIPE_FILE).write_text(json.dumps(record, indent=1) + "\n")


def read(workdir: Path) -> dict:
    """The record of a workdir.

    Raises:
      ConfigError: there is none.
    """
    path = workdir / RECIPE_FILE
    if not path.exists():
        raise ConfigError(f"{workdir} is no workdir of a run: it has no {RECIPE_FILE}")
    return json.loads(path.read_text())


def meta(config: Config) -> dict:
    """What a checkpoint says of its recipe."""
    return {"recipe": flatten(dataclasses.asdict(config))}


def check_resumable(workdir: Path, stored: dict, wanted: dict) -> None:
    """Refuses to go on with another recipe, source or teacher than the checkpoint's.

    Args:
      workdir: for the message.
      stored: the checkpoint's JSON values: `meta` and the fingerprints of the input.
      wanted: the same of this process.

    Raises:
      ConfigError: lists every difference that changes the run.
    """
    lines = [
        line
        for line in differences(stored["recipe"], wanted["recipe"])
        if not line.startswith(HARMLESS)
    ]
    lines += differences(
        {name: value for name, value in stored.items() if name != "recipe"},
        {name: value for name, value in wanted.items() if name != "recipe"},
    )
    if lines:
        raise ConfigError(
            f"{workdir} holds another run: give its own recipe, or a new --workdir, which may "
            f"start from these weights with --config.model.weights={workdir}. Differences:\n  "
            + "\n  ".join(lines)
        )
