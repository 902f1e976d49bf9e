"""Which evaluations of a run stand in its table, and whether one is still missing."""

import json

import jax
import pytest
from flax import nnx
from tiny_run import MODELS, small_config

from protoclip_jax.evaluation import suite
from protoclip_jax.training import evaluator
from protoclip_jax.training.state import make_mesh

MODEL, GRAPHDEF = MODELS["test-vit"], nnx.split(nnx.Dict())[0]
LINES = [
    {"step": 0, "episode": 0, "phase": "untrained", "zero_shot/top1": 1.25},
    {"step": 3, "episode": 0, "phase": "warmup", "train/loss/total": 3.5},
    {"step": 3, "episode": 0, "phase": "warmup", "zero_shot/top1": 4.75},
    {"step": 6, "episode": 1, "phase": "prototype", "zero_shot/top1": 9.5},
    {"step": 6, "episode": 1, "phase": "prototype", "seconds/train": 2.5},
]


@pytest.fixture
def made(monkeypatch):
    """An evaluator of a suite of which only the chance levels are asked."""
    monkeypatch.setattr(evaluator, "EmojiText", lambda split: split)
    monkeypatch.setattr(suite, "chance", lambda train, test, val: {"zero_shot/top1": 0.625})

    def make(name: str):
        config = small_config("pairs.tsv", evaluation__suite=name)
        return evaluator.Evaluator(config, MODEL, GRAPHDEF, make_mesh())

    return make


@pytest.fixture
def workdir(tmp_path):
    lines = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "metrics.jsonl").write_text(lines)
    return tmp_path


def test_table_has_the_first_and_the_newest_evaluation(made, workdir):
    table = made("emoji_text").table(workdir)
    assert table.splitlines()[0].split() == ["untrained", "trained", "chance"]
    (row,) = [line for line in table.splitlines() if "top 1" in line]
    assert row.split()[-6::2] == ["1.25", "9.50", "0.62"]


@pytest.mark.parametrize(
    ("lines", "titles", "cells"),
    [
        (LINES[3:], ["trained"], ["9.50"]),  # of a log that was removed during the run
        (LINES[2:], ["trained"], ["9.50"]),
        (LINES[:1], ["untrained"], ["1.25"]),
        (LINES[:1] * 2 + LINES[3:4], ["untrained", "trained"], ["1.25", "9.50"]),
    ],
)
def test_only_step_0_is_untrained(made, tmp_path, lines, titles, cells):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    table = made("emoji_text").table(tmp_path)
    assert table.splitlines()[0].split() == [*titles, "chance"]
    (row,) = [line for line in table.splitlines() if "top 1" in line]
    assert row.split()[-2 * len(titles) - 2 :: 2] == [*cells, "0.62"]


def test_a_step_is_measured_where_its_evaluation_is_logged(made, workdir):
    found = made("emoji_text")
    assert [found.measured(workdir, step) for step in (0, 3, 5, 6, 9)] == [
        True, True, False, True, False,
    ]  # fmt: skip


def test_without_a_suite_nothing_is_missing_and_there_is_no_table(made, workdir, tmp_path):
    found = made("")
    assert found.measured(workdir, 5)
    assert found.table(workdir) is None
    assert found.measure({}, {}) == {}
    assert made("emoji_text").table(tmp_path / "nothing") is None


def test_features_come_from_the_model_as_it_stands(made, monkeypatch):
    """The encoder is kept between evaluations, and its weights are not."""
    seen = []

    class Encoder:
        def __init__(self, model, graphdef, params, stats, *, sizes, rows):
            assert (model, graphdef, sizes) == (MODEL, GRAPHDEF, (256,))
            assert rows.num_devices == jax.device_count()

    def features(encoder, train, test, val, labels, settings):
        seen.append((encoder.params, encoder.batch_stats, train, test, val))
        return len(seen)

    monkeypatch.setattr(evaluator, "Encoder", Encoder)
    monkeypatch.setattr(suite.Labels, "of", lambda *_: "labels")
    monkeypatch.setattr(suite.Features, "of", features)
    monkeypatch.setattr(suite, "measure", lambda found, *_: {"zero_shot/top1": float(found)})
    found = made("emoji_text")
    values = [found.measure({"w": number}, {"s": number}) for number in (1, 2)]
    assert values == [{"zero_shot/top1": 1.0}, {"zero_shot/top1": 2.0}]
    splits = ("train", "test", "val")
    assert seen == [({"w": 1}, {"s": 1}, *splits), ({"w": 2}, {"s": 2}, *splits)]
