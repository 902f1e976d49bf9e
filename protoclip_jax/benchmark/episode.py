"""`episode`: what ProtoCLIP costs over CLIP with the same model, batch and pairs."""

import argparse
import dataclasses
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from protoclip_jax.benchmark import arguments, machine, timing
from protoclip_jax.benchmark.report import RULE, Report, number, say
from protoclip_jax.config import Config, check
from protoclip_jax.training.loop import Trainer
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.stopwatch import Stopwatch

PARTS = ("sample", "extract", "cluster", "back-translate", "train")
_CAPTION = 20  # tokens of a caption; training cuts what is padding in all of a batch
_DISTINCT = 4  # batches held in memory; their pictures take turns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `episode`."""
    arguments.add_recipe(parser)
    parser.add_argument(
        "--online",
        type=float,
        default=0.25,
        help="share of an episode that online assignment extracts; default: 0.25",
    )
    parser.add_argument("--repeats", type=arguments.above_zero, default=3, help="default: 3")


def run(options: argparse.Namespace) -> Report:
    """Trains episodes of CLIP, offline and online ProtoCLIP in turns, by the trainer itself."""
    config = arguments.recipe(options, jax.device_count())
    recipes = contenders(config, options.online, options.repeats)
    found = machine.describe()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: EpisodeRun(one, Path(folder) / name) for name, one in recipes.items()}
        try:
            for name, one in runs.items():
                say(f"episode: compiling and warming up {name}")
                one()
            say(f"episode: {options.repeats} alternating repeats")
            # The median of each part on its own: an episode is long, and noise hits one part.
            timing.alternating(runs, options.repeats)
        finally:
            for one in runs.values():
                one.close()
    parts = {name: one.medians() for name, one in runs.items()}
    totals = {name: sum(seconds.values()) for name, seconds in parts.items()}
    numbers = {
        "machine": found,
        "config": options.config,
        "model": config.model.name,
        "dtype": config.model.dtype,
        "batch": config.optimizer.batch,
        "pairs": config.episode.size,
        "prototypes": {name: recipes[name].episode.prototypes for name in ("offline", "online")},
        "online": options.online,
        "seconds": parts,
        "offline_cost_ratio": totals["offline"] / totals["clip"],
        "online_cost_ratio": totals["online"] / totals["clip"],
    }
    return _report(numbers, options)


def contenders(config: Config, online: float, repeats: int) -> dict[str, Config]:
    """Recipes of the three, for the same pairs: every episode is a prototype one, and no input.

    Online assignment clusters a sample of a longer episode, so its prototypes are fewer by as
    much: points per prototype stay as they are.

    Raises:
      ConfigError: `online` cannot be used with the recipe.
    """
    parts = dataclasses.replace
    base = parts(
        config,
        episode=parts(
            config.episode, count=repeats + 2, warmup=0, locked=0, replacement=True, online=None
        ),
        optimizer=parts(
            config.optimizer, warmup_steps=1, text_start_episode=0, text_end_episode=None
        ),
        evaluation=parts(config.evaluation, suite=""),
        log=parts(config.log, tensorboard=False, progress=False, wandb_project=None),
    )
    plain = parts(
        base,
        model=parts(base.model, projection=None),
        objective=parts(base.objective, external=0.0),
    )
    fewer = max(1, round(online * base.episode.prototypes))
    sampled = parts(base, episode=parts(base.episode, online=online, prototypes=fewer))
    recipes = {"clip": plain, "offline": base, "online": sampled}
    for one in recipes.values():
        check(one, jax.device_count())
    return recipes


class EpisodeRun:
    """A trainer whose batches come from memory; each call trains one more episode."""

    def __init__(self, config: Config, workdir: Path):
        self._trainer = Trainer(config, workdir)
        self._trainer.batches = MemoryBatches(config, self._trainer)
        self._parts: list[dict[str, float]] = []
        self._episode = 0

    def __call__(self) -> timing.Seconds:
        """Trains an episode, compilation not counted."""
        clock, phase = Stopwatch(), phase_of(self._trainer.config, self._episode)
        self._trainer.train_episode(self._episode, phase, clock)
        self._episode += 1
        self._parts.append({name: s for name, s in clock.seconds.items() if name in PARTS})
        return timing.Seconds(sum(self._parts[-1].values()), 0.0)

    def medians(self) -> dict[str, float]:
        """Median seconds of each part; the first episode was the warm-up."""
        return {
            name: float(np.median([parts[name] for parts in self._parts[1:]]))
            for name in self._parts[0]
        }

    def close(self) -> None:
        """Releases what the trainer holds open."""
        self._trainer.close()


class MemoryBatches(Iterator[dict]):
    """Batches as the pipeline makes them, of noise, already in memory."""

    roomless = 0

    def __init__(self, config: Config, trainer: Trainer):
        rng, rows = np.random.default_rng(0), config.optimizer.batch
        side, text = trainer.model.vision.image_size, trainer.model.text
        tokens = np.zeros((rows, text.context_length), np.int32)
        tokens[:, :_CAPTION] = rng.integers(1, text.vocab_size - 1, (rows, _CAPTION), np.int32)
        tokens[:, _CAPTION - 1] = text.vocab_size - 1  # the end token has the largest id
        self._batches = [
            {
                "image": rng.integers(0, 256, (rows, side, side, 3), np.uint8),
                "tokens": tokens,
                "row": rng.integers(0, len(trainer.input.source), rows),
            }
            for _ in range(_DISTINCT)
        ]
        self._positions = itertools.cycle(self._order(config))
        self._number = 0

    @staticmethod
    def _order(config: Config) -> list[np.ndarray]:
        """Positions of every batch of an episode, extraction before training."""
        rows, steps = config.optimizer.batch, config.steps_per_episode
        extracted = -(-config.extracted // rows) if len(config.prototype_episodes) else 0
        starts = [*range(extracted), *range(steps)]
        return [np.arange(start * rows, (start + 1) * rows) for start in starts]

    def __next__(self) -> dict[str, Any]:
        self._number += 1
        batch = self._batches[self._number % _DISTINCT]
        return batch | {"position": next(self._positions)}


def _report(numbers: dict[str, Any], options: argparse.Namespace) -> Report:
    seconds = numbers["seconds"]
    names = list(seconds)
    totals = {name: sum(parts.values()) for name, parts in seconds.items()}
    rows = [(f"{part}, s", [number(seconds[n].get(part)) for n in names]) for part in PARTS]
    rows += [
        RULE,
        ("whole episode, s", [number(totals[name]) for name in names]),
        ("cost, times CLIP's", [number(totals[name] / totals["clip"]) for name in names]),
    ]
    clusters = numbers["prototypes"]
    return Report(
        [
            f"{numbers['model']} in {numbers['dtype']}, batch {numbers['batch']}, of "
            f"{numbers['config']}; episodes of {numbers['pairs']:,} pairs from memory, "
            f"{options.repeats} alternating repeats, medians",
            machine.line(numbers["machine"]),
        ],
        ["CLIP", "offline", f"online {numbers['online']:g}"],
        rows,
        [
            f"{clusters['offline']:,} prototypes in each modality offline, {clusters['online']:,} "
            "online. Compilation is not counted.",
            "Goals: offline 1.42 (floor 1.33: one more forward), online 1.10.",
        ],
        numbers,
    )
