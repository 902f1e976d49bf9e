"""What a workdir says of its run: recipe, versions, commit; and whether a recipe still fits it."""

import dataclasses
import hashlib
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax

from protoclip_jax.config import Config, ConfigError, flatten
from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import write_json
from protoclip_jax.storage.paths import AnyPath
from protoclip_jax.training.checkpoint import differences

RECIPE_FILE = "recipe.json"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pillow",
    "cykooz-resizer",
)

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
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "commit": _commit(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
    write_json(workdir / RECIPE_FILE, record)


def read(workdir: AnyPath) -> dict:
    """The record of a workdir.

    Raises:
      ConfigError: there is none.
    """
    try:
        return json.loads(objects.read_text(workdir / RECIPE_FILE))
    except FileNotFoundError:
        raise ConfigError(f"{workdir} is no workdir of a run: it has no {RECIPE_FILE}") from None


def meta(config: Config) -> dict:
    """What a checkpoint says of its recipe."""
    return {"recipe": flatten(dataclasses.asdict(config))}


def identity(config: Config) -> dict:
    """What the processes of a run must have in common: every option, versions, code."""
    options = meta(config)["recipe"]
    # A host's own affair; where the data lie may differ too, and their fingerprints are compared.
    own = ("data.workers", "data.threads", "data.train", "data.teacher", "data.image_root")
    options = {f"config.{name}": value for name, value in options.items() if name not in own}
    return options | {name: _version(name) for name in PACKAGES} | {"code": code_hash()}


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


def code_hash() -> str:
    """A hash of the package's Python files, which tells two checkouts apart."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # one without a wheel for this machine
        return None


def _commit() -> str | None:
    """Commit of the code when it runs from a git checkout, with + for uncommitted changes."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return head + ("+" if _git(folder, "status", "--porcelain", "--", str(folder)) else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return result.stdout.strip()
