"""Batch and layer normalisation with float32 statistics, and unit vectors."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from protoclip_jax.models.layers import wide

EPSILON = 1e-5
MOMENTUM = 0.1


def unit(x: Float[Array | np.ndarray, "*rows d"]) -> Float[Array, "*rows d"]:
    """Rows divided by their L2 norm, in at least float32.

    A row shorter than 1e-12 becomes zero with a zero gradient, so that one dead row cannot put
    NaN or a huge gradient into a batch.
    """
    x = jnp.asarray(x, wide(x.dtype))
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    alive = ~(square <= 1e-24)  # so that NaN stays NaN: a diverged model must not look like zeros
    # The inner `where` keeps the unused branch's gradient finite.
    return jnp.where(alive, x * jax.lax.rsqrt(jnp.where(alive, square, 1.0)), 0.0)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis; returns the type of its input."""

    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.ones(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))

    def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "*rows c"]:
        """Normalises each row."""
        dtype, x = x.dtype, x.astype(wide(x.dtype))
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        scale = jax.lax.rsqrt(variance + EPSILON) * self.weight[...].astype(x.dtype)
        return (centred * scale + self.bias[...].astype(x.dtype)).astype(dtype)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last; returns the type of its input.

    As torch stores it, the running variance is the unbiased one. Under `jax.jit` the batch is the
    global one, however it is sharded. With `group`, every `group` consecutive rows have their own
    statistics, as on so many devices without synchronisation; the running statistics then take
    the mean over the groups.

    Args:
      width: channels.
      group: rows that share statistics; None for the whole batch.
      zero: start with a weight of 0 instead of 1.
    """

    def __init__(self, width: int, *, group: int | None = None, zero: bool = False):
        self.weight = nnx.Param((jnp.zeros if zero else jnp.ones)(width, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(width, jnp.float32))
        self.running_mean = nnx.BatchStat(jnp.zeros(width, jnp.float32))
        self.running_var = nnx.BatchStat(jnp.ones(width, jnp.float32))
        self.group = group

    def __call__(self, x: Float[Array, "b *hw c"], *, train: bool) -> Float[Array, "b *hw c"]:
        """Normalises; with `train` by the batch's statistics, which also move the running ones.

        Raises:
          ValueError: the batch cannot be cut into groups, or has a single value a channel.
        """
        grouped = x.reshape(self._groups(x.shape[0]) if train else 1, -1, *x.shape[1:])
        grouped = grouped.astype(wide(x.dtype))
        if train:
            mean, variance = self._batch_statistics(grouped)
        else:
            mean = self.running_mean[...].astype(grouped.dtype)
            variance = self.running_var[...].astype(grouped.dtype)
        scale = jax.lax.rsqrt(variance + EPSILON) * self.weight[...].astype(grouped.dtype)
        y = (grouped - mean) * scale + self.bias[...].astype(grouped.dtype)
        return y.astype(x.dtype).reshape(x.shape)

    def _groups(self, rows: int) -> int:
        group = self.group or rows
        if rows % group:
            raise ValueError(
                f"a batch of {rows} rows cannot be cut into groups of {group} for batch "
                "normalisation: make batch_norm_group divide the batch"
            )
        return rows // group

    def _batch_statistics(self, x_gbc: Array) -> tuple[Array, Array]:
        """Mean and biased variance of each group; moves the running statistics."""
        axes = tuple(range(1, x_gbc.ndim - 1))
        count = x_gbc[0, ..., 0].size
        if count < 2:
            raise ValueError(
                "batch normalisation in training needs more than one value a channel: use a "
                "larger batch or batch_norm_group"
            )
        mean = jnp.mean(x_gbc, axis=axes, keepdims=True)
        # Two passes, because the mean of squares less the squared mean loses the variance of
        # channels far from zero. d variance / d mean is 0, so its sum is not computed.
        centred = x_gbc - jax.lax.stop_gradient(mean)
        variance = jnp.mean(centred * centred, axis=axes, keepdims=True)
        self._move(self.running_mean, mean)
        self._move(self.running_var, variance * (count / (count - 1)))
        return mean, variance

    def _move(self, running: nnx.BatchStat, batch: Array) -> None:
        old = running[...]
        new = jnp.mean(batch, axis=tuple(range(batch.ndim - 1))).astype(old.dtype)
        running.set_value((1 - MOMENTUM) * old + MOMENTUM * jax.lax.stop_gradient(new))
