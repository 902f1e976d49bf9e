"""Evaluations of a run: the untrained model, those in between, and the table at the end."""

from pathlib import Path

from flax import nnx

from protoclip_jax.config import Config
from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.encoder import Encoder
from protoclip_jax.evaluation import suite
from protoclip_jax.evaluation.table import comparison_table
from protoclip_jax.models.presets import CLIPConfig
from protoclip_jax.training.logging import read_metrics

SPLITS = ("train", "test", "val")


class Evaluator:
    """Runs the recipe's suite on the model as it stands."""

    def __init__(self, config: Config, model: CLIPConfig, graphdef: nnx.GraphDef):
        self._model, self._graphdef = model, graphdef
        self._sources = None
        if config.evaluation.suite:
            self._sources = [EmojiText(split) for split in SPLITS]

    def measure(self, params: dict, batch_stats: dict) -> dict[str, float]:
        """All metrics of the suite; empty when the recipe names none."""
        if self._sources is None:
            return {}
        encoder = Encoder(self._model, self._graphdef, params, batch_stats)
        return suite.evaluate(encoder, *self._sources)

    def table(self, workdir: Path) -> str | None:
        """The newest evaluation beside the untrained model's and chance, or None without one."""
        metrics = [
            {name: value for name, value in line.items() if isinstance(value, float)}
            for line in read_metrics(workdir)
            if "zero_shot/top1" in line
        ]
        if self._sources is None or not metrics:
            return None
        columns = {"untrained": metrics[0], "trained": metrics[-1]}
        return comparison_table(columns, suite.chance(*self._sources))
