"""The input benchmark on a few pictures. Rates are reported, never asserted."""

import json

import pytest
from tiny_run import SMALL, tiny_models  # noqa: F401 (a fixture)

from protoclip_jax.benchmark import input as module
from protoclip_jax.benchmark.__main__ import main

OPTIONS = SMALL | {"optimizer.batch": "16", "data.teacher": "none", "objective.external": "0"}


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_prints_rates_and_the_share_of_waiting(capsys):
    overrides = [f"--config.{name}={value}" for name, value in OPTIONS.items()]
    command = ("input", "--pictures=64", "--workers=1", "--repeats=1", *overrides)
    assert main((*command, "--json")) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["pictures"] == 64
    assert numbers["images_per_cpu_second"].keys() == {"Pillow", "list", "records"}
    for name, ratio in numbers["ratio_to_pillow"].items():
        rates = numbers["images_per_cpu_second"]
        assert ratio == pytest.approx(rates[name] / rates["Pillow"])
    assert numbers["workers"]["1"].keys() == {"Pillow", "list", "records"}
    training = numbers["training"]
    assert training["batch"] == 16
    assert 0 <= training["input_wait_share"] <= 1


def test_pictures_cost_what_photographs_do(tmp_path):
    paths = module.write_pictures(tmp_path, 3)
    assert len(set(paths)) == 3
    for path in paths:
        assert 20_000 < path.stat().st_size < 60_000  # Conceptual Captions at 480 x 360


def test_both_sides_make_as_many_pixels(tmp_path):
    paths = module.write_pictures(tmp_path, 32)
    source = module.open_source(str(tmp_path / "pairs.tsv"))
    assert module.read_all(source) == module.with_pillow(paths) == 32 * 224 * 224 * 3


def test_numbers_of_workers():
    assert module._counts(1) == [1]
    assert module._counts(2) == [1, 2]
    assert module._counts(6) == [1, 2, 4, 6]
