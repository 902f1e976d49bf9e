"""Evaluations of a run: the untrained model, those in between, and the table at the end."""

from pathlib import Path

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from protoclip_jax.config import Config
from protoclip_jax.data.emoji_text import EmojiText
from protoclip_jax.encoder import Encoder
from protoclip_jax.evaluation import suite
from protoclip_jax.evaluation.table import comparison_table
from protoclip_jax.models.presets import CLIPConfig
from protoclip_jax.training.logging import read_metrics
from protoclip_jax.training.processes import from_first

SPLITS = ("train", "test", "val")


class Evaluator:
    """Runs the recipe's suite on the model as it stands."""

    def __init__(self, config: Config, model: CLIPConfig, graphdef: nnx.GraphDef, mesh: Mesh):
        self._model, self._graphdef, self._mesh = model, graphdef, mesh
        self._sources = None
        if config.evaluation.suite:
            self._sources = [EmojiText(split) for split in SPLITS]

    def measure(self, params: dict, batch_stats: dict) -> dict[str, float]:
        """All metrics of the suite; empty when the recipe names none.

        Process 0 measures, on all its devices; the others wait for its numbers.
        """
        if self._sources is None:
            return {}
        # Gathered by all processes, for what is cut over the devices of several.
        whole = jax.jit(lambda trees: trees, out_shardings=NamedSharding(self._mesh, P()))
        params, batch_stats = whole((params, batch_stats))
        values = {}
        if jax.process_index() == 0:
            devices = jax.make_mesh(
                (jax.local_device_count(),),
                ("data",),
                (AxisType.Auto,),
                devices=jax.local_devices(),
            )
            here = NamedSharding(devices, P())
            encoder = Encoder(
                self._model,
                self._graphdef,
                *jax.tree.map(lambda leaf: _local(leaf, here), (params, batch_stats)),
                rows=NamedSharding(devices, P("data")),
            )
            values = suite.evaluate(encoder, *self._sources)
        return from_first(values)

    def measured(self, workdir: Path, step: int) -> bool:
        """Whether the log has an evaluation of a step; True where the recipe wants none."""
        if self._sources is None:
            return True
        return any(
            line["step"] == step and "zero_shot/top1" in line for line in read_metrics(workdir)
        )

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


def _local(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array that every device holds whole, as one of this process's devices alone."""
    pieces = [shard.data for shard in leaf.addressable_shards]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, pieces)
