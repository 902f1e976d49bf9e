"""`kmeans` of the check: clustering the paper's episode, beside a matmul and a copy."""

from typing import Any

import jax
import jax.numpy as jnp

from protoclip_jax.benchmark import goals, kmeans, trace
from protoclip_jax.benchmark.check_plan import Save, Settings
from protoclip_jax.episodes.kmeans import fast_bfloat16

SMALL = (4_000, 32, 400)


def run(settings: Settings, save: Save) -> dict[str, Any]:
    """Numbers of `benchmark kmeans`, without a peer, and a profile where the goal is missed."""
    size = SMALL if settings.small else kmeans.LARGE
    iterations, repeats = (5, 1) if settings.small else (20, 3)
    low = fast_bfloat16(jax.default_backend())
    precision = "bfloat16" if low else "float32"
    numbers = kmeans.measure(size, precision, iterations, repeats, None, judged=False)
    # Where nothing moves any more it ends before 20; each update costs about the same.
    numbers["ms_for_20"] = 1e3 * numbers["wall_seconds"] * 20 / max(1, numbers["iterations"])
    save(numbers)
    kind = jax.devices()[0].device_kind
    if settings.profile or goals.missed("kmeans", numbers, kind, settings.small):
        numbers["profile"] = _profile(size, precision, iterations)
    return numbers


def _profile(size: kmeans.Size, precision: str, iterations: int) -> dict[str, Any]:
    points, start = (jnp.asarray(array) for array in kmeans.problem(size))

    def call():
        return kmeans.kmeans(
            points, size[2], seed=0, iterations=iterations, initial=start, precision=precision
        )

    jax.block_until_ready(call())
    return trace.profiled(call)
