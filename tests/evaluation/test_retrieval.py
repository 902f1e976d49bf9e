from itertools import permutations

import numpy as np
import pytest
from golden_files import golden, golden_json

from protoclip_jax.evaluation import retrieval
from protoclip_jax.evaluation.features import score_blocks

WAYS = {"image_to_text": "image2text", "text_to_image": "text2image"}


def golden_ranks(name):
    """Both directions' ranks from the golden scores."""
    data = golden("evaluation", f"{name}/")
    scores, own = data["scores_img2text"], data["text_to_image"].astype(np.int64)
    images = np.arange(len(scores))
    return {
        "image_to_text": retrieval.count_ranks([(slice(None), scores)], images, own),
        "text_to_image": retrieval.count_ranks([(slice(None), scores.T)], own, images),
    }


@pytest.mark.core
@pytest.mark.parametrize("name", ["retrieval_multi", "retrieval_varying"])
def test_golden_recalls_from_features(name):
    data, expected = golden("evaluation", f"{name}/"), golden_json("evaluation")[name]["reference"]
    found = retrieval.retrieve(
        data["image_features"], data["text_features"], data["text_to_image"], rows=17
    )
    for way, reference in WAYS.items():
        for k in retrieval.KS:
            wanted = expected[f"{reference}-R@{k}"]
            assert found[f"{way}_r{k}"] == pytest.approx(wanted, abs=1e-6), (way, k)
    assert found["mean_recall"] == pytest.approx(expected["mean-recall"], abs=1e-6)


@pytest.mark.core
@pytest.mark.parametrize("name", ["retrieval_multi", "retrieval_varying", "retrieval_ties"])
def test_golden_brackets_of_ties(name):
    expected = golden_json("evaluation")[name]
    for way, ranks in golden_ranks(name).items():
        for k in retrieval.KS:
            optimistic = retrieval.recall(ranks, k, "optimistic")
            assert optimistic == pytest.approx(
                expected[f"{WAYS[way]}_optimistic"][f"R@{k}"], abs=1e-6
            )
            # The file's pessimistic rank counts an image's own tied captions as errors.
            strict = 100 * np.mean(ranks.above + ranks.tied + ranks.own - 1 < k)
            assert strict == pytest.approx(expected[f"{WAYS[way]}_pessimistic"][f"R@{k}"], abs=1e-6)
            between = retrieval.recall(ranks, k)
            pessimistic = retrieval.recall(ranks, k, "pessimistic")
            assert strict - 1e-9 <= pessimistic <= between + 1e-9 <= optimistic + 2e-9


@pytest.mark.parametrize("seed", range(3))
def test_expected_ties_equal_every_order_tried(seed):
    rng = np.random.default_rng(seed)
    scores, own = rng.integers(0, 3, (4, 7)) / 2, rng.integers(0, 4, 7)
    own[:4] = np.arange(4)
    images = np.arange(4)
    ranks = retrieval.count_ranks([(slice(None), scores)], images, own)
    for k in (1, 2, 5):
        hits = []
        for order in map(np.array, permutations(range(7))):
            best = order[np.argsort(-scores[:, order], axis=1, kind="stable")[:, :k]]
            hits.append((own[best] == images[:, None]).any(axis=1).mean())
        assert retrieval.recall(ranks, k) == pytest.approx(100 * np.mean(hits), abs=1e-9)


def test_equals_a_plain_float64_sort_without_chunks():
    rng = np.random.default_rng(1)
    images = rng.normal(size=(50, 12)).astype(np.float32)
    own = np.concatenate([np.arange(50), rng.integers(0, 50, 100)])
    texts = (images[own] + 2 * rng.normal(size=(150, 12))).astype(np.float32)
    found = retrieval.retrieve(images, texts, own, rows=7)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]
    scores = unit[0].astype(np.float64) @ unit[1].astype(np.float64).T
    for k in retrieval.KS:
        texts_found = own[np.argsort(-scores, axis=1)[:, :k]]
        plain = 100 * (texts_found == np.arange(50)[:, None]).any(axis=1).mean()
        assert found[f"image_to_text_r{k}"] == pytest.approx(plain, abs=1e-9)
        images_found = np.argsort(-scores.T, axis=1)[:, :k]
        plain = 100 * (images_found == own[:, None]).any(axis=1).mean()
        assert found[f"text_to_image_r{k}"] == pytest.approx(plain, abs=1e-9)


def test_equal_captions_tie_wherever_they_stand():
    rng = np.random.default_rng(2)
    images, text = rng.normal(size=(67, 33)).astype(np.float32), rng.normal(size=33)
    texts = np.tile(text.astype(np.float32), (131, 1))
    for _, scores in score_blocks(images, texts, rows=5):
        assert (scores == scores[:, :1]).all()


def test_a_collapsed_model_gets_the_chance_level():
    own = np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 4, 5, 6, 7, 8, 9, 10, 11, 11, 11])
    images, texts = np.ones((12, 5)), np.ones((20, 5))
    found = retrieval.retrieve(images, texts, own)
    assert found == pytest.approx(retrieval.chance(12, own))
    assert found["text_to_image_r1"] == pytest.approx(100 / 12)
    assert retrieval.retrieve(images, texts, own, ties="optimistic")["mean_recall"] == 100


def test_chance_of_single_captions_and_small_corpora():
    found = retrieval.chance(40)
    assert found["image_to_text_r5"] == pytest.approx(100 * 5 / 40)
    assert found["text_to_image_r10"] == pytest.approx(100 * 10 / 40)
    assert retrieval.chance(3)["text_to_image_r10"] == pytest.approx(100)


def test_user_errors_say_what_was_found():
    eye = np.eye(3)
    with pytest.raises(ValueError, match="3 pictures and 2 captions"):
        retrieval.retrieve(eye, eye[:2])
    with pytest.raises(ValueError, match=r"1 of 3 pictures have no caption .* row 2"):
        retrieval.retrieve(eye, eye, np.array([0, 1, 1]))
    with pytest.raises(ValueError, match="runs from 0 to 3"):
        retrieval.retrieve(eye, eye, np.array([0, 1, 3]))
    with pytest.raises(ValueError, match="2 entries for 3 captions"):
        retrieval.retrieve(eye, eye, np.array([0, 1]))
    with pytest.raises(ValueError, match="1 of 3 text features are not finite"):
        retrieval.retrieve(eye, np.diag([1, np.inf, 1]))
    with pytest.raises(ValueError, match="wanted 'expected'"):
        retrieval.retrieve(eye, eye, ties="hopeful")
