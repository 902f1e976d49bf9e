"""Wide logits and their cross-entropy: the arithmetic both losses share."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def wide(*arrays: Float[Array | np.ndarray, "..."]) -> tuple[Float[Array, "..."], ...]:
    """All arrays in their common type, float32 at least (float64 stays)."""
    dtype = jnp.promote_types(jnp.result_type(*arrays), jnp.float32)
    return tuple(jnp.asarray(array, dtype) for array in arrays)


def similarity(
    rows_bd: Float[Array, "b d"], columns_kd: Float[Array, "k d"]
) -> Float[Array, "b k"]:
    """Dot product of every row with every column.

    At full precision: on a GPU or TPU the default would round the factors to TF32 or bfloat16,
    and a logit scale of 100 turns that rounding into whole units of logit.
    """
    return jnp.matmul(rows_bd, columns_kd.T, precision=jax.lax.Precision.HIGHEST)


def cross_entropy(logits_bk: Float[Array, "b k"], labels_b: Int[Array, " b"]) -> Float[Array, " b"]:
    """-log softmax(logits)[label] of every row; 0 for a label outside [0, k)."""
    # A mask instead of a gather: its gradient is no scatter, so it is deterministic everywhere.
    own_bk = jnp.arange(logits_bk.shape[1]) == labels_b[:, None]
    return -jnp.sum(jnp.where(own_bk, jax.nn.log_softmax(logits_bk), 0), axis=1)
