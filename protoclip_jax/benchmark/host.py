"""What the host spends on a step: flattening a state of many arrays, and handing them over.

A device that computes hides it, until it is longer than the step. A CPU computes with the same
cores, so there the program that is handed the state does next to nothing.
"""

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from protoclip_jax.config import Config
from protoclip_jax.training import state

MODEL = "RN50"
_STEPS = 20


def measure(config: Config, mesh: Mesh, repeats: int, model: str | None = None) -> dict[str, Any]:
    """Milliseconds of the host for a step of a TrainState, each of its arrays one number.

    The compiled program takes the state, donated, adds 1 to all of it and returns it, as a
    training step does with more work. The time of that trivial program is in the number.

    Args:
      config: the recipe of the state.
      mesh: where it lies.
      repeats: of `_STEPS` steps each; the median counts.
      model: whose state; None for RN50.
    """
    model = model or MODEL
    like = train_state(config, model)
    everywhere = NamedSharding(mesh, PartitionSpec())
    places = jax.tree.map(lambda _: everywhere, like)
    values = jax.jit(
        lambda: jax.tree.map(lambda leaf: jnp.zeros((), leaf.dtype), like), out_shardings=places
    )()
    step = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree),
        donate_argnums=0,
        out_shardings=places,
    )
    values = jax.block_until_ready(step(values))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(_STEPS):
            values = step(values)
        jax.block_until_ready(values)
        times.append((time.perf_counter() - start) / _STEPS)
    return {
        "host_ms": 1e3 * statistics.median(times),
        "host_model": model,
        "host_arrays": len(jax.tree.leaves(like)),
    }


def train_state(config: Config, name: str = MODEL) -> dict[str, Any]:
    """Shapes of the recipe's TrainState with another model."""
    model = dataclasses.replace(config.model, name=name)
    _, like = state.shapes(dataclasses.replace(config, model=model))
    return like
