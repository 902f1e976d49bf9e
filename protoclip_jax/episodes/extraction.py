"""Features of a whole episode, from the model as it stands."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from protoclip_jax.models import clip

ExtractStep = Callable[[dict, dict, dict, Any], tuple[jax.Array, jax.Array]]


def make_extract_step(graphdef: nnx.GraphDef, prepare: Callable[..., jax.Array]) -> ExtractStep:
    """Builds the forward pass of one batch; the caller compiles it.

    Args:
      graphdef: the model without its arrays.
      prepare: (uint8 images, episode, positions) -> what the image tower takes.

    The step takes params, batch_stats, a batch ("image", "tokens", "position") and the episode,
    and returns the projected, L2-normalised image and text features, float32 (b, d). Batch
    normalisation uses running statistics, as the reference's extraction does.
    """

    def extract_step(params, batch_stats, batch, episode):
        images = prepare(batch["image"], episode, batch["position"])
        features, _ = clip.apply(
            graphdef, params, batch_stats, images, batch["tokens"], train=False, project=True
        )
        return features.image_projected, features.text_projected

    return extract_step


def in_episode_order(
    batches: Iterable[tuple[Array, Array]], size: int
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Joins the features of consecutive batches; what pads the last one is cut off.

    Raises:
      RuntimeError: fewer rows came than the episode has positions.
    """
    image, text = (jnp.concatenate(parts) for parts in zip(*batches, strict=True))
    if image.shape[0] < size:
        raise RuntimeError(f"extraction gave {image.shape[0]} rows for {size} episode positions")
    return image[:size], text[:size]
