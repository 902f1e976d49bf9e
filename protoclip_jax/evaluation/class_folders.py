"""The images below a folder with one sub-folder a class, links among them."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from protoclip_jax.data.left_out import LeftOut
from protoclip_jax.evaluation.features import some

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".avif"),
)

logger = logging.getLogger(__name__)


def subfolders(root: Path) -> list[str]:
    """Names of the folders in a root, links to folders among them; not the hidden ones.

    Raises:
        ValueError: it is not a folder.
    """
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: wanted one with a sub-folder for every class")
    return [path.name for path in root.iterdir() if path.is_dir() and path.name[0] != "."]


def listed(root: Path, classes: Sequence[str]) -> tuple[list[Path], list[int]]:
    """The images below a root, by class and then by path, and their labels.

    Tells of the files that are none, and of folders that are hardly those of classes.
    """
    here, passed_over = set(subfolders(root)), LeftOut()
    for path in sorted(root.iterdir()):
        image = path.is_file() and path.suffix.lower() in EXTENSIONS
        if path.name[0] != "." and (image or _leads_nowhere(path)):
            passed_over.add(path.name)
    paths, labels = [], []
    classes_of: dict[str, list[str]] = {}  # by the folder itself, whatever links lead there
    for label, name in enumerate(classes):
        if name in here:  # a name may be that of no folder, or stand twice
            here.remove(name)
            found = _images(root / name, passed_over, classes_of)
            paths += found
            labels += [label] * len(found)
    if passed_over.count:
        logger.warning(
            "%s: files that are in no class, or no pictures by their ending: %s", root, passed_over
        )
    _tell_shared(root, classes_of)
    _tell_level(root, [classes[label] for label in labels], paths)
    return paths, labels


def _images(folder: Path, passed_over: LeftOut, classes_of: dict[str, list[str]]) -> list[Path]:
    """The images below a class folder, by path; hidden files and folders hold none."""
    found = []
    for path, real in sorted(_files(folder)):
        if path.suffix.lower() in EXTENSIONS:  # a link that leads nowhere is an unreadable one
            found.append(path)
            shared = classes_of.setdefault(real, [])
            if folder.name not in shared:
                shared.append(folder.name)
        else:
            passed_over.add(f"{folder.name}/{path.relative_to(folder)}")
    return found


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files and dangling links below a folder, each with the folder itself that it lies in.

    A folder that several links lead to is looked through once, by its own path if that is below;
    and none that holds the class or the root, since that would be a loop.
    """
    around = [os.path.realpath(path) for path in (folder, folder.parent)]
    seen: set[str] = set()
    links = [folder]
    while links:
        start = links.pop(0)
        real = os.path.realpath(start)
        if real in seen or (start != folder and any(_holds(real, one) for one in around)):
            continue
        for parent, names, files in os.walk(start, onerror=_fail):
            inside = os.path.realpath(parent)
            if inside in seen:
                names.clear()
                continue
            seen.add(inside)
            names[:] = sorted(name for name in names if name[0] != ".")
            links += [Path(parent, name) for name in names if os.path.islink(Path(parent, name))]
            for path in (Path(parent, name) for name in sorted(files) if name[0] != "."):
                if path.is_file() or _leads_nowhere(path):
                    yield path, inside


def _fail(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that it may not read


def _holds(folder: str, inner: str) -> bool:
    return os.path.commonpath((folder, inner)) == folder


def _leads_nowhere(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _tell_shared(root: Path, classes_of: dict[str, list[str]]) -> None:
    shared = sorted({" = ".join(names) for names in classes_of.values() if len(names) > 1})
    if shared:
        logger.warning("%s: links give the same images to several classes: %s", root, some(shared))


def _tell_level(root: Path, class_of: Sequence[str], paths: Sequence[Path]) -> None:
    """Warns where the root seems to be one level too high, as that of train and val."""
    inner: dict[str, set[str]] = {}
    for name, path in zip(class_of, paths, strict=True):
        parts = path.relative_to(root / name).parts
        if len(parts) == 1:
            return
        inner.setdefault(name, set()).add(parts[0])
    common = set.intersection(*inner.values()) if len(inner) > 1 else set()
    # One folder that all have is usual (class/images/...).
    if len(common) > 1 and len(common) == min(map(len, inner.values())):
        logger.warning(
            "%s: its classes %s all have their images in folders %s: where those are the classes, "
            "name %s",
            root, some(sorted(inner)), some(sorted(common)), root / min(inner),
        )  # fmt: skip
