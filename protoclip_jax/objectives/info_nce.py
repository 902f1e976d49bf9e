"""InfoNCE: every image against every text of the global batch, both ways."""

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from protoclip_jax.objectives.logits import cross_entropy, similarity, wide
from protoclip_jax.objectives.shards import gathered, over_rows, positions, summed


def info_nce(
    image_bd: Float[Array | np.ndarray, "b d"],
    text_bd: Float[Array | np.ndarray, "b d"],
    logit_scale: Float[Array | np.ndarray, ""],
    *,
    mesh: Mesh | None = None,
) -> Float[Array, ""]:
    """CLIP's loss: mean of both cross-entropies of exp(s) I T' (reference: `ClipLoss`).

    Every other row is a negative, whatever it shows: where a batch holds a pair twice, or two
    images with equal captions, the loss pushes apart what is the same. `prepare stats` counts
    such pairs, and training warns of those that a list repeats.

    Args:
        image_bd: L2-normalised image features of the global batch.
        text_bd: L2-normalised text features; row i belongs to image i.
        logit_scale: s, the raw (log) parameter.
        mesh: Spreads the rows over all its axes: a device then holds only (b / devices, b) logits.

    Returns:
        The loss, float32 or wider, with gradients equal to those of one device.

    Raises:
        ValueError: The devices of the mesh do not divide b.
    """
    return over_rows(_info_nce, mesh, (image_bd, text_bd), (logit_scale,))


def _info_nce(image_bd, text_bd, logit_scale, axes):
    image_bd, text_bd, logit_scale = wide(image_bd, text_bd, logit_scale)
    scale = jnp.exp(logit_scale)
    own_b = positions(image_bd.shape[0], axes)
    image_loss_b = cross_entropy(scale * similarity(image_bd, gathered(text_bd, axes)), own_b)
    text_loss_b = cross_entropy(scale * similarity(text_bd, gathered(image_bd, axes)), own_b)
    total = summed(jnp.sum(image_loss_b) + jnp.sum(text_loss_b), axes)
    rows = summed(jnp.asarray(image_bd.shape[0], total.dtype), axes)
    return total / (2 * rows)
