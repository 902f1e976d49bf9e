"""Folders of classes: links in them, and roots that are not those of classes."""

import os

import pytest
from evaluation_fakes import FakeEncoder, write

from protoclip_jax.evaluation.folders import evaluate_folder, open_folder


@pytest.fixture
def two(tmp_path):
    return write(tmp_path / "two", {"cat/a.png": "red", "dog/a.png": "blue"})


def listed(root):
    found = open_folder(root)
    return {
        name: [str(path.relative_to(root / name)) for path, label in
               zip(found.paths, found.labels, strict=True) if found.classes[label] == name]
        for name in found.classes
    }  # fmt: skip


def test_links_that_lead_nowhere_count_as_unreadable(two, caplog):
    (two / "dog" / "l.png").symlink_to("gone.png")
    (two / "dog" / "round.png").symlink_to("round.png")
    metrics = evaluate_folder(FakeEncoder(), open_folder(two))
    assert (metrics["data/pictures"], metrics["data/unreadable"]) == (2, 2)
    assert "left out 2 of 4 pictures" in caplog.text


def test_folders_that_are_links_to_nothing_are_told(two, caplog):
    (two / "bird").symlink_to("gone")
    (two / "dog" / "more").symlink_to("gone")
    assert listed(two) == {"cat": ["a.png"], "dog": ["a.png"]}
    assert "2 (bird, dog/more)" in caplog.text


def test_linked_folders_are_looked_through_once(two, tmp_path, caplog):
    write(tmp_path / "far", {"b.png": "red", "in/c.png": "red", ".no/d.png": "red"})
    (two / "cat" / "far").symlink_to(tmp_path / "far")
    (two / "cat" / "again").symlink_to(tmp_path / "far" / "in")
    (two / "cat" / "loop").symlink_to(".")
    (two / "cat" / "up").symlink_to("..")
    (tmp_path / "far" / "back").symlink_to(two)
    (two / "bird").symlink_to(tmp_path / "far")
    found = listed(two)
    assert [name.rpartition("/")[2] for name in found["cat"]] == ["a.png", "c.png", "b.png"]
    assert found["dog"] == ["a.png"]
    assert found["bird"] == ["b.png", "in/c.png"]
    assert "links give the same images to several classes: bird = cat" in caplog.text


def test_a_folder_inside_keeps_its_own_path_beside_links_to_it(two, caplog):
    write(two, {"cat/z/b.png": "red"})
    (two / "cat" / "b").symlink_to("z")
    assert listed(two)["cat"] == ["a.png", "z/b.png"]
    assert not caplog.text


@pytest.mark.parametrize("link", ["cat2", "dog/more"])
def test_classes_that_share_a_folder_are_told(two, caplog, link):
    (two / link).symlink_to(two / "cat")
    found = listed(two)
    assert sum(map(len, found.values())) == 3
    said = f"cat = {link.partition('/')[0]}"
    assert f"the same images to several classes: {said}" in caplog.text


def test_a_folder_that_cannot_be_read_is_refused(two, monkeypatch):
    write(two, {"cat/closed/b.png": "red"})
    scan = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(PermissionError, match="cat/closed"):
        open_folder(two)


@pytest.mark.parametrize(
    "pictures",
    [
        {"data/cat/a.png": "red", "data/dog/a.png": "blue"},
        {"cat/a.png": "red"},
        {"cat/a.png": "red", ".dog/a.png": "blue"},
    ],
)
def test_one_class_is_refused(tmp_path, pictures):
    root, only = write(tmp_path, pictures), next(iter(pictures)).partition("/")[0]
    with pytest.raises(ValueError, match=rf"one class only, '{only}'.*name that") as caught:
        open_folder(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        (["train/cat/a", "train/dog/a", "val/cat/a", "val/dog/a"], True),
        (["train/cat/a", "train/dog/a", "train/owl/a", "val/cat/in/a", "val/dog/a"], True),
        (["train/cat/a", "train/dog/a", "val/cat/a", "val/dog/a", "val/b"], False),
        (["cat/images/a", "dog/images/a"], False),
        (["cat/left/a", "cat/right/a", "dog/left/a", "dog/up/a"], False),
        (["cat/a", "dog/a"], False),
    ],
)
def test_splits_taken_for_classes_are_told(tmp_path, caplog, pictures, told):
    open_folder(write(tmp_path, {f"{path}.png": "red" for path in pictures}))
    assert ("where those are the classes, name" in caplog.text) == told
    if told:
        assert "classes train, val all have their images in folders cat, dog" in caplog.text
        assert f"name {tmp_path / 'train'}" in caplog.text
