"""Values of command lines, in every command that takes them."""

import argparse
from pathlib import Path

import pytest

from protoclip_jax import evaluate, teacher
from protoclip_jax.data import emoji_text, typed_values
from protoclip_jax.data.sentence_encoders import open_encoder
from protoclip_jax.prepare import __main__ as prepare

COMMANDS = {
    "evaluate": evaluate.build_parser,
    "teacher": teacher.build_parser,
    "prepare": prepare.build_parser,
}
# What each needs before an option, and its options that are paths.
REQUIRED = {
    "evaluate": ["--workdir=x"],
    "teacher": ["x", "--out=y"],
    "download": ["download", "x", "--out=y"],
    "convert": ["convert", "x", "--out=y"],
    "stats": ["stats", "x"],
}
PATHS = {
    "evaluate": ["workdir", "source", "folder", "train-folder", "names", "image-root"],
    "teacher": ["out", "pca", "image-root"],
    "download": ["out", "photo-ids", "img2dataset-python"],
    "convert": ["out", "image-root"],
    "stats": ["json", "image-root"],
}


def parsed(command: str, *words: str) -> argparse.Namespace:
    build = COMMANDS.get(command, prepare.build_parser)
    return build().parse_args([*REQUIRED[command], *words])


@pytest.mark.parametrize(
    ("command", "option"), [(command, option) for command in PATHS for option in PATHS[command]]
)
def test_home_folder_in_every_path_option(command, option, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    found = getattr(parsed(command, f"--{option}=~/a/b"), option.replace("-", "_"))
    assert str(found) == "/home/of/somebody/a/b"
    with pytest.raises(SystemExit, match="2"):
        parsed(command, f"--{option}=~nobody-here/a")
    assert "~nobody-here/a: there is no home folder ~nobody-here: write it out" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("command", ["teacher", "download", "convert", "stats"])
def test_home_folder_in_the_source(command, monkeypatch):
    monkeypatch.setenv("HOME", "/home/of/somebody")
    words = [word.replace("x", "~/a.tsv") if word == "x" else word for word in REQUIRED[command]]
    options = COMMANDS.get(command, prepare.build_parser)().parse_args(words)
    found = options.list if command == "download" else options.source
    assert found == "/home/of/somebody/a.tsv"


def test_no_path_option_was_forgotten():
    """An option that takes a text is one of these, or a path; a new one has to be put here."""
    texts = {
        "image-column", "caption-column", "url-column", "separator", "split", "image-feature",
        "text-feature", "encoder", "dtype", "encoding", "prompts", "template", "help", "list",
        "source", "img2dataset_python",
    }  # fmt: skip
    kinds = (typed_values.above_zero, typed_values.not_negative)
    for command, required in REQUIRED.items():
        parser = COMMANDS.get(command, prepare.build_parser)()
        if command not in COMMANDS:
            (choices,) = (a.choices for a in parser._actions if isinstance(a.choices, dict))
            parser = choices[required[0]]
        for action in parser._actions:
            names = {name.lstrip("-") for name in action.option_strings} or {action.dest}
            if action.nargs == 0 or action.type in kinds:
                continue
            assert names & (texts | set(PATHS[command])), (command, names)


def test_home_folder_of_an_encoder_and_of_the_builder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/bert/config.json"):
        open_encoder("bert:~/bert")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/pairs.tsv"):
        emoji_text.main(["--pairs=~/pairs.tsv", "--images=~/i.zip", "--out=~/out"])


def test_literal_tilde_that_is_there_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("~odd-name").mkdir()
    assert typed_values.place("~odd-name") == "~odd-name"
    assert typed_values.place("a/~/b") == "a/~/b"
    assert typed_values.place("gs://~/b") == "gs://~/b"
    assert typed_values.path("") == Path()


@pytest.mark.parametrize("command", ["evaluate", "teacher", "download", "convert", "stats"])
def test_tab_as_a_shell_gives_it(command):
    assert parsed(command, "--separator=\\t").separator == "\t"
    assert parsed(command, "--separator", "\\t").separator == "\t"
    assert parsed(command, "--separator=;").separator == ";"


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("evaluate", "batch", "0"),
        ("evaluate", "limit", "-3"),
        ("evaluate", "seed", "-1"),
        ("teacher", "dimensions", "0"),
        ("teacher", "fit", "-1"),
        ("teacher", "limit", "nan"),
        ("download", "threads", "0"),
        ("download", "timeout", "inf"),
        ("download", "retries", "-1"),
        ("download", "side", "-1"),
        ("convert", "side", "-1"),
        ("convert", "shard-rows", "0"),
        ("convert", "workers", "0"),
        ("convert", "quality", "1.5"),
        ("stats", "workers", "-2"),
    ],
)
def test_numbers_out_of_bounds_are_refused_with_the_option(command, option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        parsed(command, f"--{option}={value}")
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"--{option}: {value}: a whole number" in last


def test_share():
    assert typed_values.share("0.25") == 0.25
    assert typed_values.share("1") == 1.0
    for text in ("0", "-1", "1.01", "nan", "inf", "half"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text}: a share"):
            typed_values.share(text)


def test_words_that_are_no_option_are_refused(capsys):
    for command, word in (
        ("evaluate", "—source=x"),
        ("evaluate", "x.tsv"),
        ("teacher", "\u2013out=z"),
        ("stats", "source=x"),
        ("convert", "--optimizer.batch=3"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parsed(command, word)
        assert f"unrecognized arguments: {word}" in capsys.readouterr().err
