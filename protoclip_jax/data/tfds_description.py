"""What a folder of a TFDS set says of itself, looked through before TFDS believes it.

The folder is foreign: TFDS would import the module of any class that its features.json names, and
look for shards wherever its dataset_info.json says. Here only TFDS's own features are taken, and
only files that lie in the folder itself.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from protoclip_jax.storage import objects
from protoclip_jax.storage.paths import is_remote

INFO, FEATURES = "dataset_info.json", "features.json"
_MOST = 2**26  # bytes of one of these
_NAMES_A_CLASS = ("pythonClassName", "python_class_name", "type")
_OWN = "tensorflow_datasets.core.features."


def builder_at(folder: str):
    """TFDS's builder for a folder of prepared files.

    Raises:
      FileNotFoundError: a part of the description is missing.
      ValueError: it is damaged, or names classes that are not TFDS's own; says which file.
    """
    import tensorflow_datasets as tfds

    _parsed(os.path.join(folder, INFO))
    features = os.path.join(folder, FEATURES)
    _check_classes(features, _parsed(features))
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:  # protobuf, TFDS and the features each have errors of their own
        raise ValueError(
            f"{folder}: its {INFO} or {FEATURES} is damaged ({first_line(error)}): copy it again"
        ) from error


def check_inside(folder: str, paths: Iterable[str]) -> None:
    """Refuses shards that do not lie in the folder of their set.

    Raises:
      ValueError: one does not.
    """
    for path in paths:
        if os.path.dirname(path) != folder.rstrip("/"):
            raise ValueError(f"{folder}/{INFO} names {path}, which is not in that folder")


def first_line(error: Exception) -> str:
    """What an error says, short."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _parsed(path: str) -> dict:
    try:
        content = _read(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: copy it again") from None
    if len(content) > _MOST:
        raise ValueError(f"{path} has more than {_MOST} bytes, and cannot be a description")
    found = _loaded(path, content)
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): copy it again")
    return found


def _loaded(path: str, content: bytes | str):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({first_line(error)}): copy it again") from error


def _read(path: str) -> bytes:
    if is_remote(path):
        return objects.read(path, 0, _MOST + 1)
    with Path(path).open("rb") as file:
        return file.read(_MOST + 1)


def _check_classes(path: str, content: dict) -> None:
    left = [content]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            for key in _NAMES_A_CLASS:
                name = part.get(key)
                if isinstance(name, str) and "." in name and not name.startswith(_OWN):
                    raise ValueError(
                        f"{path} names the class {name[:200]!r}, which is none of TFDS's own: "
                        "build the set with features of tensorflow_datasets"
                    )
            if isinstance(part.get("json"), str):  # an older form: features in a string of JSON
                left.append(_loaded(path, part["json"]))
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
