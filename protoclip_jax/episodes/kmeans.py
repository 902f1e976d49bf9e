"""k-means on the devices of a mesh, with the same bits on any number of them.

Lloyd's algorithm. Points are replicated; each device assigns its share of tiles, the shares are
gathered, and every device makes the same update, so nothing is summed across devices.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from protoclip_jax.episodes import kmeans_assignment as assignment
from protoclip_jax.episodes.kmeans_lloyd import (
    Clusters,
    Settings,
    best_of_redos,
    origin_of_centroids,
    shifted,
)

__all__ = ["Clusters", "assign", "fast_bfloat16", "kmeans"]

# From this many centroids on, skipping known comparisons costs less than it saves.
_ACTIVE_FROM = 512


def kmeans(
    points: Float[Array | np.ndarray, "*m n d"],
    k: int,
    *,
    seed: int,
    iterations: int = 20,
    redos: int = 1,
    seeding: str = "d2",
    empty: str = "split",
    spherical: bool = False,
    initial: Float[Array | np.ndarray, "*m k d"] | None = None,
    weights: Float[Array | np.ndarray, "weights"] | None = None,
    precision: str = "auto",
    mesh: Mesh | None = None,
    active: bool | None = None,
) -> Clusters:
    """Clusters points; the paper's step 3 (reference: `clustering.py`, which calls faiss).

    The result is a function of the arguments: same bits from run to run and on any number of
    devices of one kind. Memory is bounded by tiles of scores, never n x k. Several modalities
    (and redos) run one after the other in one compiled program.

    Args:
      points: (n, d), or (m, n, d) for m modalities clustered independently.
      k: number of clusters, at most n.
      seed: seed of the start; not used with `initial`.
      iterations: most updates; the run ends earlier once nothing changes.
      redos: runs from different starts, of which the one with the best float32 objective is kept.
      seeding: "d2": rounds of D2 sampling; one run of it is enough. "random": a random
        permutation of the points, as the reference does (with redos=3).
      empty: "split": a cluster without members becomes a copy of one of the largest, pushed apart
        by 1/1024 (never after the last update). "keep": it stays where it was.
      spherical: centroids are scaled to length 1 after each update.
      initial: start centroids, instead of seeding.
      weights: weight of each point, 0 or above; 0 leaves the point out of means and counts.
      precision: how fast, not how well: the result is the same bit for bit. "float32";
        "bfloat16": products of rounded points and centroids, and float32 ones for the points whose
        nearest centroid the rounding could change; "auto": bfloat16 where the hardware multiplies
        it faster (`fast_bfloat16`).
      mesh: devices to share the assignment; None: one device.
      active: skip comparisons whose outcome is known, with the same result; None: where it pays.

    Raises:
      ValueError: fewer points than clusters, or an argument out of range.
    """
    _check(points, k, iterations, redos, seeding, empty, initial, weights, precision)
    platform = assignment.default_platform(mesh)
    low = precision == "bfloat16" or (precision == "auto" and fast_bfloat16(platform))
    settings = Settings(
        k=k,
        redos=redos,
        seeding="given" if initial is not None else seeding,
        empty=empty,
        spherical=spherical,
        exact_sums=platform == "gpu",
        plan=assignment.plan(
            k,
            platform=platform,
            low_precision=low,
            active=k >= _ACTIVE_FROM if active is None else active,
            axes=() if mesh is None else tuple(mesh.axis_names),
            devices=1 if mesh is None else mesh.size,
        ),
    )
    return _run(
        jnp.asarray(points, jnp.float32),
        None if initial is None else jnp.asarray(initial, jnp.float32),
        None if weights is None else jnp.asarray(weights, jnp.float32),
        jax.random.key(seed),
        jnp.int32(iterations),
        settings=settings,
        mesh=mesh,
    )


def assign(
    points_nd: Float[Array | np.ndarray, "n d"],
    centroids_kd: Float[Array | np.ndarray, "k d"],
    *,
    used: Bool[Array | np.ndarray, "k"] | None = None,
) -> Int[Array, "n"]:
    """Nearest centroid of each point in float32, ties to the lowest index.

    A point's label does not depend on the other points of the call, so chunks give the same
    labels as the whole. Rows that are not finite get the used centroid nearest to the middle of
    all centroids.

    Args:
      points_nd: points, any number.
      centroids_kd: finite centroids.
      used: centroids that may be chosen (default all).
    """
    centroids_kd = jnp.asarray(centroids_kd, jnp.float32)
    used = jnp.ones(centroids_kd.shape[0], bool) if used is None else jnp.asarray(used)
    plan = assignment.plan(
        centroids_kd.shape[0],
        platform=assignment.default_platform(None),
        low_precision=False,
        active=False,
    )
    return _assign(jnp.asarray(points_nd, jnp.float32), centroids_kd, used, plan)


@functools.partial(jax.jit, static_argnums=3)
def _assign(points_nd: Array, centroids_kd: Array, used_k: Array, plan: assignment.Plan) -> Array:
    origin = origin_of_centroids(centroids_kd)
    points_nd, _ = shifted(points_nd, origin)
    before = assignment.unknown(points_nd.shape[0])
    centroids_kd = centroids_kd - origin
    return assignment.assign_pass(
        points_nd, centroids_kd, before, centroids_kd, plan, used_k
    ).labels


@functools.cache
def fast_bfloat16(platform: str) -> bool:
    """Whether the hardware multiplies bfloat16 faster than float32.

    Accelerators do; CPUs with AMX tiles, or with the products of AVX-512 BF16 (where 20,000 x
    2,000 takes three quarters of float32's time on an AMD EPYC). Others would emulate it.
    """
    if platform != "cpu":
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def _check(points, k, iterations, redos, seeding, empty, initial, weights, precision) -> None:
    if points.ndim not in (2, 3):
        raise ValueError(f"points have shape {points.shape}: (n, d) or (m, n, d) is needed")
    n = points.shape[-2]
    if k < 1 or n < k:
        raise ValueError(
            f"{n} points cannot form {k} clusters: use at least {k} points or at most {n} clusters"
        )
    for name, value in (("iterations", iterations + 1), ("redos", redos)):
        if value < 1:
            raise ValueError(f"{name} is out of range")
    for name, value, known in (
        ("seeding", seeding, ("d2", "random")),
        ("empty", empty, ("split", "keep")),
        ("precision", precision, ("auto", "float32", "bfloat16")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}: use one of {', '.join(known)}")
    if initial is not None:
        wanted = (*points.shape[:-2], k, points.shape[-1])
        if initial.shape != wanted:
            raise ValueError(f"initial has shape {initial.shape}: {wanted} is needed")
        if redos > 1:
            raise ValueError(f"redos is {redos} with given start centroids: all would be equal")
    if weights is not None:
        if weights.shape != (n,):
            raise ValueError(f"weights have shape {weights.shape}: ({n},) is needed")
        if not np.all(np.asarray(weights) >= 0):
            raise ValueError("weights must be numbers of 0 or above")


@functools.partial(jax.jit, static_argnames=("settings", "mesh"))
def _run(
    points, initial, weights, key, iterations, *, settings: Settings, mesh: Mesh | None
) -> Clusters:
    def everywhere(points, initial, weights, key, iterations):
        def one(index, points_nd, initial_kd):
            key_of_one = jax.random.fold_in(key, index)
            return best_of_redos(points_nd, initial_kd, weights, key_of_one, iterations, settings)

        if points.ndim == 2:
            return one(0, points, initial)
        modalities = jnp.arange(points.shape[0])
        return lax.map(lambda args: one(*args), (modalities, points, initial))

    if mesh is not None:
        points = lax.with_sharding_constraint(points, NamedSharding(mesh, PartitionSpec()))
        everywhere = jax.shard_map(
            everywhere,
            mesh=mesh,
            in_specs=PartitionSpec(),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
    return everywhere(points, initial, weights, key, iterations)
