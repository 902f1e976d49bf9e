"""The pairs of a run: source, teacher, and the order in which they reach the devices."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from protoclip_jax.config import Config, ConfigError
from protoclip_jax.data import pipeline, sources
from protoclip_jax.data.padding import without_padding
from protoclip_jax.data.teacher import Teacher, embedded_teacher, open_teacher
from protoclip_jax.data.tokenizer import Tokenizer
from protoclip_jax.data.unreadable import UnreadableLog
from protoclip_jax.episodes.sampling import episode_rows
from protoclip_jax.training.state import BATCH_AXES


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
        """
        self._config, self._image_size = config, image_size
        self._tokenizer = Tokenizer(context_length)
        self._by_row = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        self.source = _open_source(config)
        self.teacher = _open_teacher(config, len(self.source))
        self.unreadable = UnreadableLog(self.source, workdir / "unreadable.tsv")
        episode = config.episode
        if episode.size > len(self.source) and not episode.replacement:
            raise ConfigError(
                f"episode.size={episode.size} is larger than the {len(self.source)} pairs of "
                f"{config.data.train}: lower it, or set episode.replacement=True"
            )

    def fingerprints(self) -> dict[str, str | None]:
        """What identifies source and teacher: a run does not resume on others."""
        return {
            "source": self.source.fingerprint,
            "teacher": self.teacher.fingerprint if self.teacher else None,
        }

    def batches(self, kind: str, episodes: Sequence[int], first_step: int = 0) -> pipeline.Batches:
        """Host batches of one pass over the episodes, in order, as one persistent iterator.

        Args:
          kind: "train" (whole batches) or "extract" (every position, the last batch padded).
          episodes: which episodes.
          first_step: where to begin in the first of them.
        """
        config, data = self._config, self._config.data
        augmented = kind == "train" or data.augment_extraction
        return pipeline.batches(
            self.source,
            self._tokenizer,
            # A plain function of plain values, since worker processes get a copy.
            functools.partial(
                episode_rows,
                len(self.source),
                config.episode.size,
                seed=config.seed,
                replacement=config.episode.replacement,
            ),
            episodes=episodes,
            size=config.episode.size,
            batch=config.optimizer.batch,
            kind=kind,
            start=(0, first_step),
            seed=config.seed,
            image_size=self._image_size,
            augmentation=data.augmentation if augmented else "none",
            parity=data.parity_preprocess,
            workers=data.workers,
            threads=data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            unreadable=self.unreadable,
        )

    def on_devices(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Spreads the rows of this process's batch over its devices."""
        if jax.process_count() == 1:  # several processes would have to agree on the length
            batch = batch | {"tokens": without_padding(batch["tokens"])}
        put = functools.partial(jax.make_array_from_process_local_data, self._by_row)
        return jax.tree.map(put, batch)


def _open_source(config: Config) -> sources.PairSource:
    data = config.data
    try:
        source = sources.open_source(
            data.train,
            image_column=data.image_column,
            caption_column=data.caption_column,
            separator=data.separator,
            image_root=data.image_root,
            limit=data.limit,
            seed=config.seed,
        )
        pipeline.check_start(source, limit=data.max_unreadable, parity=data.parity_preprocess)
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.data.train={data.train}: {error}") from error
    return source


def _open_teacher(config: Config, rows: int) -> Teacher | None:
    path = config.data.teacher
    if path is None or not config.uses_teacher:
        return None
    if path == "emoji_text":
        path = embedded_teacher(config.data.train.rpartition("/")[2])
    try:
        return open_teacher(path, rows)
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.data.teacher={config.data.teacher}: {error}") from error
