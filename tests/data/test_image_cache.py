"""Which form the image cache takes, what it needs, and what is told."""

import io

import pytest
from PIL import Image
from tiny_run import small_config, tiny_models, write_pairs  # noqa: F401 (a fixture)

from protoclip_jax.data import image_cache
from protoclip_jax.data.image_cache import CachePlan, measured, plan
from protoclip_jax.data.kept import Keep, KeptPairs, Pair
from protoclip_jax.data.sources import open_source
from protoclip_jax.training import loop
from protoclip_jax.training.checkpoint import Checkpoints

EACH = {"pixels": 200_000.0, "jpeg": 50_000.0}


@pytest.mark.parametrize(
    ("wanted", "gigabytes", "form", "needed"),
    [
        ("auto", 0.2, "pixels", 0.2e9),  # just fits
        ("auto", 0.199, "jpeg", 0.05e9),
        ("auto", 0.05, "jpeg", 0.05e9),
        ("auto", 0.01, "jpeg", 0.05e9),  # neither fits: more of the smaller
        ("pixels", 0.01, "pixels", 0.2e9),
        ("jpeg", 4, "jpeg", 0.05e9),
        ("none", 4, "none", 0),
    ],
)
def test_form_by_what_fits(wanted, gigabytes, form, needed):
    found = plan(wanted, 1000, EACH, int(gigabytes * 1e9))
    assert (found.form, found.needed, found.images) == (form, needed, 1000)


def test_pixels_of_tiny_images_may_be_smaller_than_jpeg():
    assert plan("auto", 1000, {"pixels": 100.0, "jpeg": 700.0}, 10).form == "pixels"


def test_both_numbers_and_the_share_are_told(monkeypatch):
    monkeypatch.setattr(image_cache, "free_memory", lambda: None)
    (line,) = CachePlan("pixels", 200_000, int(39.4e9), int(4e9)).lines()
    assert line.startswith(
        "warning: the image cache holds about 10% of an episode's 200,000 images"
    )
    assert "39.4 GB" in line
    assert "data.keep_gigabytes=4." in line
    (line,) = CachePlan("jpeg", 200_000, int(3.9e9), int(4e9)).lines()
    assert line == (
        "image cache: jpeg, about 3.9 GB of data.keep_gigabytes=4 for an episode's 200,000 images"
    )
    assert CachePlan("none", 200_000, 0, int(4e9)).lines() == []


def test_more_than_the_host_has_is_told(monkeypatch):
    monkeypatch.setattr(image_cache, "free_memory", lambda: int(2e9))
    lines = CachePlan("pixels", 10, int(3e9), int(4e9)).lines()
    assert "may take 3 GB, and 2 GB of host memory are free" in lines[1]
    assert len(CachePlan("pixels", 10, int(1e9), int(4e9)).lines()) == 1


def test_free_memory_of_this_machine():
    assert 1e6 < image_cache.free_memory() < 1e14


def test_measured_sizes_are_those_that_the_cache_counts(tmp_path):
    source = open_source(str(write_pairs(tmp_path, 12)))
    (tmp_path / "3.png").write_bytes(b"broken")
    found = measured(source, 24)
    for form, mean in found.items():
        cache, total = KeptPairs(Keep(form, 24, 10**9)), 0
        for row in [row for row in range(12) if row != 3]:
            data, caption = source.read(row)
            image = Image.open(io.BytesIO(data)).convert("RGB")
            cache.put(0, row, Pair(cache.form(image), caption, row))
            total += 1
        assert mean == pytest.approx(cache.bytes / total)
    assert found["pixels"] == 24 * 29 * 3 + 400


@pytest.mark.slow
@pytest.mark.usefixtures("tiny_models")
def test_run_chooses_tells_and_keeps_its_form(tmp_path, capsys):
    """24 images of 48 x 40: 148 kB as pixels, less than 100 as JPEG."""
    pairs = write_pairs(tmp_path / "data")
    settings = {"episode__count": 1, "episode__warmup": 0, "optimizer__warmup_steps": 1}
    small = small_config(pairs, num_devices=8, **settings, data__keep_gigabytes=1e-4)
    large = small_config(pairs, num_devices=8, **settings)
    assert large.data.keep == "auto"
    loop.train(small, tmp_path / "run")
    assert "image cache: jpeg, about" in capsys.readouterr().err
    checkpoints = Checkpoints(tmp_path / "run")
    assert checkpoints.meta(checkpoints.latest())["image_cache"] == "jpeg"
    checkpoints.close()
    # More memory does not change the pixels of a run that has begun.
    trainer = loop.Trainer(large, tmp_path / "run")
    trainer.close()
    assert trainer.cache_form == trainer.meta["image_cache"] == "jpeg"
    fresh = loop.Trainer(large, tmp_path / "fresh")
    fresh.close()
    assert fresh.meta["image_cache"] == "pixels"
