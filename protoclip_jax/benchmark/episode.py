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
from protoclip_jax.benchmark.short_runs import as_clip, short
from protoclip_jax.config import Config
from protoclip_jax.config_checks import check
from protoclip_jax.data.typed_values import share
from protoclip_jax.training.loop import Trainer
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.stopwatch import Stopwatch

PARTS = ("sample", "extract", "cluster", "back-translate", "train")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `episode`."""
    arguments.add_recipe(parser)
    parser.add_argument(
        "--online",
        type=share,
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
    base = short(config, repeats + 2)
    fewer, external = (
        max(1, round(online * k)) for k in (base.episode.prototypes, base.external_prototypes)
    )
    sampled = parts(
        base,
        episode=parts(base.episode, online=online, prototypes=fewer, external_prototypes=external),
    )
    recipes = {"clip": as_clip(base), "offline": base, "online": sampled}
    for one in recipes.values():
        check(one, jax.device_count())
    return recipes


class EpisodeRun:
    """A trainer whose batches come from memory; each call trains one more episode."""

    def __init__(self, config: Config, workdir: Path):
        self._trainer = Trainer(config, workdir)
        self._trainer.batches = MemoryBatches(self._trainer)
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
    """The batches of the recipe's first episode, again and again: read once, held in memory."""

    roomless = 0

    def __init__(self, trainer: Trainer):
        config = trainer.config
        count = config.steps_per_episode
        if len(config.prototype_episodes):
            count += -(-config.extracted // config.optimizer.batch)
        with trainer.input.batches() as batches:
            self._batches = itertools.cycle(list(itertools.islice(batches, count)))

    def __next__(self) -> dict[str, Any]:
        return next(self._batches)


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
            f"{numbers['config']}; episodes of {numbers['pairs']:,} of its pairs, in memory, "
            f"{options.repeats} alternating repeats, medians",
            machine.line(numbers["machine"]),
        ],
        ["CLIP", "offline", f"online {numbers['online']:g}"],
        rows,
        [
            f"{clusters['offline']:,} prototypes in each modality offline, {clusters['online']:,} "
            "online. Compilation is not counted.",
            "Goals: offline 1.42 and online 1.10, where a forward pass is a third of a step; here "
            f"extraction takes {seconds['offline']['extract'] / seconds['clip']['train']:.0%} of "
            "CLIP's training.",
        ],
        numbers,
    )
