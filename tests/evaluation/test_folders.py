import json

import numpy as np
import pytest
from evaluation_fakes import FakeEncoder, write

from protoclip_jax.evaluation import folders
from protoclip_jax.evaluation.folders import evaluate_folder, folder_chance, open_folder
from protoclip_jax.evaluation.prompts import prompt_set, prompt_sets


@pytest.fixture
def root(tmp_path):
    pictures = {f"{c}/{i}.png": c for c in ("red", "green", "blue", "white", "black", "pink")
                for i in range(2)}  # fmt: skip
    return write(tmp_path / "test", pictures)


def test_folder_names_serve_as_class_names(root):
    found = open_folder(root)
    assert found.classes == ("black", "blue", "green", "pink", "red", "white")
    assert [found.classes[i] for i in found.labels] == [p.parent.name for p in found.paths]
    metrics = evaluate_folder(FakeEncoder(), found, ["{}", "all {} here"], batch=5)
    assert metrics == {
        "zero_shot/top1": 100.0, "zero_shot/top5": 100.0,
        "data/pictures": 12.0, "data/unreadable": 0.0, "data/empty_classes": 0.0,
    }  # fmt: skip
    assert folder_chance(found) == pytest.approx(
        {"zero_shot/top1": 100 / 6, "zero_shot/top5": 500 / 6}
    )


def test_names_match_whatever_their_spelling(tmp_path):
    root = write(tmp_path, {"Sea_Lion/a.png": "red", "bald-eagle/a.png": "blue"})
    found = open_folder(root, ["bald eagle", "sea lion", "tern"])
    assert found.classes == ("bald-eagle", "Sea_Lion", "tern")
    assert found.names == ("bald eagle", "sea lion", "tern")
    assert [p.parent.name for p in found.paths] == ["bald-eagle", "Sea_Lion"]
    assert found.labels.tolist() == [0, 1]
    assert found.empty == ("tern",)


def test_folders_that_differ_in_capitals_stay_apart(tmp_path):
    root = write(tmp_path, {"A_b/a.png": "red", "a-b/a.png": "blue"})
    assert open_folder(root, ["a-b", "A_b"]).labels.tolist() == [0, 1]


def test_names_by_position_only_when_asked(tmp_path):
    root = write(tmp_path, {"n01/a.png": "red", "n02/a.png": "blue"})
    with pytest.raises(ValueError, match="2 folders have none: n01, n02"):
        open_folder(root, ["red", "blue"])
    assert open_folder(root, ["red", "blue"], by_position=True).names == ("red", "blue")
    for wrong in (["red"], {"n01": "red", "n02": "blue"}):
        with pytest.raises(ValueError, match="by position wants a list"):
            open_folder(root, wrong, by_position=True)


def test_names_from_files(tmp_path, root):
    order = ["white", "red", "pink", "black", "green", "blue"]
    text, array, table = tmp_path / "n.txt", tmp_path / "a.json", tmp_path / "t.json"
    text.write_text("\n".join(order) + "\n\n")
    array.write_text(json.dumps(order))
    table.write_text(json.dumps({name: name.upper() for name in order}))
    assert open_folder(root, text).classes == open_folder(root, array).classes == tuple(order)
    assert open_folder(root, table).names == tuple(sorted(n.upper() for n in order))
    array.write_text("[1, 2]")
    with pytest.raises(ValueError, match="wanted an object"):
        open_folder(root, array)


def test_files_that_are_no_pictures_are_passed_over(tmp_path):
    root = write(
        tmp_path,
        {
            "red/deep/er/a.PNG": "red",
            "red/.hidden.png": b"",
            "red/notes.txt": b"",
            ".git/a.png": "red",
            "blue/a.png": "blue",
        },
    )
    found = open_folder(root)
    assert found.classes == ("blue", "red")
    assert len(found.paths) == 2


def test_unreadable_pictures_are_counted_and_named(root, caplog):
    write(root, {"blue/broken.png": b"<html>", "red/empty.jpg": b""})
    metrics = evaluate_folder(FakeEncoder(), open_folder(root))
    assert metrics["data/unreadable"] == 2
    assert metrics["data/pictures"] == 12
    assert metrics["zero_shot/top1"] == 100
    assert "left out 2 of 14 pictures" in caplog.text
    assert "broken.png" in caplog.text


def test_linear_probe_needs_splits_numbered_alike(tmp_path):
    colours = ("red", "green", "blue")
    train = write(tmp_path / "train", {f"{c}/{i}.png": c for c in colours for i in range(6)})
    test = write(tmp_path / "test", {f"{c}/0.png": c for c in ("red", "blue")})
    roots = (test, train)
    test_split, train_split = (open_folder(root, also=roots) for root in roots)
    metrics = evaluate_folder(FakeEncoder(), test_split, train=train_split)
    assert metrics["linear_probe/top1"] == 100
    assert folder_chance(test_split, train_split)["linear_probe/top1"] == 50
    with pytest.raises(ValueError, match="open each with the other in `also`"):
        evaluate_folder(FakeEncoder(), open_folder(test), train=train_split)


