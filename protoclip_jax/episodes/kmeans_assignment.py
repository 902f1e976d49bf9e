"""Nearest centroids in tiles: packed or exact arg-max, and only where something can have changed.

The score of point x for centroid c is x.c - |c|^2 / 2; the largest score is the nearest centroid.
Scores exist one (rows, columns) tile at a time. All tiles of a run have one shape, so a point's
scores have the same bits wherever it lies: in one array or in chunks, on one device or on many.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

# Added to the scores of columns that must never win. Finite: packed scores may not be NaN.
FAR = -3.0e38
_GROUP = 64
_PACKED_GROUP = 256


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes and number format of one assignment; a function of k and the platform only.

    Attributes:
      platform: "cpu", "gpu" or "tpu".
      rows: points in a tile.
      columns: centroids in a tile.
      group: columns whose maximum is taken first.
      low_precision: bfloat16 products with float32 sums, and packed picking.
      active: skip comparisons whose outcome is known.
      axes: mesh axes over which tiles are shared out, inside `shard_map`; () for one device.
      devices: product of their sizes.
    """

    platform: str
    rows: int
    columns: int
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
        rows, widest = 1024, 256 if k <= 4096 else 512
    else:
        rows, widest = 16384, 4096
    group = _PACKED_GROUP if low_precision else _GROUP
    if k <= group:
        group = -(-k // 8) * 8
    columns = min(-(-k // group) * group, widest)
    return Plan(platform, rows, columns, group, low_precision, active, axes, devices)


class Assignment(NamedTuple):
    """Nearest centroid of each point and its score; a score of +inf means not known yet."""

    labels: Int[Array, "n"]
    scores: Float[Array, "n"]


def unknown(num_points: int) -> Assignment:
    """An assignment from which the next pass compares every point with every centroid."""
    return Assignment(jnp.zeros(num_points, jnp.int32), jnp.full(num_points, jnp.inf))


class _Columns(NamedTuple):
    """Tiles of centroids: all of them in order, then those that moved, in order."""

    centroids: Array  # (2 j, columns, d)
    bias: Array  # (2 j, columns)
    labels: Array  # (2 j, columns)
    all_tiles: int
    moved_tiles: Array


def assign_pass(
    points_nd: Float[Array, "n d"],
    centroids_kd: Float[Array, "k d"],
    before: Assignment,
    moved_k: Bool[Array, "k"],
    plan: Plan,
    used_k: Bool[Array, "k"] | None = None,
) -> Assignment:
    """Nearest centroid of every point, ties to the lowest index.

    Only comparisons that can matter are made, with the same result bit for bit as making all of
    them. A centroid that has not moved gives a point the score it gave before, which was at most
    the point's best. So a point whose own centroid stayed, or moved without losing score, is
    compared with the moved centroids only; every other point with all.

    Args:
      points_nd: finite points, float32.
      centroids_kd: finite centroids, float32.
      before: the previous assignment, made with the same plan.
      moved_k: centroids that differ from those of `before`.
      plan: tile shapes and format.
      used_k: centroids that may be chosen (default all).
    """
    num_points = points_nd.shape[0]
    points_nd = points_nd.astype(plan.dtype)
    columns = _columns(centroids_kd.astype(plan.dtype), moved_k, used_k, plan)
    contested_n, start = _contested(points_nd, centroids_kd, before, moved_k, plan)
    # A stable partition: contested points fill the first tiles. In a tile that holds both kinds
    # all are compared with every centroid, which changes nothing for those that need not be.
    total = jnp.sum(contested_n)
    rank = jnp.cumsum(contested_n)
    position = jnp.where(contested_n, rank - 1, total + jnp.arange(num_points) - rank)
    tiles = -(-num_points // (plan.rows * plan.devices)) * plan.devices
    order = jnp.zeros(tiles * plan.rows, jnp.int32).at[position].set(jnp.arange(num_points))
    full_tiles = -(-total // plan.rows)

    device = lax.axis_index(plan.axes) if plan.axes else 0

    def visit(local, results):
        tile = local * plan.devices + device
        rows = lax.dynamic_slice(order, (tile * plan.rows,), (plan.rows,))
        full = tile < full_tiles
        best = Assignment(start.labels[rows], jnp.where(full, -jnp.inf, start.scores[rows]))
        first = jnp.where(full, 0, columns.all_tiles)
        last = columns.all_tiles + jnp.where(full, 0, columns.moved_tiles)
        points_td = points_nd[rows]
        best = lax.fori_loop(
            first, last, lambda j, best: _compare(points_td, columns, j, best, plan), best
        )
        return Assignment(
            lax.dynamic_update_slice(results.labels, best.labels[None], (local, 0)),
            lax.dynamic_update_slice(results.scores, best.scores[None], (local, 0)),
        )

    occupied = -(-num_points // plan.rows)
    mine = (occupied - device + plan.devices - 1) // plan.devices
    shape = (tiles // plan.devices, plan.rows)
    results = Assignment(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    results = lax.fori_loop(0, mine, visit, results)
    return Assignment(*(_in_order(part, plan)[position] for part in results))


def _in_order(part_lt: Array, plan: Plan) -> Array:
    """Brings the tiles of all devices together; tile t lies on device t mod devices."""
    if plan.axes:
        part_lt = lax.all_gather(part_lt, plan.axes)
        part_lt = jnp.swapaxes(part_lt, 0, 1)
    return part_lt.reshape(-1)


def _columns(centroids_kd: Array, moved_k: Array, used_k: Array | None, plan: Plan) -> _Columns:
    k = centroids_kd.shape[0]
    tiles = -(-k // plan.columns)
    extra = tiles * plan.columns - k
    wide = centroids_kd.astype(jnp.float32)
    # Of the rounded centroid, so that only (x - c) and not x meets its rounding error.
    bias_k = -0.5 * jnp.sum(wide * wide, axis=1)
    if used_k is not None:
        bias_k = jnp.where(used_k, bias_k, FAR)
    count = jnp.sum(moved_k)
    rank = jnp.cumsum(moved_k)
    position = jnp.where(moved_k, rank - 1, count + jnp.arange(k) - rank)
    order = jnp.zeros(k, jnp.int32).at[position].set(jnp.arange(k))
    moved_bias_k = jnp.where(jnp.arange(k) < count, bias_k[order], FAR)

    def tiled(natural, moved, fill):
        pad = ((0, extra),) + ((0, 0),) * (natural.ndim - 1)
        both = [jnp.pad(part, pad, constant_values=fill) for part in (natural, moved)]
        return jnp.stack(both).reshape(2 * tiles, plan.columns, *natural.shape[1:])

    return _Columns(
        centroids=tiled(centroids_kd, centroids_kd[order], 0),
        bias=tiled(bias_k, moved_bias_k, FAR),
        labels=tiled(jnp.arange(k, dtype=jnp.int32), order, k),
        all_tiles=tiles,
        moved_tiles=-(-count // plan.columns),
    )


def _contested(
    points_nd: Array, centroids_kd: Array, before: Assignment, moved_k: Array, plan: Plan
) -> tuple[Array, Assignment]:
    """Points that must be compared with every centroid, and where the others start from."""
    own_moved = moved_k[before.labels]
    start = Assignment(before.labels, jnp.where(own_moved, -jnp.inf, before.scores))
    if not plan.active:
        return jnp.ones_like(own_moved), start
    own_nd = centroids_kd.astype(plan.dtype)[before.labels].astype(jnp.float32)
    wide_nd = points_nd.astype(jnp.float32)
    own_square = jnp.sum(own_nd * own_nd, axis=1)
    score = jnp.sum(wide_nd * own_nd, axis=1) - 0.5 * own_square
    # This sum is not rounded as the matrix product is. Twice the worst rounding error of both
    # (d ulp of |x| |c| each) makes the test safe: it never passes when the product would not.
    length = jnp.sqrt(jnp.sum(wide_nd * wide_nd, axis=1) * own_square) + own_square
    slack = length * (4 * points_nd.shape[1] * 2.0**-24)
    return own_moved & ~(score - slack >= before.scores), start


def _compare(points_td: Array, columns: _Columns, j: Array, best: Assignment, plan: Plan):
    products = lax.dot_general(
        points_td,
        columns.centroids[j],
        (((1,), (1,)), ((), ())),
        precision=None if plan.low_precision else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores_tc = products + columns.bias[j]
    pick = _pick_packed if plan.low_precision else _pick_exact
    score, column = pick(scores_tc, plan.group)
    label = columns.labels[j][column]
    better = (score > best.scores) | ((score == best.scores) & (label < best.labels))
    return Assignment(jnp.where(better, label, best.labels), jnp.where(better, score, best.scores))


def _pick_exact(scores_tc: Array, group: int) -> tuple[Array, Array]:
    """Maximum and its lowest column, in two levels: `argmax` over all columns is far slower."""
    tops = jnp.max(scores_tc.reshape(scores_tc.shape[0], -1, group), axis=2)
    score = jnp.max(tops, axis=1)
    start = _first_equal(tops, score) * group
    inside = jax.vmap(lambda row, at: lax.dynamic_slice(row, (at,), (group,)))(scores_tc, start)
    return score, start + _first_equal(inside, score)


def _first_equal(values_tc: Array, value_t: Array) -> Array:
    """Lowest column equal to the row's value (the last one if none is, as with NaN)."""
    last = values_tc.shape[1] - 1
    columns = jnp.arange(values_tc.shape[1], dtype=jnp.int32)
    return jnp.min(jnp.where(values_tc == value_t[:, None], columns, last), axis=1)


def _pick_packed(scores_tc: Array, group: int) -> tuple[Array, Array]:
    """Maximum to 16 significant bits and its lowest column: one plain maximum finds both.

    The column's number within its group takes the place of the low mantissa bits. It counts
    down for positive and up for negative scores, whose bits order the other way round.
    """
    mask = _PACKED_GROUP - 1
    bits = lax.bitcast_convert_type(scores_tc, jnp.int32)
    inside = jnp.arange(scores_tc.shape[1], dtype=jnp.int32) % group
    bits = (bits & ~mask) | jnp.where(bits < 0, inside, mask - inside)
    packed = lax.bitcast_convert_type(bits, jnp.float32)
    tops = lax.bitcast_convert_type(
        jnp.max(packed.reshape(packed.shape[0], -1, group), axis=2), jnp.int32
    )
    # Without the column bits, so that between groups, too, equal scores go to the lowest.
    scores = lax.bitcast_convert_type(tops & ~mask, jnp.float32)
    score = jnp.max(scores, axis=1)
    which = _first_equal(scores, score)
    top = jnp.take_along_axis(tops, which[:, None], axis=1)[:, 0]
    column = jnp.where(top < 0, top & mask, mask - (top & mask))
    return score, which * group + column


def nearest_squared_distances(
    points_nd: Float[Array, "n d"], centroids_kd: Float[Array, "k d"], labels_n: Int[Array, "n"]
) -> Float[Array, "n"]:
    """Squared distance to the labelled centroid, by differences: exactly 0 for equal rows."""
    difference = points_nd - centroids_kd[labels_n]
    return jnp.sum(difference * difference, axis=1)


def default_platform(mesh: jax.sharding.Mesh | None) -> str:
    """Platform that will run the assignment: the mesh's, else jax's default."""
    return mesh.devices.flat[0].platform if mesh is not None else jax.default_backend()
