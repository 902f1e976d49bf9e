"""`episode` of the check: extraction, waits for input and memory of the paper's episode."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax

from protoclip_jax.benchmark import input as input_benchmark
from protoclip_jax.benchmark import machine
from protoclip_jax.benchmark.check_plan import ROOT, Save, Settings
from protoclip_jax.benchmark.short_runs import short
from protoclip_jax.recipe import configured
from protoclip_jax.training.reporter import memory

RECIPE = "configs/cc3m_single_gpu.py"
# The paper's batch and prototypes, and as few pairs as can form these; few files, read again and
# again, since making them takes longer than decoding them.
FULL = {"optimizer.batch": "512", "episode.size": "20480", "optimizer.warmup_steps": "1"}
FILES = 96
SMALL = {
    "model.name": "tiny-rn",
    "model.dtype": "float32",
    "model.projection_hidden": "64",
    "model.projection_width": "32",
    "data.keep_side": "64",
    "optimizer.batch": "16",
    "optimizer.warmup_steps": "1",
    "episode.size": "64",
    "episode.prototypes": "16",
}
SMALL_FILES = 16


def run(settings: Settings, save: Save) -> dict[str, Any]:
    """Trains two episodes from images on the disk; the second is reported."""
    small, devices = settings.small, jax.device_count()
    overrides = [f"--config.{path}={text}" for path, text in (SMALL if small else FULL).items()]
    config = short(configured(str(ROOT / RECIPE), overrides, devices), 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        input_benchmark.write_pictures(folder, SMALL_FILES if small else FILES)
        numbers: dict[str, Any] = {
            "model": config.model.name,
            "batch": config.optimizer.batch,
            "pairs": config.episode.size,
            "prototypes": config.episode.prototypes,
        }
        data = dataclasses.replace(config.data, workers=min(16, max(1, machine.cores() - 1)))
        config = dataclasses.replace(config, data=data)
        numbers["workers"] = data.workers
        for seconds, found in input_benchmark.episodes_on_images(config, folder):
            numbers |= {
                "seconds": seconds,
                "extracted_per_second": config.extracted / seconds["extract"],
                "trained_per_second": config.episode.size / seconds["train"],
                "input_wait_share": found["seconds/input_wait"] / seconds["train"],
                "episodes": numbers.get("episodes", 0) + 1,
            }
            peaks = memory()
            numbers["host_gb"] = peaks["memory/host_gb"]
            numbers["device_gb"] = peaks.get("memory/device_gb")
            save(numbers)
    return numbers
