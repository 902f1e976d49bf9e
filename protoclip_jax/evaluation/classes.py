"""Classes of a data set on disk: the order of their folders, and how each reads in a prompt."""

import itertools
import json
import logging
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

from protoclip_jax.data.captions import is_caption
from protoclip_jax.data.tokenizer import clean
from protoclip_jax.evaluation.features import some

Names = Mapping[str, str] | Sequence[str] | str | Path

_NUMBER = re.compile(r"-?\d+(\.\d+)?", re.ASCII)

logger = logging.getLogger(__name__)


def in_order(folders: Iterable[str]) -> list[str]:
    """Folders as their classes are numbered: numbers by value, then the others as text."""
    return sorted(set(folders), key=_place)


def _place(folder: str) -> tuple[int, Fraction, str]:
    number = _NUMBER.fullmatch(folder)
    return (0, Fraction(folder), folder) if number else (1, Fraction(0), folder)


def read_names(names: Names | None) -> Mapping[str, str] | list[str] | None:
    """Class names from a `.json` object or list, or from a text file with one name a line.

    Raises:
        ValueError: neither, a folder named twice, or not UTF-8; names the file.
    """
    if names is None or not isinstance(names, (str, Path)):
        return names if names is None or isinstance(names, Mapping) else list(names)
    try:
        text = Path(names).read_text("utf-8-sig")
        if Path(names).suffix.lower() != ".json":
            return [line.strip() for line in text.splitlines() if line.strip()]
        content = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{names}: {error}") from error
    values = content.values() if isinstance(content, dict) else content
    if not isinstance(content, (dict, list)) or not all(isinstance(v, str) for v in values):
        raise ValueError(
            f"{names}: wanted an object {{folder: class name}} or a list of class names"
        )
    return content


def _object(pairs: list[tuple]) -> dict:
    """A JSON object, of which the parser would keep the last of equal keys only."""
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{some(twice)} stand in it more than once")
    return dict(pairs)


def match(
    folders: Sequence[str], names: Mapping[str, str] | list[str] | None, by_position: bool
) -> tuple[list[str], list[str]]:
    """Folders by class number, and each class's name; `evaluation.folders.open_folder` says how.

    A name that a list holds twice is two classes, of which the first has the folder. Names that
    are equal to the text tower are told.

    Args:
        folders: in their order.
        names: see there.
        by_position: the i-th name belongs to the i-th folder.

    Raises:
        ValueError: names and folders do not fit, or not in one certain way.
    """
    if names is None:
        classes, shown = list(folders), [folder.replace("_", " ") for folder in folders]
    elif by_position:
        classes, shown = list(folders), _by_position(folders, names)
    else:
        classes, shown = _by_name(folders, names)
    blank = [folder for folder, name in zip(classes, shown, strict=True) if not is_caption(name)]
    if blank:
        raise ValueError(f"{len(blank)} classes have a name without anything in it: {some(blank)}")
    _tell_equal(shown)
    return classes, shown


def _tell_equal(shown: Sequence[str]) -> None:
    numbers = defaultdict(list)
    for number, name in enumerate(shown):
        numbers[clean(name)].append(number)  # the text tower sees no capitals, among others
    equal = [
        f"{' = '.join(dict.fromkeys(repr(shown[number]) for number in those))} "
        f"(classes {', '.join(map(str, those))})"
        for those in numbers.values()
        if len(those) > 1
    ]
    if equal:
        logger.warning(
            "%d names are those of several classes, which no prompt can tell apart: %s",
            len(equal), some(equal),
        )  # fmt: skip


def _by_position(folders: Sequence[str], names: Mapping[str, str] | list[str]) -> list[str]:
    if isinstance(names, Mapping) or len(names) != len(folders):
        raise ValueError(
            f"found {len(folders)} folders and {len(names)} names: by position wants a list "
            "with one name a folder"
        )
    doubt = _doubt(folders)
    if doubt:
        raise ValueError(
            f"which folder comes first, {doubt[0]!r} or {doubt[1]!r}? Names by position need "
            "folders in one certain order: map each folder to its class name in a JSON object"
        )
    return list(names)


def _doubt(folders: Sequence[str]) -> tuple[str, str] | None:
    """Two neighbours whose order depends on who sorts them, or None."""
    by_value = all(_NUMBER.fullmatch(folder) for folder in folders)
    for first, second in itertools.pairwise(folders):
        if by_value:
            certain = Fraction(first) < Fraction(second)
        else:
            certain = all(sort(first) < sort(second) for sort in _SORTS)
        if not certain:
            return first, second
    return None


def _plain(name: str) -> str:
    """Without capitals and accents."""
    letters = unicodedata.normalize("NFKD", name.casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def _natural(name: str) -> list[str | int]:
    parts = re.split(r"(\d+)", _plain(name), flags=re.ASCII)
    return [int(part) if number % 2 else part for number, part in enumerate(parts)]


# How people and programs sort folders: as text, by letters alone, by letters and numbers.
_SORTS: tuple[Callable, ...] = (
    str,
    lambda name: "".join(letter for letter in _plain(name) if letter.isalnum()),
    _natural,
)


def _by_name(
    folders: Sequence[str], names: Mapping[str, str] | list[str]
) -> tuple[list[str], list[str]]:
    name_of = _assigned(folders, list(dict.fromkeys(names)))
    folder_of = {name: folder for folder, name in name_of.items()}
    classes = [folder_of.get(name, name) for name in names]
    if isinstance(names, Mapping):
        shown = {folder_of.get(name, name): text for name, text in names.items()}
        classes = in_order(classes)
        return classes, [shown[folder] for folder in classes]
    return classes, list(names)


def _assigned(folders: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The name that stands for each folder: its own, or the one that differs in spelling only."""
    exact = set(folders) & set(names)
    similar = defaultdict(list)
    for name in names:
        if name not in exact:
            similar[_key(name)].append(name)
    name_of = {}
    for folder in folders:
        fits = [folder] if folder in exact else similar[_key(folder)]
        if len(fits) > 1:
            raise ValueError(f"the folder {folder!r} fits several names: {some(fits)}")
        name_of |= dict.fromkeys([folder], *fits) if fits else {}
    unnamed = [folder for folder in folders if folder not in name_of]
    if unnamed:
        raise ValueError(
            f"found {len(folders)} folders and {len(names)} names; names are matched by name, and "
            f"{len(unnamed)} folders have none: {some(unnamed)}. Name every folder, or map each "
            "to its class name in a JSON object, or ask for names by position"
        )
    taken: dict[str, str] = {}
    for folder, name in name_of.items():
        if name in taken:
            raise ValueError(
                f"the name {name!r} fits several folders: {taken[name]}, {folder}. Name each as "
                "it is spelt"
            )
        taken[name] = folder
    return name_of


def _key(name: str) -> str:
    # Composed, since file systems and editors write an accented letter as one character or as two.
    letters = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
    return " ".join(letters.replace("_", " ").replace("-", " ").split())
