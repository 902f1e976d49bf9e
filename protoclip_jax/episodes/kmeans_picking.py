"""The largest score of each row of a tile, and in which column it lies."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

PACKED_GROUP = 256


def pick_exact(scores_tc: Array, group: int) -> tuple[Array, Array]:
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


def pick_packed(scores_tc: Array, group: int) -> tuple[Array, Array, Array]:
    """Maximum to 16 significant bits, its lowest column, and the largest other score.

    The column's number within its group takes the place of the low mantissa bits, so one plain
    maximum finds both. It counts down for positive and up for negative scores, whose bits order
    the other way round. No two scores of a group are then equal: the next is the largest below.
    """
    mask = PACKED_GROUP - 1
    bits = lax.bitcast_convert_type(scores_tc, jnp.int32)
    inside = jnp.arange(scores_tc.shape[1], dtype=jnp.int32) % group
    bits = (bits & ~mask) | jnp.where(bits < 0, inside, mask - inside)
    packed = lax.bitcast_convert_type(bits, jnp.float32)
    packed = packed.reshape(packed.shape[0], -1, group)
    tops = jnp.max(packed, axis=2)
    seconds = jnp.max(jnp.where(packed < tops[:, :, None], packed, -jnp.inf), axis=2)
    # Without the column bits, so that between groups, too, equal scores go to the lowest.
    top_bits = lax.bitcast_convert_type(tops, jnp.int32)
    scores = lax.bitcast_convert_type(top_bits & ~mask, jnp.float32)
    score = jnp.max(scores, axis=1)
    which = _first_equal(scores, score)[:, None]
    top = jnp.take_along_axis(top_bits, which, axis=1)[:, 0]
    column = jnp.where(top < 0, top & mask, mask - (top & mask))
    others = jnp.where(jnp.arange(tops.shape[1]) == which, seconds, tops)
    return score, which[:, 0] * group + column, jnp.max(others, axis=1)
