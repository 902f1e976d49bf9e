import numpy as np
import pytest
from evaluation_fakes import FakeEncoder
from golden_files import golden, golden_json

from protoclip_jax.evaluation import zero_shot


@pytest.mark.core
def test_golden_classifier_logits_and_accuracy():
    data, expected = golden("evaluation", "zeroshot/"), golden_json("evaluation")["zeroshot"]
    classifier = zero_shot.classifier_from_embeddings(data["template_embeddings"])
    np.testing.assert_allclose(classifier, data["classifier"].T, atol=1e-5)
    logits = zero_shot.logits(data["image_embeddings"], classifier)
    np.testing.assert_allclose(logits, data["logits"], rtol=1e-5, atol=1e-5 * 100)
    found = zero_shot.top_k_accuracy(data["image_embeddings"], classifier, data["labels"])
    assert found["top1"] == pytest.approx(expected["top1"], abs=1e-9)
    assert found["top5"] == pytest.approx(expected["top5"], abs=1e-9)


def test_accuracy_equals_a_plain_sort():
    rng = np.random.default_rng(0)
    features, classifier = rng.normal(size=(3000, 8)), rng.normal(size=(11, 8))
    labels = rng.integers(0, 11, 3000)
    order = np.argsort(-(features @ classifier.T), axis=1)
    found = zero_shot.top_k_accuracy(features, classifier, labels, ks=(1, 3))
    for k in (1, 3):
        plain = 100 * np.mean([label in row[:k] for label, row in zip(labels, order, strict=True)])
        assert found[f"top{k}"] == pytest.approx(plain, abs=1e-9)


def test_a_model_that_answers_everything_alike_scores_chance():
    features, classifier = np.ones((70, 4)), np.ones((7, 4))
    found = zero_shot.top_k_accuracy(features, classifier, np.arange(70) % 7)
    assert found == pytest.approx(zero_shot.chance(7))


def test_built_classifier_averages_the_templates_of_each_class():
    encoder = FakeEncoder()
    classifier = zero_shot.build_classifier(encoder, ["red", "blue"], ["{}", "a {} {thing}"])
    red = zero_shot.normalise(encoder.encode_text(["red", "a red {thing}"]).sum(axis=0))
    np.testing.assert_allclose(classifier[0], red, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(classifier, axis=1), 1, atol=1e-6)


@pytest.mark.parametrize("classes", [2, 3, 4, 5])
def test_top_k_that_cannot_be_missed_is_left_out(classes):
    labels = np.arange(classes)
    found = zero_shot.top_k_accuracy(np.eye(classes), np.eye(classes), labels)
    assert found == {"top1": 100.0}
    assert set(zero_shot.chance(classes)) == {"top1"}


def test_user_errors_say_what_was_found():
    eye = np.eye(3)
    with pytest.raises(ValueError, match="labels run from 0 to 3"):
        zero_shot.top_k_accuracy(eye, eye, np.array([0, 1, 3]))
    with pytest.raises(ValueError, match="3 pictures and 2 labels"):
        zero_shot.top_k_accuracy(eye, eye, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"1 of 3 image features are not finite .* row 1"):
        zero_shot.top_k_accuracy(np.diag([1, np.nan, 1]), eye, np.arange(3))
    with pytest.raises(ValueError, match=r"has no {}"):
        zero_shot.build_classifier(FakeEncoder(), ["a"], ["a photo"])
    with pytest.raises(ValueError, match="0 class names"):
        zero_shot.build_classifier(FakeEncoder(), [])
