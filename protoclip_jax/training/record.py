"""What a workdir says of its run: recipe, versions, commit; and whether a recipe still fits it."""

import dataclasses
import json
import platform

import jax

from protoclip_jax import versions
from protoclip_jax.config import Config, ConfigError, flatten
from protoclip_jax.data.image_cache import AUTO
from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import write_json
from protoclip_jax.storage.paths import AnyPath
from protoclip_jax.training.checkpoint import differences
from protoclip_jax.training.metric_file import read_metrics

RECIPE_FILE = "recipe.json"
IMAGE_CACHE = "image_cache"  # its form, in the JSON values of a checkpoint

# What may differ between a stop and a resume without changing any number of the run. Where the
# data lies is here too: the fingerprints of source and teacher say whether they are the same.
HARMLESS = (
    "data.train",
    "data.teacher",
    "data.image_root",
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


def write(workdir: AnyPath, config: Config) -> None:
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
    write_json(workdir / RECIPE_FILE, record)


def read(workdir: AnyPath) -> dict:
    """The record of a workdir, with a recipe in it.

    Raises:
      ConfigError: there is none, or it is damaged.
    """
    path = workdir / RECIPE_FILE
    try:
        found = json.loads(objects.read_text(path))
        if not isinstance(found, dict) or not isinstance(found.get("recipe"), dict):
            raise ValueError("no recipe in it")
        return found
    except FileNotFoundError:
        raise ConfigError(f"{workdir} is no workdir of a run: it has no {RECIPE_FILE}") from None
    except PermissionError as error:
        raise ConfigError(f"{path} cannot be read: give this user the right to") from error
    except (ValueError, RecursionError, IsADirectoryError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}): remove it, and the run's own command writes it again"
        ) from error


def check(workdir: AnyPath) -> None:
    """Refuses a workdir whose record or numbers are damaged; a fresh one has neither.

    Raises:
      ConfigError: names the file.
    """
    if objects.is_file(workdir / RECIPE_FILE):
        read(workdir)
    try:
        read_metrics(workdir)
    except (ValueError, IsADirectoryError, PermissionError) as error:
        raise ConfigError(str(error)) from error


def meta(config: Config) -> dict:
    """What a checkpoint says of its recipe."""
    return {"recipe": flatten(dataclasses.asdict(config))}


def identity(config: Config) -> dict:
    """What the processes of a run must have in common: every option, versions, code."""
    options = meta(config)["recipe"]
    # A host's own affair; where the data lie may differ too, and their fingerprints are compared.
    own = ("data.workers", "data.threads", "data.train", "data.teacher", "data.image_root")
    options = {f"config.{name}": value for name, value in options.items() if name not in own}
    return options | versions.versions() | {"code": versions.code_hash()}


def cache_form(stored: dict) -> str:
    """The form of the image cache that a checkpoint's run began with."""
    return stored.get(IMAGE_CACHE) or stored["recipe"]["data.keep"]


def changes(stored: dict, wanted: dict) -> list[str]:
    """Options of a flat recipe that make another run of it, a line each with both values."""
    # Left to us, the form of the image cache is the one that the run began with.
    harmless = HARMLESS + (("data.keep:",) if wanted["data.keep"] == AUTO else ())
    return [line for line in differences(stored, wanted) if not line.startswith(harmless)]


def check_resumable(workdir: AnyPath, stored: dict, wanted: dict) -> None:
    """Refuses to go on with another recipe, source or teacher than the checkpoint's.

    Source and teacher are the same wherever they lie if their fingerprints are equal: those of the
    lines of a list, of the names, sizes and captions in tars, of the records of a converted set,
    of the ends of a TFDS set's files, each with their order and with what is used of them; and of
    the numbers of a teacher. The images that a list names are not looked at.

    Args:
      workdir: for the message.
      stored: the checkpoint's JSON values: `meta` and the fingerprints of the input.
      wanted: the same of this process.

    Raises:
      ConfigError: lists every difference that changes the run.
    """
    lines = changes(stored["recipe"], wanted["recipe"])
    own = ("recipe", IMAGE_CACHE)
    lines += differences(
        {name: value for name, value in stored.items() if name not in own},
        {name: value for name, value in wanted.items() if name not in own},
    )
    if lines:
        raise ConfigError(
            f"{workdir} holds another run: give its own recipe, or a new --workdir, which may "
            f"start from these weights with --config.model.weights={workdir}. Differences:\n  "
            + "\n  ".join(lines)
        )
