"""`input`: reading, decoding and cropping pictures, against plain Pillow in the same run."""

import argparse
import contextlib
import dataclasses
import functools
import io
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from protoclip_jax.benchmark import arguments, machine, timing
from protoclip_jax.benchmark.report import RULE, Report, number, say
from protoclip_jax.benchmark.short_runs import as_clip, short
from protoclip_jax.config import Config
from protoclip_jax.config_checks import check
from protoclip_jax.data.augmentation import augmentation_named
from protoclip_jax.data.kept import Keep
from protoclip_jax.data.pipeline import Batches
from protoclip_jax.data.reader import Reading
from protoclip_jax.data.sources import PairSource, open_source
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.data.walk import Section, Walk
from protoclip_jax.prepare.convert import ConvertSettings, convert
from protoclip_jax.training.loop import Trainer
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.stopwatch import Stopwatch

WIDTH, HEIGHT, SIDE = 480, 360, 224
_BATCH = 32
_QUALITY = 90


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `input`."""
    arguments.add_recipe(parser)
    parser.add_argument(
        "--pictures", type=arguments.above_zero, default=512, help="made up; default: 512"
    )
    parser.add_argument(
        "--workers",
        type=arguments.above_zero,
        default=machine.cores(),
        help="most worker processes; default: as many as cores",
    )
    parser.add_argument("--repeats", type=arguments.above_zero, default=3, help="default: 3")


def run(options: argparse.Namespace) -> Report:
    """Measures one core, then workers, then a recipe's training on the same pictures."""
    config = arguments.recipe(options, jax.device_count())
    count = max(2 * _BATCH, options.pictures // _BATCH * _BATCH)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say(f"input: making {count} pictures")
        paths = write_pictures(folder, count)
        sources = {
            "list": open_source(str(folder / "pairs.tsv")),
            "records": _converted(folder),
        }
        say(f"input: {options.repeats} alternating repeats on one core")
        one_core = {"Pillow": timing.Timed(functools.partial(with_pillow, paths))}
        one_core |= {
            name: timing.Timed(functools.partial(read_all, source))
            for name, source in sources.items()
        }
        times = timing.alternating(one_core, options.repeats)
        rates = {name: count / seconds.cpu for name, seconds in times.items()}
        scaling = {}
        for workers in _counts(options.workers):
            say(f"input: {workers} worker processes")
            scaling[workers] = {"Pillow": pillow_rate(paths, workers, options.repeats)}
            scaling[workers] |= {
                name: worker_rate(source, workers, options.repeats)
                for name, source in sources.items()
            }
        say("input: a training that reads them")
        waited = training_wait(config, folder, count)
    numbers = {
        "machine": machine.describe(),
        "pictures": count,
        "images_per_cpu_second": rates,
        "ratio_to_pillow": {name: rates[name] / rates["Pillow"] for name in sources},
        "workers": scaling,
        "config": options.config,
        "model": config.model.name,
        "training": waited,
    }
    return _report(numbers, options)


def write_pictures(folder: Path, count: int) -> list[Path]:
    """JPEG files like photographs, as far as decoding is concerned, and a list of them."""
    rng = np.random.default_rng(0)
    lines, paths = ["filepath\ttitle"], []
    for index in range(count):
        path = folder / f"{index:06}.jpg"
        _picture(rng).save(path, "JPEG", quality=_QUALITY)
        lines.append(f"{path.name}\tpicture {index}: a dog and two children by a lake in the sun")
        paths.append(path)
    (folder / "pairs.tsv").write_text("\n".join(lines) + "\n")
    return paths


def _picture(rng: np.random.Generator) -> Image.Image:
    """Noise at every scale, stronger at the large ones: the spectrum of natural pictures."""
    pixels = rng.normal(0, 0.6, (HEIGHT, WIDTH, 3))
    for scale in (2, 4, 8, 16, 32, 64, 128):
        coarse = rng.normal(0, scale**0.8, (HEIGHT // scale + 2, WIDTH // scale + 2, 3))
        for channel in range(3):
            layer = Image.fromarray(coarse[:, :, channel].astype(np.float32))
            layer = layer.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            pixels[:, :, channel] += np.asarray(layer)
    pixels = 128 + 50 * (pixels - pixels.mean()) / pixels.std()
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _converted(folder: Path) -> PairSource:
    out = folder / "records"
    with contextlib.redirect_stdout(sys.stderr):
        convert(open_source(str(folder / "pairs.tsv")), out, ConvertSettings(), progress=False)
    return open_source(str(out))


def with_pillow(paths: list[Path]) -> int:
    """The peer: what a plain loader does for each picture, one after the other."""
    total = 0
    for path in paths:
        image = Image.open(io.BytesIO(path.read_bytes())).convert("RGB")
        width, height = image.size
        scale = SIDE / min(width, height)
        image = image.resize(
            (round(width * scale), round(height * scale)), Image.Resampling.BICUBIC
        )
        left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
        total += np.asarray(image.crop((left, top, left + SIDE, top + SIDE))).size
    return total


def pillow_rate(paths: list[Path], processes: int, repeats: int) -> float:
    """Pictures a second by the peer in processes that share nothing: what this machine allows."""
    parts = [paths[first::processes] for first in range(processes)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(with_pillow, parts))  # all of them run
        start = time.perf_counter()
        for _ in range(repeats):
            list(pool.map(with_pillow, parts))
        return repeats * len(paths) / (time.perf_counter() - start)


def read_all(source: PairSource) -> int:
    """Every batch of one training pass by one thread: pictures, captions and tokens."""
    with _batches(source, len(source), workers=0) as batches:
        return sum(batch["image"].size for batch in batches)


def worker_rate(source: PairSource, workers: int, repeats: int) -> float:
    """Pictures a second by worker processes, once all of them run at their usual speed."""
    # The first second of a process is slow, and some batches are ready when the clock starts.
    skipped = 16 * workers
    positions = _BATCH * (skipped + 4 * repeats * len(source) // _BATCH)
    with _batches(source, positions, workers) as batches:
        for _ in range(skipped):
            next(batches)
        start = time.perf_counter()
        measured = sum(1 for _ in batches)
        return measured * _BATCH / (time.perf_counter() - start)


def _batches(source: PairSource, positions: int, workers: int) -> Batches:
    reading = Reading(
        source=source,
        tokenizer=Tokenizer(),
        rows_of_episode=functools.partial(_rows, len(source), positions),
        size=positions,
        seed=0,
        image_size=SIDE,
        augmentation={"train": augmentation_named("clip")},
        parity=False,
        keep=Keep(),
    )
    walk = Walk([Section("train", 0, positions)], _BATCH, workers=workers)
    return Batches(walk, reading, workers=workers, threads=1)


def _rows(rows: int, positions: int, episode: int) -> np.ndarray:
    return np.arange(positions, dtype=np.int64) % rows


def training_wait(config: Config, folder: Path, count: int) -> dict[str, Any]:
    """Trains two episodes of a recipe on the pictures; the share of time without input."""
    parts, batch = dataclasses.replace, config.optimizer.batch
    config = as_clip(short(config, 2))
    config = parts(
        config,
        data=parts(config.data, workers=max(1, machine.cores() - 1)),
        episode=parts(config.episode, size=max(batch, count // batch * batch)),
    )
    *_, (parts_of_last, found) = episodes_on_images(config, folder)
    seconds = parts_of_last["train"]
    return {
        "batch": batch,
        "workers": config.data.workers,
        "images_per_second": config.episode.size / seconds,
        "input_wait_share": found["seconds/input_wait"] / seconds,
    }


def episodes_on_images(
    config: Config, folder: Path
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """Trains the episodes of a recipe on the images in a folder, its pairs.tsv.

    Yields:
      Seconds of each part of an episode, and what there is to log. The first episode starts the
      workers and compiles (which is no part).
    """
    parts = dataclasses.replace
    source = str(folder / "pairs.tsv")
    rows = len(open_source(source))
    config = parts(
        config,
        data=parts(config.data, train=source, teacher=None, limit=None),
        episode=parts(config.episode, replacement=config.episode.size > rows),
    )
    check(config, jax.device_count())
    trainer = Trainer(config, folder / "run")
    try:
        with trainer.input.batches() as trainer.batches:
            for episode in range(config.episode.count):
                clock = Stopwatch()
                found, _ = trainer.train_episode(episode, phase_of(config, episode), clock)
                yield clock.seconds, found
    finally:
        trainer.close()


def _counts(most: int) -> list[int]:
    """1, 2, 4, ... and the last."""
    doubled = [2**power for power in range(most.bit_length()) if 2**power < most]
    return [*doubled, most]


def _report(numbers: dict[str, Any], options: argparse.Namespace) -> Report:
    names = ["Pillow", "list", "records"]
    rates, ratios = numbers["images_per_cpu_second"], numbers["ratio_to_pillow"]
    rows = [
        ("images a CPU second, one core", [number(rates[name]) for name in names]),
        ("times Pillow's", ["", *(number(ratios[name]) for name in names[1:])]),
        RULE,
    ]
    for workers, found in numbers["workers"].items():
        label = f"images a second, {workers} worker{'s' if workers > 1 else ''}"
        rows.append((label, [number(found[name]) for name in names]))
    training = numbers["training"]
    return Report(
        [
            f"{numbers['pictures']} JPEG pictures of {WIDTH} x {HEIGHT} to {SIDE}, "
            f"{options.repeats} alternating repeats, medians",
            machine.line(numbers["machine"]),
        ],
        names,
        rows,
        [
            "Pillow: open, resize, crop. Ours: whole batches, with checks, random crops, tokens.",
            f"records: what `prepare convert` makes of the list, shorter side "
            f"{ConvertSettings().side}.",
            f"Training CLIP, {numbers['model']} with batch {training['batch']} and "
            f"{training['workers']} worker(s), from the list: "
            f"{number(training['images_per_second'])} images a second; devices waited for input "
            f"{training['input_wait_share']:.1%} of the time.",
        ],
        numbers,
    )
