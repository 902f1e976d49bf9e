import json

import pytest
from evaluation_fakes import COLOURS, FakeEncoder, FakeSource

from protoclip_jax import evaluate


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
