"""A whole run in seconds: a few pictures, a model of one block, two or three steps an episode."""

import dataclasses
import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from protoclip_jax.models import presets
from protoclip_jax.recipe import apply_override, defaults, load_recipe, resolve

CONFIGS = Path(__file__).parent.parent / "configs"
TEXT = presets.TextConfig(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
# Few blocks: what these tests wait for is the compiler.
MODELS = {
    "test-vit": presets.CLIPConfig(16, presets.ViTConfig(32, 16, 32, 1, 2), TEXT, "quickgelu"),
    "test-rn": presets.CLIPConfig(16, presets.ResNetConfig((1, 1, 1, 1), 8, 32), TEXT, "quickgelu"),
}
SMALL = {
    "model.name": "test-vit",
    "model.projection_hidden": "24",
    "model.projection_width": "12",
    "model.dtype": "float32",
    "data.workers": "0",
    "data.threads": "2",
    "episode.size": "24",
    "episode.prototypes": "6",
    "optimizer.batch": "8",
    "optimizer.warmup_steps": "2",
    "log.every": "2",
}


@pytest.fixture
def tiny_models(monkeypatch):
    """Presets "test-vit" and "test-rn"."""
    for name, config in MODELS.items():
        monkeypatch.setitem(presets.PRESETS, name, config)


def write_pairs(folder: Path, count: int = 40, seed: int = 0) -> Path:
    """A pair list with `count` noisy pictures and captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines = ["filepath\ttitle"]
    for row in range(count):
        pixels = rng.integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{row}.png")
        lines.append(f"{row}.png\tpicture number {row} of kind {row % 5}")
    path = folder / "pairs.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def small_config(pairs: Path, recipe=None, num_devices: int = 1, **overrides):
    """A shrunken recipe on a pair list; overrides as section__name=value."""
    recipe = defaults() if recipe is None else load_recipe(str(CONFIGS / recipe))
    settings = SMALL | {"data.train": str(pairs)}
    settings |= {path.replace("__", "."): str(value) for path, value in overrides.items()}
    for path, text in settings.items():
        apply_override(recipe, path, text)
    with mock.patch.dict(presets.PRESETS, MODELS):  # the fixture is for those who build the model
        return resolve(recipe, num_devices)


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def final_state(config, workdir: Path):
    """Parameters and everything else as a run left them."""
    import jax

    from protoclip_jax.training import loop

    trainer = loop.Trainer(config, workdir)
    try:
        return jax.device_get(trainer.state)
    finally:
        trainer.close()


TIMED = ("seconds/", "share/", "speed/", "memory/")


def untimed(line: dict) -> dict:
    """A line of metrics without what differs from run to run."""
    return {name: x for name, x in line.items() if not name.startswith(TIMED)}


def with_count(config, count: int):
    """The same recipe with another number of episodes."""
    return dataclasses.replace(config, episode=dataclasses.replace(config.episode, count=count))
