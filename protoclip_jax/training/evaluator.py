"""Evaluations of a run: the untrained model, those in between, and the table at the end."""

from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from protoclip_jax.config import Config
from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.distributed import broadcast
from protoclip_jax.encoder import Encoder
from protoclip_jax.evaluation import suite
from protoclip_jax.evaluation.table import comparison_table
from protoclip_jax.models.presets import CLIPConfig
from protoclip_jax.training.logging import read_metrics
from protoclip_jax.training.state import BATCH_AXES

SPLITS = ("train", "test", "val")


class Evaluator:
    """Runs the recipe's suite on the model as it stands."""

    def __init__(self, config: Config, model: CLIPConfig, graphdef: nnx.GraphDef, mesh: Mesh):
        self._model, self._graphdef = model, graphdef
        self._rows = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        self._encoder: Encoder | None = None  # kept, and what is compiled with it
        self._sources = None
        if config.evaluation.suite:
            self._sources = [EmojiText(split) for split in SPLITS]

    def measure(self, params: dict, batch_stats: dict) -> dict[str, float]:
        """All metrics of the suite; empty when the recipe names none.

        The features come from all devices of all processes; process 0 measures on them.
        """
        if self._sources is None:
            return {}
        if self._encoder is None:
            # One size: all that is measured takes few calls, and no second program.
            self._encoder = Encoder(
                self._model, self._graphdef, params, batch_stats, sizes=(256,), rows=self._rows
            )
        self._encoder.params, self._encoder.batch_stats = params, batch_stats
        settings = suite.SuiteSettings()
        labels = suite.Labels.of(*self._sources, settings)
        features = suite.Features.of(self._encoder, *self._sources, labels, settings)
        first = jax.process_index() == 0
        return broadcast(suite.measure(features, labels, settings) if first else {})

    def measured(self, workdir: Path, step: int) -> bool:
        """Whether the log has an evaluation of a step; True where the recipe wants none."""
        if self._sources is None:
            return True
        return any(
            line["step"] == step and "zero_shot/top1" in line for line in read_metrics(workdir)
        )

    def table(self, workdir: Path) -> str | None:
        """The newest evaluation beside chance and, if step 0 was logged, the untrained model's.

        None without an evaluation.
        """
        columns = {}
        for line in read_metrics(workdir):
            if "zero_shot/top1" in line:
                title = "trained" if line["step"] else "untrained"
                columns[title] = {n: value for n, value in line.items() if isinstance(value, float)}
        if self._sources is None or not columns:
            return None
        return comparison_table(columns, suite.chance(*self._sources))
