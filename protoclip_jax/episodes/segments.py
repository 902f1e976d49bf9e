"""Sums of rows by label that do not depend on the order in which they are added."""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

_MANTISSA_BITS = 24


def segment_counts(labels: Int[Array, "n"], num_segments: int) -> Int[Array, "k"]:
    """Members of each segment; labels outside [0, num_segments) count nowhere."""
    return _add(jnp.ones_like(labels), labels, num_segments)


def segment_sums(
    values: Float[Array, "n d"], labels: Int[Array, "n"], num_segments: int
) -> Float[Array, "k d"]:
    """Float sums in row order: fast, and repeatable where scatters run in order (CPU, TPU)."""
    return _add(values, labels, num_segments)


def exact_segment_sums(
    values: Float[Array, "n d"], labels: Int[Array, "n"], num_segments: int
) -> Float[Array, "k d"]:
    """Sums through integers: the same bits for any order of rows, device count and sharding.

    Each value becomes a few int32 limbs relative to the largest magnitude in `values`; each limb
    is so narrow that n of them cannot overflow. Integer sums are associative, so atomics on a GPU
    and partial sums on many devices agree bit for bit, which float sums do not. The quantisation
    error is at most 2^-24 of the largest magnitude for each row.

    Args:
      values: finite rows.
      labels: segment of each row; rows with a label outside [0, num_segments) are left out.
      num_segments: k.
    """
    bits = min(_MANTISSA_BITS, 30 - int(np.ceil(np.log2(max(values.shape[0], 2)))))
    if bits < 1:
        raise ValueError(f"{values.shape[0]} rows are too many for sums in 32-bit integers")
    _, exponent = jnp.frexp(jnp.max(jnp.abs(values), initial=0.0))
    rest = jnp.ldexp(values, -exponent)
    total = jnp.zeros((num_segments, values.shape[1]), values.dtype)
    scale = 1.0
    for _ in range(-(-_MANTISSA_BITS // bits)):
        rest = rest * 2.0**bits
        limb = jnp.round(rest)
        rest = rest - limb
        scale = scale * 2.0**-bits
        sums = _add(limb.astype(jnp.int32), labels, num_segments)
        total = total + sums.astype(values.dtype) * jnp.asarray(scale, values.dtype)
    return jnp.ldexp(total, exponent)


def _add(values: Array, labels: Array, num_segments: int) -> Array:
    # Negative labels would wrap around; out-of-range ones are dropped.
    labels = jnp.where(labels < 0, num_segments, labels)
    start = jnp.zeros((num_segments, *values.shape[1:]), values.dtype)
    return start.at[labels].add(values, mode=lax.GatherScatterMode.FILL_OR_DROP)


def segment_means(
    values: Float[Array, "n d"], labels: Int[Array, "n"], num_segments: int
) -> tuple[Float[Array, "k d"], Int[Array, "k"]]:
    """Means by label and the number of rows in each; an empty segment has mean zero.

    Rows that are not finite are left out of both. float32 (or narrower) values are summed exactly
    (`exact_segment_sums`); float64 ones plainly.
    """
    values = values.astype(jnp.promote_types(values.dtype, jnp.float32))
    finite = jnp.all(jnp.isfinite(values), axis=1)
    labels = jnp.where(finite, labels, num_segments)
    values = jnp.where(finite[:, None], values, 0)
    add = exact_segment_sums if values.dtype == jnp.float32 else segment_sums
    counts = segment_counts(labels, num_segments)
    means = add(values, labels, num_segments) / jnp.maximum(counts, 1)[:, None]
    return means, counts
