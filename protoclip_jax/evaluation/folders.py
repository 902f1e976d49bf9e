"""Data sets on disk with one folder a class: `root/class/picture`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from protoclip_jax.evaluation import linear_probe, zero_shot
from protoclip_jax.evaluation.class_folders import listed, subfolders
from protoclip_jax.evaluation.classes import Names, in_order, match, read_names
from protoclip_jax.evaluation.features import Encoder, extract_readable, some
from protoclip_jax.evaluation.sgd_probe import sgd_probe

# Training rows x features x classes from which the probe is trained by SGD: an exact fit is a
# matter of seconds a hundred million.
EXACT_PROBE = 1e9

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageFolder:
    """Pictures and classes of one split.

    Attributes:
        classes: folder names; a picture's label is a position in this list. A class keeps its
            position when it has no picture here. A name that a list holds twice stands twice;
            the pictures are those of the first.
        names: how each class reads in a prompt, in the same order.
        paths: the pictures, by class and then by path.
        labels: the class of each picture.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: Int[np.ndarray, "n"]

    @property
    def empty(self) -> tuple[str, ...]:
        """Classes without a picture."""
        present = set(self.labels.tolist())
        return tuple(name for i, name in enumerate(self.classes) if i not in present)


def open_folder(
    root: str | Path,
    names: Names | None = None,
    *,
    also: Sequence[str | Path] = (),
    by_position: bool = False,
) -> ImageFolder:
    """Lists the pictures of a folder with one sub-folder a class.

    Classes are numbered over the sub-folders of `root` *and* of the folders in `also`, so that
    splits number alike when one of them lacks a class: folders named by numbers by value (2 before
    10), then the others as text. Sub-folders are searched to any depth; what is hidden is not
    looked at, and what is no picture by its ending, or lies beside the folders, is told. Links are
    followed; those that lead nowhere count as unreadable, or are told.

    Class names are matched with folders **by name**; capitals, `_`, `-`, spaces and how accented
    letters are composed do not matter:
    - none: the folder's name, with spaces for `_`, is the class name;
    - a mapping (or a `.json` object): folder to class name;
    - a list (or a `.json` list, or a text file with one name a line): every folder must be in
      it, and the list gives the numbers.
    A named class without a folder stays in the classifier and is reported as empty. Classes with
    equal names stay, too, and are told.

    Args:
        root: the folder.
        names: class names.
        also: other splits of the same data, for the numbering only.
        by_position: the i-th name of a list belongs to the i-th folder. For lists such as
            ImageNet's whose folders have codes for names; there must be as many names as folders,
            and the folders' order must be the same whoever sorts them.

    Raises:
        ValueError: without pictures, with one class only, or when names and folders do not fit.
    """
    root = Path(root)
    folders = in_order(name for place in (root, *map(Path, also)) for name in subfolders(place))
    classes, class_names = match(folders, read_names(names), by_position)
    paths, labels = listed(root, classes)
    if not paths:
        raise ValueError(f"{root} holds no pictures: wanted {root}/<class>/<picture>")
    if len(classes) == 1:
        raise ValueError(
            f"{root} has one class only, {classes[0]!r}, which is always right: wanted "
            f"{root}/<class>/<image>; where the classes lie in {root / classes[0]}, name that"
        )
    folder = ImageFolder(
        tuple(classes), tuple(class_names), tuple(paths), np.array(labels, np.int64)
    )
    if folder.empty:
        logger.warning(
            "%s: %d of %d classes have no picture: %s",
            root, len(folder.empty), len(classes), some(folder.empty),
        )  # fmt: skip
    return folder


def evaluate_folder(
    encoder: Encoder,
    test: ImageFolder,
    templates: Sequence[str] = ("{}",),
    *,
    train: ImageFolder | None = None,
    batch: int = 256,
    threads: int | None = None,
) -> dict[str, float]:
    """Zero-shot accuracy on `test`, and a linear probe if there is a `train` to fit it on.

    An unreadable picture is left out, counted in the result and named in a warning.

    Args:
        encoder: the model.
        test: the split that is measured.
        templates: prompts; `{}` takes the class name.
        train: the split a linear probe is trained on, with the same classes.
        batch: pictures encoded at a time.
        threads: decoding threads.

    Returns:
        `zero_shot/top1`, `zero_shot/top5` (from six classes up), `linear_probe/top1`, in percent;
        `data/pictures`, `data/unreadable` and `data/empty_classes` of the test split.
    """
    if train is not None and train.classes != test.classes:
        raise ValueError(
            f"the training split numbers {len(train.classes)} classes otherwise than the test "
            f"split its {len(test.classes)}: open each with the other in `also`"
        )
    features, labels = folder_features(encoder, test, batch=batch, threads=threads)
    classifier = zero_shot.build_classifier(encoder, test.names, templates)
    accuracy = zero_shot.top_k_accuracy(features, classifier, labels)
    metrics = {f"zero_shot/{name}": value for name, value in accuracy.items()}
    if train is not None:
        train_features, train_labels = folder_features(encoder, train, batch=batch, threads=threads)
        exact = train_features.size * len(train.classes) < EXACT_PROBE
        probe = linear_probe.linear_probe if exact else sgd_probe
        metrics["linear_probe/top1"] = probe(train_features, train_labels, features, labels).top1
    metrics["data/pictures"] = float(len(labels))
    metrics["data/unreadable"] = float(len(test.paths) - len(labels))
    metrics["data/empty_classes"] = float(len(test.empty))
    return metrics


def folder_chance(test: ImageFolder, train: ImageFolder | None = None) -> dict[str, float]:
    """Chance levels for `evaluate_folder`, under the same names."""
    levels = {f"zero_shot/{k}": v for k, v in zero_shot.chance(len(test.classes)).items()}
    if train is not None:
        levels["linear_probe/top1"] = linear_probe.chance(train.labels, test.labels)
    return levels


def folder_features(
    encoder: Encoder, folder: ImageFolder, *, batch: int = 256, threads: int | None = None
) -> tuple[Float[np.ndarray, "n e"], Int[np.ndarray, "n"]]:
    """Features and labels of the pictures that can be read; the others are named in a warning."""
    features, readable = extract_readable(
        encoder,
        lambda row: folder.paths[row].read_bytes(),
        len(folder.paths),
        name=lambda row: str(folder.paths[row]),
        batch=batch,
        threads=threads,
    )
    return features, folder.labels[readable]
