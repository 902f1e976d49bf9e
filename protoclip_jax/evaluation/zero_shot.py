"""Zero-shot classification: pictures against prompts made from class names."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from protoclip_jax.evaluation.features import (
    Encoder,
    extract_texts,
    finite_features,
    normalise,
    score_blocks,
)


def classifier_from_embeddings(
    embeddings_cte: Float[Array | np.ndarray, "c t e"],
) -> Float[np.ndarray, "c e"]:
    """One unit vector a class: the mean of its normalised prompt embeddings, normalised again.

    Reference: zero_shot_classifier.
    """
    return normalise(normalise(embeddings_cte).mean(axis=1))


def build_classifier(
    encoder: Encoder,
    class_names: Sequence[str],
    templates: Sequence[str | Callable[[str], str]] = ("{}",),
) -> Float[np.ndarray, "c e"]:
    """The classifier of some class names.

    Args:
        encoder: the model; only its text side is used.
        class_names: c names, as they should read inside a prompt.
        templates: t prompts; `{}` takes the name.

    Returns:
        Unit rows, in the order of the names.

    Raises:
        ValueError: without names or templates, or with a template that has no `{}`.
    """
    if not len(class_names) or not len(templates):
        raise ValueError(
            f"found {len(class_names)} class names and {len(templates)} templates, "
            "wanted at least one of each"
        )
    prompts = [prompt(template, name) for name in class_names for template in templates]
    embeddings = finite_features(extract_texts(encoder, prompts), "prompt")
    return classifier_from_embeddings(embeddings.reshape(len(class_names), len(templates), -1))


def prompt(template: str | Callable[[str], str], name: str) -> str:
    """A template with the class name put in; other braces in either are left alone."""
    if callable(template):
        return template(name)
    if "{}" not in template:
        raise ValueError(f"template {template!r} has no {{}}: write {{}} where the name belongs")
    return template.replace("{}", name)


def logits(
    image_features: Float[Array | np.ndarray, "n e"],
    classifier: Float[Array | np.ndarray, "c e"],
) -> Float[np.ndarray, "n c"]:
    """100 x cosine similarity (reference: the learned temperature is not used)."""
    return 100.0 * (normalise(image_features) @ np.asarray(classifier).T)


def top_k_accuracy(
    image_features: Float[Array | np.ndarray, "n e"],
    classifier: Float[Array | np.ndarray, "c e"],
    labels: Int[Array | np.ndarray, "labels"],
    ks: Sequence[int] = (1, 5),
) -> dict[str, float]:
    """Share of pictures whose class is among the k best, over all pictures.

    Classes that score exactly alike share the places they hold: each counts with the chance that
    a random order of them would give it, so a model that answers everything alike scores chance.

    Args:
        image_features: one row a picture; the length of a row does not matter.
        classifier: one unit row a class.
        labels: class of each picture, 0 to c - 1.
        ks: which k to report. A k that every answer would satisfy (k >= c) is left out.

    Returns:
        `{"top1": percent, ...}`.

    Raises:
        ValueError: when counts differ, a label is no class, or features are not finite.
    """
    image_features = finite_features(image_features, "image")
    classifier = finite_features(classifier, "class")
    labels = np.asarray(labels)
    _check_labels(len(image_features), labels, len(classifier))
    above, tied = np.empty(len(labels), np.int64), np.empty(len(labels), np.int64)
    for block, scores in score_blocks(normalise(image_features), classifier):
        own = np.take_along_axis(scores, labels[block, None], axis=1)
        above[block] = (scores > own).sum(axis=1)
        tied[block] = (scores == own).sum(axis=1) - 1
    return {
        f"top{k}": float(100 * np.clip((k - above) / (tied + 1), 0, 1).mean())
        for k in ks
        if k < len(classifier)
    }


def chance(num_classes: int, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """What guessing gives, in percent, under the same names and with the same k left out."""
    return {f"top{k}": 100.0 * k / num_classes for k in ks if k < num_classes}


def _check_labels(pictures: int, labels: np.ndarray, classes: int) -> None:
    if pictures != len(labels):
        raise ValueError(f"found {pictures} pictures and {len(labels)} labels, wanted one each")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()}, but there are {classes} classes: "
            f"labels must be 0 to {classes - 1}"
        )
