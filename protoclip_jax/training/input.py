"""The pairs of a run: source, teacher, and the order in which they reach the devices."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Int

from protoclip_jax import distributed
from protoclip_jax.config import Config, ConfigError
from protoclip_jax.data import image_cache, pipeline, reader, sources
from protoclip_jax.data.augmentation import augmentation_named
from protoclip_jax.data.kept import Keep
from protoclip_jax.data.padding import without_padding
from protoclip_jax.data.start_check import check_start
from protoclip_jax.data.teacher import Teacher, embedded_teacher, open_teacher
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.data.unreadable import UnreadableLog
from protoclip_jax.data.walk import Section, Walk
from protoclip_jax.distributed.rows import Rows, by_position
from protoclip_jax.episodes.shared_order import EpisodeRows
from protoclip_jax.storage.retries import Unreachable
from protoclip_jax.training.state import BATCH_AXES

EMOJI_TEXT = "emoji_text"  # the name of the features that come with the package


class Input:
    """What a run reads.

    Attributes:
      source: the pairs.
      teacher: rows of the external teacher, or None.
      unreadable: the pairs that were replaced, listed in the workdir.
    """

    def __init__(
        self, config: Config, image_size: int, context_length: int, mesh: Mesh, workdir: Path
    ):
        """Opens source and teacher.

        Raises:
          ConfigError: what the recipe asks for does not fit the data; names both numbers.
          Unreachable: remote storage gave no answer for minutes.
        """
        self._config, self._image_size = config, image_size
        self._cache: image_cache.CachePlan | None = None
        self._tokenizer = Tokenizer(context_length)
        self._rows = Rows(NamedSharding(mesh, PartitionSpec(BATCH_AXES)), config.optimizer.batch)
        self.source = _open_source(config)
        self.teacher = _open_teacher(config, self.source)
        # Each process has its own share of the pairs, and a file of its own.
        suffix = f".{jax.process_index()}" if jax.process_index() else ""
        self.unreadable = UnreadableLog(
            self.source, workdir / f"unreadable{suffix}.tsv", _of_processes_gone(workdir)
        )
        episode = config.episode
        if episode.size > len(self.source) and not episode.replacement:
            raise ConfigError(
                f"episode.size={episode.size} is larger than the {len(self.source)} pairs of "
                f"{config.data.train}: lower it, or set episode.replacement=True"
            )
        if config.data.keep != "none" and config.data.keep_side < image_size:
            raise ConfigError(
                f"data.keep_side={config.data.keep_side} is smaller than the model's pictures of "
                f"{image_size} pixels: raise it, or set data.keep=none"
            )

    def plan_cache(self, began_with: str | None = None) -> image_cache.CachePlan:
        """Chooses the form of the image cache, the same on every process.

        Args:
          began_with: the form of a run that goes on: sizes and budget change nothing of it.
        """
        config, data = self._config, self._config.data
        wanted = began_with or data.keep
        budget = int(data.keep_gigabytes * 1e9)
        if not len(config.prototype_episodes) or wanted == "none":
            # One pass an episode: nothing is kept, but crops come from images in this form.
            form = "pixels" if wanted == image_cache.AUTO else wanted
            self._cache = image_cache.CachePlan(form, 0, 0, budget)
            return self._cache
        images = -(-config.extracted // jax.process_count())
        sizes = image_cache.measured(self.source, data.keep_side, parity=data.parity_preprocess)
        mine = image_cache.plan(wanted, images, sizes, budget)
        self._cache = image_cache.CachePlan(**distributed.broadcast(dataclasses.asdict(mine)))
        return self._cache

    def fingerprints(self) -> dict[str, str | None]:
        """What identifies source and teacher: a run does not resume on others."""
        return {
            "source": self.source.fingerprint,
            "teacher": self.teacher.fingerprint if self.teacher else None,
        }

    def losses(self) -> dict[str, float]:
        """Counts what cannot be read, over all processes; every one calls it at the same places.

        Returns:
          What there is to log: pairs that the source left out, pairs that could not be read so far,
          and pictures that are odd and used all the same.
        """
        for taken in distributed.exchange(self.unreadable.take_new()):
            self.unreadable.include(taken)
        left_out = getattr(self.source, "report", {}).values()
        return {
            "data/left_out": float(sum(left.count for left in left_out)),
            "data/unreadable": float(len(self.unreadable)),
            "data/odd": float(sum(map(len, self.unreadable.odd.values()))),
        }

    def batches(self, first_episode: int = 0, first_step: int = 0) -> pipeline.Batches:
        """Host batches of all passes of the run from a place on, as one persistent iterator.

        Args:
          first_episode: where to begin.
          first_step: finished training steps of that episode; above 0 its extraction is over.
        """
        config, data = self._config, self._config.data
        cache = self._cache or self.plan_cache()
        chosen = augmentation_named(data.augmentation)
        reading = reader.Reading(
            source=self.source,
            tokenizer=self._tokenizer,
            rows_of_episode=EpisodeRows(
                len(self.source),
                config.episode.size,
                config.seed,
                config.episode.replacement,
            ),
            size=config.episode.size,
            seed=config.seed,
            image_size=self._image_size,
            augmentation={
                "train": chosen,
                "extract": chosen if data.augment_extraction else None,
            },
            parity=data.parity_preprocess,
            keep=Keep(cache.form, data.keep_side, cache.budget),
        )
        walk = Walk(
            sections(config, first_episode, first_step),
            config.optimizer.batch,
            workers=data.workers,
            rows=self._rows.local,
        )
        return pipeline.Batches(
            walk,
            reading,
            workers=data.workers,
            threads=data.threads,
            unreadable=self.unreadable,
        )

    def all_rows(
        self, positions: list[Int[np.ndarray, " b"]], rows: list[Int[np.ndarray, " b"]], size: int
    ) -> Int[np.ndarray, " n"]:
        """Rows that this and all other processes read in a pass, by position.

        Args:
          positions: of consecutive batches of this process.
          rows: the pairs read there.
          size: positions of the pass.
        """
        return by_position(np.stack(positions), np.stack(rows), size)

    def on_devices(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Spreads the rows of this process's batch over its devices."""
        if jax.process_count() == 1:  # several processes would have to agree on the length
            batch = batch | {"tokens": without_padding(batch["tokens"])}
        return jax.tree.map(self._rows.on_devices, batch)