def test_large_training_sets_take_the_sgd_probe(tmp_path, monkeypatch):
    colours = ("red", "green", "blue")
    root = write(tmp_path, {f"{c}/{i}.png": c for c in colours for i in range(6)})
    monkeypatch.setattr(folders, "EXACT_PROBE", 18 * 4 * 3)
    monkeypatch.setattr(folders.linear_probe, "linear_probe", None)
    split = open_folder(root)
    assert evaluate_folder(FakeEncoder(), split, train=split)["linear_probe/top1"] == 100


def test_user_errors_say_what_was_found(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        open_folder(tmp_path / "absent")
    (tmp_path / "red").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        open_folder(tmp_path)
    with pytest.raises(ValueError, match="unknown prompt set 'cifar': wanted one of birdsnap"):
        prompt_set("cifar")


def test_published_prompts_are_complete():
    counts = {name: len(prompt_set(name).names) for name in prompt_sets()}
    assert counts["imagenet"] == 1000
    assert counts["cifar10"] == 10
    assert len(counts) == 10
    for name in counts:
        assert all("{}" in template for template in prompt_set(name).templates)


def test_labels_are_int64_for_indexing(root):
    assert open_folder(root).labels.dtype == np.int64


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["0", "1", "10", "2", "9"], ["0", "1", "2", "9", "10"]),
        (["007", "1", "010", "2"], ["1", "2", "007", "010"]),
        (["-1", "-10", "0", "3"], ["-10", "-1", "0", "3"]),
        (["0.5", "10.0", "2.25", "-0.5"], ["-0.5", "0.5", "2.25", "10.0"]),
        (["10", "9", "other", "__MACOSX"], ["9", "10", "__MACOSX", "other"]),
        (["class_10", "class_2"], ["class_10", "class_2"]),
        (["1", "01"], ["01", "1"]),
        ([str(10**30), "9"], ["9", str(10**30)]),
        (["\u0661", "2", "x"], ["2", "x", "\u0661"]),  # another script's digits are text
    ],
)
def test_folders_named_by_numbers_are_in_number_order(tmp_path, names, order):
    root = write(tmp_path, {f"{name}/a.png": "red" for name in names} | {".9/a.png": "red"})
    found = open_folder(root)
    assert list(found.classes) == order
    assert [path.parent.name for path in found.paths] == order
    assert found.labels.tolist() == list(range(len(order)))


def test_names_of_numbered_folders_by_position(tmp_path):
    root = write(tmp_path, {f"{number}/a.png": "red" for number in range(12)})
    digits = [f"called {number}" for number in range(12)]
    found = open_folder(root, digits, by_position=True)
    assert dict(zip(found.classes, found.names, strict=True))["10"] == "called 10"
    # The mapping's own order does not matter either.
    mapping = {str(number): digits[number] for number in reversed(range(12))}
    assert open_folder(root, mapping).names == found.names == tuple(digits)


@pytest.mark.parametrize(
    ("folders", "certain"),
    [
        (["n01440764", "n01443537", "n02000000"], True),
        (["0", "1", "2", "10"], True),
        (["001.Albatross", "002.Finch", "010.Wren"], True),
        (["-1", "0", "1"], True),
        (["class_1", "class_2", "class_10"], False),
        (["1", "2", "10", "other"], False),
        (["1", "01"], False),
        (["Zebra", "ant"], False),
        (["sea_lion", "seal"], False),
        (["zebra", "élan"], False),
        (["a-b", "a_b"], False),
        (["Ant", "ant"], False),
    ],
)
def test_names_by_position_need_one_certain_order(tmp_path, folders, certain):
    root = write(tmp_path, {f"{name}/a.png": "red" for name in folders})
    names = [f"name {number}" for number in range(len(folders))]
    if certain:
        assert list(open_folder(root, names, by_position=True).classes) == folders
    else:
        with pytest.raises(ValueError, match=r"which folder comes first.*JSON object"):
            open_folder(root, names, by_position=True)


def test_equal_class_names_stay_and_are_told(tmp_path, caplog):
    root = write(tmp_path, {"n01/a.png": "red", "n02/a.png": "blue", "n03/a.png": "green"})
    names = ["crane", "kite", "crane"]
    mapping = dict(zip(("n01", "n02", "n03"), names, strict=True))
    for given, how in ((names, {"by_position": True}), (mapping, {})):
        caplog.clear()
        found = open_folder(root, given, **how)
        assert found.classes == ("n01", "n02", "n03")
        assert found.names == tuple(names)
        assert found.labels.tolist() == [0, 1, 2]
        assert "no prompt can tell apart: 'crane' (classes 0, 2)" in caplog.text
    caplog.clear()
    spelt = write(tmp_path / "spelt", {"sea_lion/a.png": "red", "sea lion/a.png": "blue"})
    found = open_folder(spelt)
    assert found.classes == ("sea lion", "sea_lion")
    assert found.names == ("sea lion", "sea lion")
    assert "'sea lion' (classes 0, 1)" in caplog.text


