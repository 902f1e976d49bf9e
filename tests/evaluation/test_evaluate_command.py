import json
import os
import sys

import numpy as np
import pytest
from evaluation_fakes import COLOURS, FakeEncoder, FakeSource

from protoclip_jax import evaluate
from protoclip_jax.data import emoji_text
from protoclip_jax.evaluation import folders, suite
from protoclip_jax.storage.screen import CUT


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A run whose model is a fake one."""
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr(evaluate, "_load", lambda path: FakeEncoder())
    return folder


@pytest.fixture
def classes(tmp_path):
    for name in COLOURS:
        (tmp_path / "classes" / name).mkdir(parents=True)
        (tmp_path / "classes" / name / "a.png").write_bytes(FakeSource([name]).read(0)[0])
    return tmp_path / "classes"


def run(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


def test_folder_prints_a_table_and_writes_the_numbers(workdir, classes, capsys):
    assert run(f"--workdir={workdir}", f"--folder={classes}", "--template=only {} here") == 0
    printed = capsys.readouterr().out
    assert "100.00 %" in printed
    assert "12.50 %" in printed
    assert "evaluation.json" in printed
    written = json.loads((workdir / "evaluation.json").read_text())
    assert written[str(classes)]["metrics"]["zero_shot/top1"] == 100
    assert written[str(classes)]["chance"]["zero_shot/top1"] == 12.5


@pytest.mark.parametrize("buffering", [1, -1])  # the table is written at once, or at the end
def test_a_reader_that_has_left_loses_no_evaluation(buffering, workdir, classes, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, open(writer, "w", buffering) as out:
        patch.setattr(sys, "stdout", out)
        assert run(f"--workdir={workdir}", f"--folder={classes}") == CUT
    assert str(classes) in json.loads((workdir / "evaluation.json").read_text())


def test_pair_list_is_evaluated_and_kept_beside_the_rest(workdir, classes, capsys):
    pairs = classes / "pairs.tsv"
    rows = [f"{name}/a.png\tsomething {name}\n" for name in COLOURS]
    pairs.write_text("picture\tcaption\n" + "".join(rows))
    options = (f"--workdir={workdir}", f"--source={pairs}", "--image-column=picture")
    assert run(*options, "--caption-column=caption") == 0
    assert run(f"--workdir={workdir}", f"--folder={classes}") == 0
    written = json.loads((workdir / "evaluation.json").read_text())
    assert set(written) == {str(pairs), str(classes)}
    assert written[str(pairs)]["metrics"]["retrieval/image_to_text_r1"] == 100


SPLITS = {
    "train": FakeSource([*COLOURS] * 6, seed=1),
    "test": FakeSource([*COLOURS], seed=2),
    "val": FakeSource(["red", "green", "blue", "cyan"], seed=3),
}


class Uneven(FakeEncoder):
    """Takes some colours for others, and captions for others again: no two measures are alike."""

    batches: tuple[int, ...] = ()

    def encode_image(self, images):
        self.batches += (len(images),)
        return super().encode_image(images) @ np.float32(np.diag([3, 1, 0.2, 1]))

    def encode_text(self, texts):
        return super().encode_text(texts) @ np.float32(np.diag([1, 0.1, 2, 1]))


def test_emoji_text_is_measured_on_its_splits_beside_the_untrained_model(
    workdir, monkeypatch, capsys
):
    encoder = Uneven()
    monkeypatch.setattr(evaluate, "_load", lambda path: encoder)
    monkeypatch.setattr(emoji_text, "EmojiText", SPLITS.__getitem__)
    untrained = {"step": 0, "zero_shot/top1": 1.25, "retrieval/image_to_text_r1": 2.5}
    (workdir / "metrics.jsonl").write_text(json.dumps(untrained) + "\n")
    assert run(f"--workdir={workdir}", "--batch=3") == 0
    assert max(encoder.batches) == 3
    written = json.loads((workdir / "evaluation.json").read_text())["emoji_text"]
    expected = suite.evaluate(Uneven(), *SPLITS.values())
    assert written["metrics"] == pytest.approx(expected, rel=1e-5)
    assert written["chance"] == suite.chance(*SPLITS.values())
    assert written["chance"]["zero_shot/top1"] == 12.5
    assert written["chance"]["zero_shot_unseen/top1"] == 25
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["untrained", "trained", "chance"]
    rows = [line.split() for line in lines if "unseen artist, top 1" in line]
    value = f"{expected['zero_shot/top1']:.2f}"
    assert [row[-6::2] for row in rows] == [["1.25", value, "12.50"]]


def test_train_folder_is_what_the_probe_is_fitted_on(workdir, tmp_path, monkeypatch):
    """Three pictures a class to fit on, of which green is more often met; one a class to test."""
    monkeypatch.setattr(evaluate, "_load", lambda path: Uneven())
    for split, count in (("train", 3), ("test", 1)):
        for name in list(COLOURS)[:4]:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            number = count + 2 * (name == "green" and split == "train")
            for row, data in enumerate(FakeSource([name] * number, seed=count).pictures):
                (folder / f"{row}.png").write_bytes(data)
    # Only the test split has a class that the other lacks.
    (tmp_path / "test" / "pink").mkdir()
    (tmp_path / "test" / "pink" / "a.png").write_bytes(FakeSource(["pink"]).pictures[0])
    test, train = tmp_path / "test", tmp_path / "train"
    options = (f"--workdir={workdir}", f"--folder={test}", f"--train-folder={train}")
    assert run(*options, "--batch=2") == 0
    written = json.loads((workdir / "evaluation.json").read_text())[str(test)]
    assert written["metrics"]["data/pictures"] == 5
    both = [test, train]
    splits = [folders.open_folder(folder, also=both) for folder in both]
    expected = folders.evaluate_folder(Uneven(), splits[0], train=splits[1])
    assert written["metrics"] == pytest.approx(expected)
    assert written["chance"]["linear_probe/top1"] == 20  # the commonest class of the others
    assert written["chance"]["zero_shot/top1"] == 20


def test_errors_are_one_line_and_exit_code_2(workdir, classes, tmp_path, capsys):
    assert run(f"--workdir={tmp_path / 'absent'}") == 2
    assert run(f"--workdir={workdir}", f"--folder={classes}", "--prompts=cifar11") == 2
    assert run(f"--workdir={workdir}", f"--folder={classes}", "--prompts=cifar10") == 2
    assert run(f"--workdir={workdir}", "--source=nothing") == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 4
    assert all(line.startswith("protoclip_jax: ") for line in lines)
    assert "is not a folder" in lines[0]
    assert "unknown prompt set" in lines[1]
    assert "8 folders have none" in lines[2]
    assert not (workdir / "evaluation.json").exists()


# Of each option that needs something: a value, and command lines in which it cannot act.
FOLDER, LIST, ARRAYS = "--folder=classes", "--source=pairs.tsv", "--source=cc3m_256"
TFDS = "--source=tfds:coco"
IDLE = {
    "train_folder": ("=other", ["", LIST, TFDS]),
    "names": ("=names.json", ["", LIST]),
    "prompts": ("=foo", ["", ARRAYS, f"{FOLDER} --names=n.json --template={{}}"]),
    "template": ("=a photo", ["", LIST]),
    "by_position": ("", ["", LIST, f"{FOLDER}"]),
    "image_column": ("=filepath", ["", FOLDER, ARRAYS, TFDS, "--source=emoji_text/val"]),
    "caption_column": ("=title", ["", FOLDER, ARRAYS, "--source=emoji_text"]),
    "separator": ("=\\t", ["", FOLDER, "--source=a.tar"]),
    "image_root": ("=images", ["", FOLDER, ARRAYS]),
    "split": ("=train", ["", FOLDER, LIST, ARRAYS]),
    "image_feature": ("=image", ["", LIST]),
    "text_feature": ("=caption", ["", LIST]),
    "limit": ("=3", ["", "--source=emoji_text", FOLDER]),
    "seed": ("=0", ["", FOLDER, LIST, f"{FOLDER} --limit=3"]),
}


def options_of_parser() -> list[str]:
    return list(vars(evaluate.build_parser().parse_args(["--workdir=run"])))


def test_every_option_is_known_to_act_always_or_with_something():
    needy = {name for _, _, names in evaluate.ACT_WITH for name in names}
    assert needy == set(IDLE)
    assert sorted(options_of_parser()) == sorted([*evaluate.ACT_ALWAYS, *needy])


@pytest.mark.parametrize(
    ("name", "beside"), [(name, beside) for name, (_, lines) in IDLE.items() for beside in lines]
)
def test_an_option_that_cannot_act_is_refused(name, beside, workdir, capsys):
    """Its default, too, where it is given."""
    option = f"--{name.replace('_', '-')}"
    assert run(f"--workdir={workdir}", *beside.split(), option + IDLE[name][0]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("protoclip_jax: --")
    assert option in line
    assert ": of no effect " in line


@pytest.mark.parametrize(
    "line",
    [
        f"{FOLDER} --train-folder=a --names=b --template={{}} --template=a --by-position",
        f"{FOLDER} --prompts=cifar10 --names=b",
        f"{FOLDER} --prompts=cifar10 --template=a --by-position",
        f"{LIST} --image-column=a --separator=, --image-root=d --limit=3 --seed=0",
        f"{TFDS} --split=test --image-feature=a --text-feature=b --limit=3",
        f"{ARRAYS} --limit=3 --seed=4 --batch=2",
        "--source=GS://BUCKET/PAIRS.CSV --image-column=a",
        "--source=emoji_text --batch=3",
        "",
    ],
)
def test_options_that_act_are_taken(line, monkeypatch, tmp_path, capsys):
    def measure(options):
        raise ValueError("was asked")

    monkeypatch.setattr(evaluate, "measure", measure)
    assert run(f"--workdir={tmp_path}", *line.split()) == 2
    assert capsys.readouterr().err == "protoclip_jax: was asked\n"


@pytest.mark.parametrize("content", ["[1]", "{bad", "", "3", "null", "\xff", "[" * 100_000])
def test_a_damaged_record_is_met_before_the_measurement(content, workdir, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "measure", lambda options: pytest.fail("measured"))
    path = workdir / "evaluation.json"
    path.write_bytes(content.encode("latin-1"))
    assert run(f"--workdir={workdir}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"protoclip_jax: {path} is damaged (")
    assert "move it away" in line
    assert path.read_bytes() == content.encode("latin-1")


def test_untrained_column_is_the_evaluation_at_step_0(workdir):
    assert evaluate.untrained_metrics(workdir) == {}
    lines = [
        {"step": 0, "phase": "start", "loss/clip": 3.0},
        {"step": 0, "zero_shot/top1": 0.5, "geometry/image_std": None},
        {"step": 9, "zero_shot/top1": 4.5},
    ]
    path = workdir / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert evaluate.untrained_metrics(workdir) == {"zero_shot/top1": 0.5}
    path.write_text(json.dumps(lines[2]) + "\n")
    assert evaluate.untrained_metrics(workdir) == {}


def test_values_that_are_not_finite_are_null(workdir):
    path = evaluate.record(workdir, "x", {"a": float("nan"), "b": 1.0}, {})
    assert json.loads(path.read_text()) == {"x": {"metrics": {"a": None, "b": 1.0}, "chance": {}}}


def test_help_shows_the_ways_to_call_it(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for option in (
        "--source",
        "--folder",
        "--train-folder",
        "--names",
        "--prompts",
        "--by-position",
    ):
        assert option in text
