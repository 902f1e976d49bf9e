"""Public bug reports about evaluation, each with its own input, through the real path."""

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_fakes import FakeEncoder
from PIL import Image

from protoclip_jax.evaluation.folders import evaluate_folder, folder_chance, open_folder
from protoclip_jax.evaluation.linear_probe import linear_probe
from protoclip_jax.evaluation.retrieval import retrieve
from protoclip_jax.evaluation.sgd_probe import SGDSettings, sgd_probe

CASES = Path(__file__).parent.parent / "cases"


def knowing(folder):
    """A model that knows the colour of each class's pictures by the class's name."""
    colours = {}
    for path, label in zip(folder.paths, folder.labels, strict=True):
        colours[folder.names[label]] = np.asarray(Image.open(path).convert("RGB"))[0, 0]
    encoder = FakeEncoder()
    encoder.encode_text = lambda texts: FakeEncoder(
        {str(i): colours.get(text, (128, 128, 128)) for i, text in enumerate(texts)}
    ).encode_text([str(i) for i in range(len(texts))])
    return encoder


def test_eval_01_empty_class_keeps_its_number(caplog):
    found = open_folder(CASES / "EVAL-01" / "test", CASES / "EVAL-01" / "classnames.txt")
    assert found.classes.index("bee") == 1
    assert found.classes.index("cow") == 2
    assert found.empty == ("bee",)
    assert "1 of 6 classes have no picture: bee" in caplog.text
    assert [found.classes[i] for i in found.labels] == [path.parent.name for path in found.paths]
    metrics = evaluate_folder(knowing(found), found)
    assert metrics["data/pictures"] == 15
    assert metrics["data/empty_classes"] == 1
    assert metrics["zero_shot/top1"] == 100
    # The answers of a model whose classes are shifted by the empty one are wrong.
    shifted = knowing(found)
    encode = shifted.encode_text
    shifted.encode_text = lambda texts: np.roll(encode(texts), 1, axis=0)
    assert evaluate_folder(shifted, found)["zero_shot/top1"] < 50


def test_eval_03_fewer_than_five_classes_have_no_top5():
    found = open_folder(CASES / "EVAL-03" / "test")
    metrics = evaluate_folder(knowing(found), found)
    assert metrics["zero_shot/top1"] == 100
    assert "zero_shot/top5" not in metrics
    assert "zero_shot/top5" not in folder_chance(found)


def test_eval_05_several_captions_a_picture():
    with np.load(CASES / "EVAL-05" / "features.npz") as data:
        found = retrieve(data["image"], data["text"], data["image_of_text"])
    expected = json.loads((CASES / "EVAL-05" / "expected.json").read_text())["right"]
    for way, reference in (("image_to_text", "image2text"), ("text_to_image", "text2image")):
        for k in (1, 5, 10):
            wanted = expected[f"{reference}-R@{k}"]
            assert found[f"{way}_r{k}"] == pytest.approx(wanted, abs=1e-6)


def test_eval_07_nothing_is_chosen_on_test_rows():
    with np.load(CASES / "EVAL-07" / "probe.npz") as data:
        train, test = (data["train_x"], data["train_y"]), data["test_x"]
        labels = data["test_y"], data["test_y_shuffled"]
    exact = [linear_probe(*train, test, y) for y in labels]
    sgd = [sgd_probe(*train, test, y, settings=SGDSettings(epochs=30)) for y in labels]
    assert exact[0].regularisation == exact[1].regularisation
    assert exact[0].held_out_top1 == exact[1].held_out_top1
    assert sgd[0].epoch == sgd[1].epoch
    for first, second in (exact, sgd):
        np.testing.assert_array_equal(first.classifier.weights, second.classifier.weights)
        np.testing.assert_array_equal(first.classifier.bias, second.classifier.bias)
        for result in (first, second):
            assert result.top1 == pytest.approx(25, abs=9)
    for result in sgd:
        assert result.top1 <= result.best_test_top1 + 1e-4


def test_eval_09_names_are_matched_by_name():
    root = CASES / "EVAL-09"
    names = json.loads((root / "classnames.json").read_text())
    found = open_folder(root / "test", root / "classnames.json")
    assert len(found.paths) == 18
    for path, label in zip(found.paths, found.labels, strict=True):
        assert found.names[label] == names[path.parent.name]
    assert evaluate_folder(knowing(found), found)["zero_shot/top1"] == 100
    with pytest.raises(ValueError, match="found 6 folders and 3 names"):
        open_folder(root / "test", root / "short.txt")
    with pytest.raises(ValueError, match="found 6 folders and 3 names"):
        open_folder(root / "test", root / "short.txt", by_position=True)


def test_eval_11_splits_number_their_classes_alike():
    roots = [CASES / "EVAL-11" / split for split in ("test", "train")]
    test, train = (open_folder(root, also=roots) for root in roots)
    assert test.classes == train.classes
    numbers = {p.parent.name: i for p, i in zip(test.paths, test.labels, strict=True)}
    assert numbers["270deg"] == 2
    assert numbers == {
        p.parent.name: i
        for p, i in zip(train.paths, train.labels, strict=True)
        if p.parent.name in numbers
    }
    assert test.empty == ("180deg",)
    assert evaluate_folder(knowing(test), test, train=train)["zero_shot/top1"] == 100