def _of_processes_gone(workdir: Path) -> list[Path]:
    """Files of processes that an earlier run had more, dealt out to those of today."""
    count, index, found = jax.process_count(), jax.process_index(), []
    for path in workdir.glob("unreadable.*.tsv"):
        number = path.name.split(".")[1]
        if number.isdecimal() and int(number) >= count and int(number) % count == index:
            found.append(path)
    return found


def sections(config: Config, first_episode: int = 0, first_step: int = 0) -> list[Section]:
    """The passes of a run from a place on: extraction where there are prototypes, then training."""
    trained = config.steps_per_episode * config.optimizer.batch
    passes = []
    for episode in range(first_episode, config.episode.count):
        first = first_step if episode == first_episode else 0
        if episode in config.prototype_episodes and not first:
            passes.append(Section("extract", episode, config.extracted))
        passes.append(Section("train", episode, trained, first))
    return passes


def _open_source(config: Config) -> sources.PairSource:
    data = config.data
    try:
        source = sources.open_source(
            data.train,
            image_column=data.image_column,
            caption_column=data.caption_column,
            separator=data.separator,
            image_root=data.image_root,
            split=data.split,
            image_feature=data.image_feature,
            text_feature=data.text_feature,
            limit=data.limit,
            seed=config.seed,
        )
        check_start(source, limit=data.max_unreadable, parity=data.parity_preprocess)
    except Unreachable:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.data.train={data.train}: {error}") from error
    return source


def _open_teacher(config: Config, source: sources.PairSource) -> Teacher | None:
    path = config.data.teacher
    if path is None or not config.uses_teacher:
        return None
    try:
        if path == EMOJI_TEXT:
            path = _embedded(config.data.train)
        return open_teacher(path, len(source), source)
    except Unreachable:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.data.teacher={config.data.teacher}: {error}") from error


def _embedded(train: str) -> Path:
    """The features that come with the package, where they are those of `data.train`."""
    if not train.startswith(f"{EMOJI_TEXT}/"):
        raise ValueError(
            f"these features are of emoji_text/train only, and data.train={train}: make some of "
            f"its own with `python -m protoclip_jax.teacher {train} --out FILE.npy`"
        )
    return embedded_teacher(train.removeprefix(f"{EMOJI_TEXT}/"))
