"""Nearest centroids in tiles: packed or exact arg-max, and only where something can have changed.

The score of point x for centroid c is x.c - |c|^2 / 2; the largest score is the nearest centroid.
Scores exist one (rows, columns) tile at a time. All float32 tiles of a run have one shape, so a
point's scores have the same bits wherever it lies: in one array or in chunks, on one device or on
many. bfloat16 never decides alone: it screens, and every label is the one float32 gives.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from protoclip_jax.episodes.kmeans_picking import (
    PACKED_GROUP,
    pick_exact,
    pick_packed,
)

# Added to the scores of columns that must never win. Finite: packed scores may not be NaN.
FAR = -3.0e38
_GROUP = 64
# Packed, smaller scores could be denormal numbers, which some hardware takes for 0.
_TINY = 1e-30


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes and number format of one assignment; a function of k and the platform only.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      rows: points in a tile.
      columns: centroids in a tile.
      moved_columns: moved centroids in a tile. In float32 as many as in any tile, for the bits;
        a screening may take narrow tiles, of which few moved centroids fill more.
      group: columns whose maximum is taken first.
      low_precision: bfloat16 products first, float32 ones where those leave a doubt.
      active: skip comparisons whose outcome is known.
      axes: mesh axes over which tiles are shared out, inside `shard_map`; () for one device.
      devices: product of their sizes.
    """

    platform: str
    rows: int
    columns: int
    moved_columns: int
    group: int
    low_precision: bool
    active: bool
    axes: tuple[str, ...]
    devices: int

    @property
    def dtype(self):
        """Format of the factors of the products."""
        return jnp.bfloat16 if self.low_precision else jnp.float32

    def resized(self, k: int, *, low_precision: bool, active: bool) -> "Plan":
        """The plan for another number of centroids or another format, on the same devices."""
        return plan(
            k,
            platform=self.platform,
            low_precision=low_precision,
            active=active,
            axes=self.axes,
            devices=self.devices,
        )


