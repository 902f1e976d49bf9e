import numpy as np
import plain_evaluation
import pytest
from evaluation_fakes import COLOURS, ConstantEncoder, FakeEncoder, FakeSource

from protoclip_jax.data.decoding import decode, evaluation_crop
from protoclip_jax.data.emoji_text import TEMPLATES, EmojiText
from protoclip_jax.encoder import Encoder
from protoclip_jax.evaluation.suite import (
    Features,
    Labels,
    SuiteSettings,
    chance,
    evaluate,
    measure,
)
from protoclip_jax.evaluation.table import comparison_table
from protoclip_jax.models import clip
from protoclip_jax.models.presets import preset

TRAIN = FakeSource([*COLOURS] * 6, seed=1)
TEST = FakeSource([*COLOURS], seed=2)
VAL = FakeSource(["red", "green", "blue", "white", "black", "cyan"] * 2, seed=3)
SETTINGS = SuiteSettings(batch=5, regularisation=(1.0, 10.0))


def test_a_model_that_knows_the_colours_gets_everything_right():
    found = evaluate(FakeEncoder(), TRAIN, TEST, VAL, SETTINGS)
    for name, value in found.items():
        if name.startswith(("zero_shot", "retrieval")):
            assert value == 100.0, name
    assert found["linear_probe/top1"] > chance(TRAIN, TEST, VAL)["linear_probe/top1"]
    assert found["geometry/alignment"] > 0.95
    assert all(isinstance(value, float) for value in found.values())


def test_a_collapsed_model_gets_chance():
    found = evaluate(ConstantEncoder(), TRAIN, TEST, VAL, SETTINGS)
    expected = chance(TRAIN, TEST, VAL, SETTINGS)
    assert set(expected) <= set(found)
    for name, level in expected.items():
        assert found[name] == pytest.approx(level, abs=1e-4), name
    assert found["geometry/modality_gap"] == pytest.approx(0, abs=1e-6)


def test_measures_are_of_the_features_that_they_name():
    """Features of no symmetry: each measure is another number where two of them change places."""
    rng = np.random.default_rng(0)
    splits = [
        plain_evaluation.DrawnSource(*sizes) for sizes in ((30, 5, 1), (21, 8, 2), (13, 7, 3))
    ]
    labels = Labels.of(*splits, SuiteSettings())

    def around(middles, numbers, noise):
        rows = middles[numbers] + noise * rng.normal(size=(len(numbers), middles.shape[1]))
        return np.float32(plain_evaluation.unit(rows))

    groups, concepts, unseen = (rng.normal(size=(count, 6)) for count in (3, 8, 7))
    images = groups[labels.test_label] + concepts[labels.test_concept]
    each = np.arange(len(images))
    features = Features(
        train=around(groups, labels.train_label, 1.0),
        test=around(images, each, 0.5),
        val=around(unseen, labels.val_concept, 1.0),
        captions=around(images, each, 1.5),
        test_classifier=around(concepts, np.arange(8), 0.5),
        val_classifier=around(unseen, np.arange(7), 0.5),
    )
    found = measure(features, labels)
    expected = plain_evaluation.measures(features, *splits)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
    # Or the two directions could change places.
    assert found["retrieval/image_to_text_r1"] != found["retrieval/text_to_image_r1"]
    levels = chance(*splits)
    assert levels["zero_shot/top1"] == pytest.approx(100 / 8)
    assert levels["zero_shot_unseen/top1"] == pytest.approx(100 / 7)
    assert levels["retrieval/image_to_text_r1"] == pytest.approx(100 / 21)
    counts = np.bincount(labels.train_label)
    assert levels["linear_probe/top1"] == pytest.approx(
        100 * np.mean(labels.test_label == counts.argmax())
    )


def test_features_are_of_their_split_and_classes_in_the_order_of_their_names():
    encoder = FakeEncoder()
    settings = SuiteSettings(templates=("{}", "red and {}"), probe_rows=20, batch=5)
    labels = Labels.of(TRAIN, TEST, VAL, settings)
    found = Features.of(encoder, TRAIN, TEST, VAL, labels, settings)
    for name, source, rows in (
        ("train", TRAIN, labels.probe_rows),
        ("test", TEST, range(len(TEST))),
        ("val", VAL, range(len(VAL))),
    ):
        pixels = [evaluation_crop(decode(source.read(int(row))[0]), 16) for row in rows]
        np.testing.assert_allclose(getattr(found, name), encoder.encode_image(np.stack(pixels)))
    captions = [TEST.read(row)[1] for row in range(len(TEST))]
    np.testing.assert_allclose(found.captions, encoder.encode_text(captions))
    for classifier, source in ((found.test_classifier, TEST), (found.val_classifier, VAL)):
        names = sorted(set(source.column("concept")))
        parts = [
            encoder.encode_text([template.format(name) for name in names])
            for template in settings.templates
        ]
        np.testing.assert_allclose(classifier, plain_evaluation.unit(sum(parts)), atol=1e-6)


def test_settings_of_the_paper_are_pinned():
    settings = SuiteSettings()
    assert settings.templates == TEMPLATES == plain_evaluation.PROMPTS
    assert (settings.concept, settings.label) == ("concept", "subgroup")
    assert (settings.probe_rows, settings.seed, settings.batch) == (4096, 0, 256)


def test_same_model_same_numbers():
    first, second = (evaluate(FakeEncoder(), TRAIN, TEST, VAL, SETTINGS) for _ in range(2))
    assert first == second


def test_labels_are_numbered_alike_in_train_and_test():
    settings = SuiteSettings(probe_rows=20, seed=4)
    labels = Labels.of(TRAIN, TEST, VAL, settings)
    assert len(labels.probe_rows) == len(set(labels.probe_rows)) == 20
    train_names = np.array(TRAIN.column("subgroup"))[labels.probe_rows]
    names = dict(zip(labels.train_label, train_names, strict=True))
    assert [names[i] for i in labels.test_label] == TEST.column("subgroup")
    assert [labels.val_concepts[i] for i in labels.val_concept] == VAL.column("concept")
    assert labels.val_concepts == sorted(set(VAL.column("concept")))


@pytest.mark.slow
def test_an_untrained_model_on_emoji_text_is_near_chance():
    config = preset("tiny-rn")
    encoder = Encoder(config, *clip.initialise(config, 0))
    sources = [EmojiText(split) for split in ("train", "test", "val")]
    settings = SuiteSettings(probe_rows=1024)
    found, levels = evaluate(encoder, *sources, settings), chance(*sources, settings)
    assert set(levels) <= set(found)
    assert levels["zero_shot/top1"] == pytest.approx(100 / len(sources[1]))
    for name, level in levels.items():
        if name.startswith(("zero_shot", "retrieval")):
            assert found[name] < level + 2, name
    table = comparison_table({"untrained": found}, levels)
    assert max(map(len, table.splitlines())) <= 80