def test_a_name_twice_in_a_list_keeps_its_number(tmp_path, caplog):
    root = write(tmp_path, {"red/a.png": "red", "blue/a.png": "blue"})
    found = open_folder(root, ["red", "green", "red", "blue"])
    assert found.names == ("red", "green", "red", "blue")
    assert found.labels.tolist() == [0, 3]
    assert [path.parent.name for path in found.paths] == ["red", "blue"]
    assert found.empty == ("green", "red")
    assert "'red' (classes 0, 2)" in caplog.text


def test_no_folder_is_lost_among_like_names(tmp_path):
    root = write(tmp_path / "two", {"sea_lion/a.png": "red", "sea-lion/b.png": "blue"})
    for names in (["sea lion"], {"Sea Lion": "an animal"}):
        with pytest.raises(ValueError, match=r"the name '[Ss]ea [Ll]ion' fits several folders"):
            open_folder(root, names)
    one = write(tmp_path / "one", {"sea-lion/a.png": "red"})
    with pytest.raises(ValueError, match="'sea-lion' fits several names: sea lion, Sea Lion"):
        open_folder(one, ["sea lion", "Sea Lion"])
    # An exact name goes first.
    assert open_folder(root, ["sea lion", "sea_lion"]).classes == ("sea-lion", "sea_lion")


def test_names_that_say_nothing_are_refused(tmp_path):
    root = write(tmp_path, {"a/a.png": "red", "b/a.png": "blue"})
    with pytest.raises(ValueError, match="1 classes have a name without anything in it: b"):
        open_folder(root, {"a": "ant", "b": "&nbsp;"})


def test_faults_in_a_file_of_names_name_the_file(tmp_path, root):
    for name, content, message in (
        ("n.json", b'{"red": "a", "red": "b"}', "n.json: red stand in it more than once"),
        ("cut.json", b'{"red": ', "cut.json: "),
        ("deep.json", b"[" * 100_000, "deep.json: "),
        ("latin.txt", "caf\xe9".encode("latin-1"), "latin.txt: "),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_folder(root, path)


def test_a_name_never_leads_out_of_the_root(tmp_path):
    write(tmp_path / "out", {"a.png": "red"})
    root = write(tmp_path / "root", {"red/a.png": "red"})
    found = open_folder(root, ["red", "../out", str(tmp_path / "out")])
    assert [path.parent.name for path in found.paths] == ["red"]


def test_what_is_passed_over_is_told(tmp_path, caplog):
    root = write(
        tmp_path,
        {
            "red/a.png": "red",
            "red/.thumbnails/a.png": "red",
            "red/deep/.a.png": "red",
            "red/scan.jfif": b"",
            "beside.png": "red",
            "readme.txt": b"",
            "blue/b.png": "blue",
        },
    )
    found = open_folder(root)
    assert [path.name for path in found.paths] == ["b.png", "a.png"]
    assert "or no pictures by their ending: 2 (beside.png, red/scan.jfif)" in caplog.text


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Cat", "cat"], "'Cat' = 'cat' (classes 0, 1)"),
        (["sea  lion", "sea lion"], "'sea  lion' = 'sea lion' (classes 0, 1)"),
        (["cats &amp; dogs", "cats & dogs"], "'cats &amp; dogs' = 'cats & dogs' (classes 0, 1)"),
        (["caf\u00e9", "cafe\u0301"], " (classes 0, 1)"),
        (["Cat", "cats"], ""),
    ],
)
def test_names_that_are_equal_to_the_text_tower_are_told(tmp_path, caplog, names, said):
    root = write(tmp_path, {"n1/a.png": "red", "n2/a.png": "blue"})
    assert open_folder(root, names, by_position=True).names == tuple(names)
    assert ("no prompt can tell apart" in caplog.text) == bool(said)
    assert said in caplog.text


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("caf\u00e9", "cafe\u0301"),
        ("CAFE\u0301_bar", "caf\u00e9 bar"),
        ("A\u030angstrom", "\u212bngstrom"),
    ],
)
def test_accents_match_however_they_are_composed(tmp_path, folder, name):
    root = write(tmp_path, {f"{folder}/a.png": "red", "b/a.png": "blue"})
    found = open_folder(root, {"b": "bar", name: "a place"})
    assert dict(zip(found.classes, found.names, strict=True)) == {"b": "bar", folder: "a place"}
    assert sorted(open_folder(root, [name, "b"]).labels.tolist()) == [0, 1]


def test_folders_that_differ_in_how_they_are_composed_need_a_name_each(tmp_path):
    folders = ["cafe\u0301", "caf\u00e9"]
    root = write(tmp_path, {f"{folder}/a.png": "red" for folder in folders})
    assert open_folder(root, dict.fromkeys(folders, "x")).classes == tuple(folders)
    with pytest.raises(ValueError, match="1 folders have none: cafe\u0301"):
        open_folder(root, ["caf\u00e9"])