def plan(
    k: int,
    *,
    platform: str,
    low_precision: bool,
    active: bool,
    axes: tuple[str, ...] = (),
    devices: int = 1,
) -> Plan:
    """Tile shapes for k centroids: a score tile stays near the caches on a CPU, large on a GPU."""
    if platform == "cpu":
        # Narrow tiles waste less of a pass over few moved centroids, wide ones cost less a column.
        rows, widest, moved = 1024, 256 if k <= 4096 else 512, 128
    else:
        rows, widest, moved = 16384, 4096, 4096
    group = PACKED_GROUP if low_precision else _GROUP
    if k <= group:
        group = -(-k // 8) * 8
    columns = min(-(-k // group) * group, widest)
    moved = min(columns, moved) if low_precision else columns
    return Plan(platform, rows, columns, moved, group, low_precision, active, axes, devices)


class Assignment(NamedTuple):
    """Nearest centroid of each point and its score.

    Where bfloat16 decided, the score is a bound below it. +inf: nothing is known yet.
    """

    labels: Int[Array, "n"]
    scores: Float[Array, "n"]


def unknown(num_points: int) -> Assignment:
    """An assignment from which the next pass compares every point with every centroid."""
    return Assignment(jnp.zeros(num_points, jnp.int32), jnp.full(num_points, jnp.inf))


class _Best(NamedTuple):
    """The best so far. `seconds`, the largest other score, is kept up in a screening only."""

    labels: Array
    scores: Array
    seconds: Array


class _Columns(NamedTuple):
    """Tiles of centroids in order, of which the first `used` hold any."""

    centroids: Array  # (j, columns, d)
    bias: Array  # (j, columns)
    labels: Array  # (j, columns)
    used: Array | int


def assign_pass(
    points_nd: Float[Array, "n d"],
    centroids_kd: Float[Array, "k d"],
    before: Assignment,
    known_kd: Float[Array, "k d"],
    plan: Plan,
    used_k: Bool[Array, "k"] | None = None,
) -> Assignment:
    """Nearest centroid of every point in float32, ties to the lowest index.

    Only comparisons that can matter are made, with the same labels bit for bit as making all of
    them. A centroid that has not moved gives a point the score it gave before, which was at most
    the point's best. So a point whose own centroid stayed, or moved without losing score, is
    compared with the moved centroids only; every other point with all.

    In low precision, bfloat16 products decide wherever their error cannot change the outcome;
    the points that remain are compared in float32.

    Args:
      points_nd: finite points, float32.
      centroids_kd: finite centroids, float32.
      before: an earlier assignment, made with the same plan and points.
      known_kd: the centroids of `before`.
      plan: tile shapes and format.
      used_k: centroids that may be chosen (default all).
    """
    moved_k = jnp.any(centroids_kd != known_kd, axis=1)
    own_moved = moved_k[before.labels]
    contested = own_moved & ~_gained(points_nd, centroids_kd, before.labels, known_kd)
    contested |= (before.scores == jnp.inf) | (not plan.active)
    bias_k = -0.5 * jnp.sum(centroids_kd * centroids_kd, axis=1)
    if used_k is not None:
        bias_k = jnp.where(used_k, bias_k, FAR)
    everything = _all_columns(centroids_kd, bias_k, plan)
    moved = _moved_columns(centroids_kd, bias_k, moved_k, plan)
    if not plan.low_precision:
        start = Assignment(before.labels, jnp.where(own_moved, -jnp.inf, before.scores))
        best = _search(points_nd, contested, everything, plan, moved, start)
        return Assignment(best.labels, best.scores)

    kept = ~contested & ~own_moved
    error = _screening_error(points_nd, centroids_kd)
    start = Assignment(before.labels, jnp.where(kept, before.scores + error, -jnp.inf))
    best = _search(points_nd, contested, everything, plan, moved, start)
    # The score of a kept label is known from below only, so it can win but not lose for sure.
    lost = kept & (best.labels != before.labels)
    sure = (best.scores - best.seconds > 2 * error) & ~lost & (jnp.abs(best.scores) > _TINY)
    scores = jnp.where(kept, before.scores, best.scores - error)

    exact = plan.resized(centroids_kd.shape[0], low_precision=False, active=False)
    rest = _search(points_nd, ~sure, _all_columns(centroids_kd, bias_k, exact), exact)
    return Assignment(
        jnp.where(sure, best.labels, rest.labels), jnp.where(sure, scores, rest.scores)
    )


def _gained(points_nd: Array, centroids_kd: Array, labels_n: Array, known_kd: Array) -> Array:
    """Points whose score for the label's centroid certainly did not drop when that moved."""
    change_kd = centroids_kd - known_kd
    offset_k = 0.5 * jnp.sum(change_kd * (centroids_kd + known_kd), axis=1)
    gain = jnp.sum(points_nd * change_kd[labels_n], axis=1) - offset_k[labels_n]
    squares = (jnp.sum(part * part, axis=1) for part in (centroids_kd, known_kd))
    own_square = jnp.maximum(*squares)[labels_n]
    length = jnp.sqrt(jnp.sum(points_nd * points_nd, axis=1) * own_square) + own_square
    # Each of the two scores, as the tiles round them, is off by at most d ulp of `length`; this
    # sum is off by less than four times that.
    return gain >= length * (8 * points_nd.shape[1] * 2.0**-24)


def _screening_error(points_nd: Array, centroids_kd: Array) -> Array:
    """How far a point's bfloat16 scores can be from those in float32.

    With roundings x + r and c + q the product is off by (x + r).q + r.c; Cauchy-Schwarz bounds
    both terms by lengths that are known, which is far closer than the worst rounding.
    """
    # Not by `astype` there and back, which compiled programs may leave out.
    rounded_nd, rounded_kd = (
        lax.reduce_precision(part, exponent_bits=8, mantissa_bits=7)
        for part in (points_nd, centroids_kd)
    )
    length_n = _lengths(rounded_nd)
    longest, longest_q = (
        jnp.max(_lengths(centroids_kd)),
        jnp.max(_lengths(rounded_kd - centroids_kd)),
    )
    error_n = length_n * longest_q + _lengths(rounded_nd - points_nd) * longest
    # Sums of d terms in either format, and 16 bits left of a packed score.
    slack = 8 * points_nd.shape[1] * 2.0**-24 + 2.0**-15
    return error_n * (1 + slack) + slack * longest * (length_n + longest)


def _lengths(rows_nd: Array) -> Array:
    return jnp.sqrt(jnp.sum(rows_nd * rows_nd, axis=1))


def _search(
    points_nd: Array,
    full_n: Array,
    everything: _Columns,
    plan: Plan,
    moved: _Columns | None = None,
    start: Assignment | None = None,
) -> _Best:
    """Compares the points of `full_n` with everything, and the others with what moved.

    Args:
      points_nd: points.
      full_n: points whose search starts afresh.
      everything: all centroids.
      plan: tile shapes and format.
      moved: centroids for the others; None leaves those points out.
      start: what the search of the others starts from.
    """
    num_points = points_nd.shape[0]
    points_nd = points_nd.astype(plan.dtype)
    # A stable partition: the points of full_n fill the first tiles. In a tile that holds both
    # kinds all are compared with every centroid, which changes nothing for those that need not be.
    total = jnp.sum(full_n)
    rank = jnp.cumsum(full_n)
    position = jnp.where(full_n, rank - 1, total + jnp.arange(num_points) - rank)
    tiles = -(-num_points // (plan.rows * plan.devices)) * plan.devices
    order = jnp.zeros(tiles * plan.rows, jnp.int32).at[position].set(jnp.arange(num_points))
    full_tiles = -(-total // plan.rows)
    nothing = jnp.full(plan.rows, -jnp.inf)

    device = lax.axis_index(plan.axes) if plan.axes else 0

    def visit(local, results):
        tile = local * plan.devices + device
        rows = lax.dynamic_slice(order, (tile * plan.rows,), (plan.rows,))
        full = tile < full_tiles
        points_td = points_nd[rows]

        def compared(columns, count, best):
            step = functools.partial(_compare, points_td, columns, plan)
            return lax.fori_loop(0, count, step, best)

        best = _Best(jnp.zeros(plan.rows, jnp.int32), nothing, nothing)
        if moved is not None:
            scores = jnp.where(full, -jnp.inf, start.scores[rows])
            best = best._replace(labels=start.labels[rows], scores=scores)
            best = compared(moved, jnp.where(full, 0, moved.used), best)
        best = compared(everything, jnp.where(full, everything.used, 0), best)
        return jax.tree.map(
            lambda all_lt, part_t: lax.dynamic_update_slice(all_lt, part_t[None], (local, 0)),
            results,
            best,
        )

    occupied = full_tiles if moved is None else -(-num_points // plan.rows)
    mine = (occupied - device + plan.devices - 1) // plan.devices
    shape = (tiles // plan.devices, plan.rows)
    results = _Best(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape))
    results = lax.fori_loop(0, mine, visit, results)
    return _Best(*(_in_order(part, plan)[position] for part in results))


def _in_order(part_lt: Array, plan: Plan) -> Array:
    """Brings the tiles of all devices together; tile t lies on device t mod devices."""
    if plan.axes:
        part_lt = lax.all_gather(part_lt, plan.axes)
        part_lt = jnp.swapaxes(part_lt, 0, 1)
    return part_lt.reshape(-1)


def _all_columns(centroids_kd: Array, bias_k: Array, plan: Plan) -> _Columns:
    k = centroids_kd.shape[0]
    return _tiled(centroids_kd, bias_k, jnp.arange(k, dtype=jnp.int32), plan.columns, plan, None)


def _moved_columns(centroids_kd: Array, bias_k: Array, moved_k: Array, plan: Plan) -> _Columns:
    """The centroids that moved, in order."""
    k = centroids_kd.shape[0]
    count = jnp.sum(moved_k)
    rank = jnp.cumsum(moved_k)
    position = jnp.where(moved_k, rank - 1, count + jnp.arange(k) - rank)
    order = jnp.zeros(k, jnp.int32).at[position].set(jnp.arange(k))
    bias_k = jnp.where(jnp.arange(k) < count, bias_k[order], FAR)
    return _tiled(centroids_kd[order], bias_k, order, plan.moved_columns, plan, count)


def _tiled(centroids_kd, bias_k, labels_k, width: int, plan: Plan, count) -> _Columns:
    k = centroids_kd.shape[0]
    tiles = -(-k // width)

    def tiled(part, fill):
        pad = ((0, tiles * width - k),) + ((0, 0),) * (part.ndim - 1)
        part = jnp.pad(part, pad, constant_values=fill)
        return part.reshape(tiles, width, *part.shape[1:])

    return _Columns(
        centroids=tiled(centroids_kd.astype(plan.dtype), 0),
        bias=tiled(bias_k, FAR),
        labels=tiled(labels_k, k),
        used=tiles if count is None else -(-count // width),
    )


def _compare(points_td: Array, columns: _Columns, plan: Plan, j: Array, best: _Best) -> _Best:
    products = lax.dot_general(
        points_td,
        columns.centroids[j],
        (((1,), (1,)), ((), ())),
        precision=None if plan.low_precision else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores_tc = products + columns.bias[j]
    seconds = best.seconds
    if plan.low_precision:
        score, column, second = pick_packed(scores_tc, min(plan.group, scores_tc.shape[1]))
        loser = jnp.minimum(score, best.scores)
        seconds = jnp.maximum(jnp.maximum(seconds, second), loser)
    else:
        score, column = pick_exact(scores_tc, plan.group)
    label = columns.labels[j][column]
    better = (score > best.scores) | ((score == best.scores) & (label < best.labels))
    return _Best(
        jnp.where(better, label, best.labels), jnp.where(better, score, best.scores), seconds
    )


def nearest_squared_distances(
    points_nd: Float[Array, "n d"], centroids_kd: Float[Array, "k d"], labels_n: Int[Array, "n"]
) -> Float[Array, "n"]:
    """Squared distance to the labelled centroid, by differences: exactly 0 for equal rows."""
    difference = points_nd - centroids_kd[labels_n]
    return jnp.sum(difference * difference, axis=1)


def default_platform(mesh: jax.sharding.Mesh | None) -> str:
    """Platform that will run the assignment: the mesh's, else jax's default."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
