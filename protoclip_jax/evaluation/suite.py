"""The evaluation of a model on EmojiText: every measure of the paper, in seconds.

EmojiText's splits measure different things, and the names of the metrics say which:
- `zero_shot/*`: the `test` pictures, by an artist who was never seen; the classes are the
  concepts of `test` (most of them were seen, drawn by others).
- `zero_shot_unseen/*`: the `val` pictures, whose concepts were never seen; the classes are the
  concepts of `val`.
- `linear_probe/top1`: trained on features of `train`, tested on `test`; classes are subgroups.
- `retrieval/*`, `geometry/*`: pictures and captions of `test`.
- `clustering/*`: k-means on the `test` pictures against their subgroups.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int, UInt8

from protoclip_jax.data.decoding import decode, evaluation_crop
from protoclip_jax.data.emoji_text import TEMPLATES
from protoclip_jax.evaluation import clustering, geometry, linear_probe, retrieval, zero_shot
from protoclip_jax.evaluation.features import Encoder, extract_images, extract_texts


@runtime_checkable
class LabelledSource(Protocol):
    """Pairs with columns of labels, for example `EmojiText("test")`."""

    def __len__(self) -> int: ...

    def read(self, row: int) -> tuple[bytes, str]:
        """The encoded picture and the caption of one row."""
        ...

    def column(self, name: str) -> list[str]:
        """One label for every row."""
        ...


@dataclass(frozen=True)
class SuiteSettings:
    """What the suite measures on.

    Attributes:
        templates: prompts of the zero-shot classifiers.
        concept: column that names the zero-shot classes.
        label: column with the classes of probe and clusters.
        probe_rows: training pictures for the probe, drawn evenly from `train`; None for all.
        regularisation: values of C the probe chooses from.
        seed: of that draw, the probe's held-out rows and k-means.
        batch: pictures encoded at a time.
        threads: decoding threads, by default one a core.
    """

    templates: tuple[str, ...] = TEMPLATES
    concept: str = "concept"
    label: str = "subgroup"
    probe_rows: int | None = 4096
    regularisation: tuple[float, ...] = linear_probe.REGULARISATION
    seed: int = 0
    batch: int = 256
    threads: int | None = None


def evaluate(
    encoder: Encoder,
    source_train: LabelledSource,
    source_test: LabelledSource,
    source_val: LabelledSource,
    settings: SuiteSettings = SuiteSettings(),
) -> dict[str, float]:
    """All metrics of a model. Shares are in percent; `chance` has what they compare with."""
    labels = Labels.of(source_train, source_test, source_val, settings)
    features = Features.of(encoder, source_train, source_test, source_val, labels, settings)
    return measure(features, labels, settings)


def measure(
    features: "Features", labels: "Labels", settings: SuiteSettings = SuiteSettings()
) -> dict[str, float]:
    """All metrics, from what the model made of pictures and texts."""
    metrics = {}
    for name, pictures, classifier, targets in (
        ("zero_shot", features.test, features.test_classifier, labels.test_concept),
        ("zero_shot_unseen", features.val, features.val_classifier, labels.val_concept),
    ):
        metrics |= _under(name, zero_shot.top_k_accuracy(pictures, classifier, targets))
    probe = linear_probe.linear_probe(
        features.train, labels.train_label, features.test, labels.test_label,
        regularisation=settings.regularisation, seed=settings.seed,
    )  # fmt: skip
    metrics["linear_probe/top1"] = probe.top1
    metrics |= _under("retrieval", retrieval.retrieve(features.test, features.captions))
    k = len(np.unique(labels.test_label))
    agreement = clustering.evaluate(features.test, labels.test_label, k, settings.seed)
    metrics |= _under("clustering", agreement)
    return metrics | _under("geometry", geometry.evaluate(features.test, features.captions))


def chance(
    source_train: LabelledSource,
    source_test: LabelledSource,
    source_val: LabelledSource,
    settings: SuiteSettings = SuiteSettings(),
) -> dict[str, float]:
    """Chance levels of those metrics of `evaluate` that have one, under the same names."""
    labels = Labels.of(source_train, source_test, source_val, settings)
    return {
        **_under("zero_shot", zero_shot.chance(len(labels.test_concepts))),
        **_under("zero_shot_unseen", zero_shot.chance(len(labels.val_concepts))),
        "linear_probe/top1": linear_probe.chance(labels.train_label, labels.test_label),
        **_under("retrieval", retrieval.chance(len(source_test))),
        **_under("clustering", clustering.chance()),
    }


@dataclass(frozen=True)
class Labels:
    """Classes of the three splits as numbers. Names are sorted, so numbers do not depend on order.

    Subgroups are numbered over `train` and `test` together; concepts within their own split.
    """

    test_concepts: list[str]
    test_concept: Int[np.ndarray, "test"]
    val_concepts: list[str]
    val_concept: Int[np.ndarray, "val"]
    probe_rows: Int[np.ndarray, "probe"]
    train_label: Int[np.ndarray, "probe"]
    test_label: Int[np.ndarray, "test"]

    @classmethod
    def of(cls, train, test, val, settings: SuiteSettings) -> "Labels":
        """Reads the columns the suite needs."""
        test_concepts, test_concept = _number(test.column(settings.concept))
        val_concepts, val_concept = _number(val.column(settings.concept))
        train_names, test_names = train.column(settings.label), test.column(settings.label)
        _, both = _number([*train_names, *test_names])
        rows = _probe_rows(len(train), settings)
        return cls(
            test_concepts, test_concept, val_concepts, val_concept,
            rows, both[: len(train)][rows], both[len(train) :],
        )  # fmt: skip


@dataclass(frozen=True)
class Features:
    """What the suite needs of a model: L2-normalised features, float32.

    Attributes:
        train: of the pictures for the probe.
        test, val: of all pictures of the split.
        captions: of `test`.
        test_classifier, val_classifier: one row a concept.
    """

    train: Float[np.ndarray, "probe e"]
    test: Float[np.ndarray, "test e"]
    val: Float[np.ndarray, "val e"]
    captions: Float[np.ndarray, "test e"]
    test_classifier: Float[np.ndarray, "test_concepts e"]
    val_classifier: Float[np.ndarray, "val_concepts e"]

    @classmethod
    def of(cls, encoder: Encoder, train, test, val, labels: Labels, settings) -> "Features":
        """Encodes all of it. Several processes with one model call this together, and each decodes
        its share of the pictures."""
        return cls(
            _pictures(encoder, train, settings, labels.probe_rows),
            _pictures(encoder, test, settings),
            _pictures(encoder, val, settings),
            extract_texts(encoder, [test.read(row)[1] for row in range(len(test))]),
            zero_shot.build_classifier(encoder, labels.test_concepts, settings.templates),
            zero_shot.build_classifier(encoder, labels.val_concepts, settings.templates),
        )


def _number(names: Sequence[str]) -> tuple[list[str], Int[np.ndarray, "n"]]:
    classes, numbers = np.unique(np.asarray(names), return_inverse=True)
    return classes.tolist(), numbers


def _probe_rows(count: int, settings: SuiteSettings) -> Int[np.ndarray, "probe"]:
    if settings.probe_rows is None or settings.probe_rows >= count:
        return np.arange(count)
    draw = np.random.default_rng(settings.seed).permutation(count)
    return np.sort(draw[: settings.probe_rows])


def _pictures(
    encoder: Encoder, source: LabelledSource, settings: SuiteSettings, rows=None
) -> Float[np.ndarray, "n e"]:
    rows = np.arange(len(source)) if rows is None else rows

    def load(number: int) -> UInt8[np.ndarray, "h w 3"]:
        return evaluation_crop(decode(source.read(int(rows[number]))[0]), encoder.image_size)

    return extract_images(
        encoder, load, len(rows), batch=settings.batch, threads=settings.threads, shared=True
    )


def _under(room: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{room}/{name}": value for name, value in metrics.items()}
