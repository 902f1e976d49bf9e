"""What a recipe would do: shapes, memory, schedule and phases, without allocating or training."""

import math
import tempfile
from itertools import groupby
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview

from protoclip_jax.config import Config
from protoclip_jax.objectives.prototype import chunk_rows, working_bytes
from protoclip_jax.training import schedule, state, step
from protoclip_jax.training.input import Input
from protoclip_jax.training.phases import phase_of
from protoclip_jax.training.reporter import source_lines


def describe(config: Config) -> str:
    """The whole plan as text."""
    mesh = state.make_mesh(config.mesh.fsdp)
    _, like = state.shapes(config)
    parts = [
        f"Devices    {jax.device_count()} x {jax.devices()[0].device_kind}, mesh "
        + " x ".join(f"{name} {size}" for name, size in mesh.shape.items()),
        _parameters(like),
        _memory(config, like, mesh),
        _phases(config),
        _rates(config),
    ]
    return "\n\n".join(parts)


def data(config: Config) -> str:
    """What the run would read, as text: opens source and teacher, decodes a few images.

    Raises:
        ConfigError: What the recipe names cannot be read, or does not fit it.
        Unreachable: Remote storage gave no answer for minutes.
    """
    model = state.model_of(config)
    size, length = model.vision.image_size, model.text.context_length
    with tempfile.TemporaryDirectory() as folder:
        opened = Input(config, size, length, state.make_mesh(config.mesh.fsdp), Path(folder))
        lines = ["Data", *source_lines(config, opened.source, opened.teacher)]
        if opened.teacher is not None:
            teacher = opened.teacher
            rows = 4 * config.extracted * teacher.width / 1e6
            lines.append(
                f"teacher {teacher.path}: {len(teacher):,} rows of {teacher.width} numbers; "
                f"{rows:.1f} MB of a device while an episode's are clustered"
            )
        lines += opened.plan_cache().lines()
    return "\n  ".join(lines)


def _parameters(like: dict) -> str:
    """clu's overview, summed by the children of the model and its image tower."""
    rows = [f"{'Parameters':<28}{'number':>14}{'MB, float32':>14}"]
    total = 0
    for name, tree in like["params"].items():
        count = int(parameter_overview.count_parameters({name: tree}))
        total += count
        rows.append(f"  {name:<26}{count:>14,}{4 * count / 1e6:>14.1f}")
    rows.append(f"  {'all':<26}{total:>14,}{4 * total / 1e6:>14.1f}")
    return "\n".join(rows)


def _memory(config: Config, like: dict, mesh) -> str:
    """Bytes of one device, from shapes and shardings; activations come on top."""
    places = state.shardings(like, mesh)

    def held(tree, places) -> int:
        leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
        return sum(
            math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf, place in leaves
        )

    rows_here = config.optimizer.batch // mesh.size
    size = state.model_of(config).vision.image_size
    items = {
        "parameters": held(like["params"], places["params"]),
        "gradients": held(like["params"], places["params"]),
        "optimizer": held(like["opt_state"], places["opt_state"]),
        f"images ({rows_here} x {size} x {size} x 3, uint8 and float32)": 5
        * rows_here
        * size
        * size
        * 3,
        f"contrastive logits (2 x {rows_here} x {config.optimizer.batch})": 8
        * rows_here
        * config.optimizer.batch,
    }
    if len(config.prototype_episodes):
        width, k = config.model.projection_width, config.episode.prototypes
        items[f"episode features (2 x {config.episode.size} x {width})"] = (
            8 * config.episode.size * width
        )
        items[f"prototypes (4 x {k} x {width})"] = 16 * k * width
        if config.uses_teacher:
            external = config.external_prototypes
            items[f"prototypes of the teacher (2 x {external} x {width})"] = 8 * external * width
        rows = chunk_rows(rows_here, k)
        items[f"prototype loss ({rows} of {rows_here} rows at a time x {k})"] = working_bytes(
            rows_here, k, width, soft=config.objective.temperature is not None
        )
    lines = [f"{'Memory of a device':<56}{'MB':>10}"]
    lines += [f"  {name:<54}{size / 1e6:>10.1f}" for name, size in items.items()]
    lines.append(f"  {'all, without activations':<54}{sum(items.values()) / 1e6:>10.1f}")
    return "\n".join(lines)


def _phases(config: Config) -> str:
    steps, count = config.steps_per_episode, config.episode.count
    lines = [
        f"Episodes   {count} of {config.episode.size:,} pairs, {steps:,} steps of "
        f"{config.optimizer.batch} pairs: {config.total_steps:,} steps",
    ]
    phases = [phase_of(config, episode) for episode in range(count)]
    for phase, group in groupby(range(count), key=lambda episode: phases[episode]):
        episodes = list(group)
        weights = phase.weights
        lines.append(
            f"  {episodes[0] + 1:>5} to {episodes[-1] + 1:<5} {phase.name:<10} loss = "
            f"{weights.clip:g} clip + {weights.proto:g} prototype + {weights.external:g} external;"
            f" trained: {', '.join(phase.trained)}"
        )
    return "\n".join(lines)


def _rates(config: Config) -> str:
    rates = schedule.learning_rates(step.schedule_settings(config))
    lines = [f"{'Learning rate at step':<28}{'image tower':>14}{'the rest':>14}"]
    points = {0, config.optimizer.warmup_steps, config.total_steps - 1}
    points |= {config.total_steps * quarter // 4 for quarter in (1, 2, 3)}
    for point in sorted(points):
        found = rates(np.asarray(point))
        lines.append(f"  {point:<26,}{found['image']:>14.3g}{found['text']:>14.3g}")
    return "\n".join(lines)
