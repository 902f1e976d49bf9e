"""Features of a whole episode, from the model as it stands."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, Sharding
from jaxtyping import Array, Float

from protoclip_jax.models import clip, sharding

ExtractStep = Callable[[dict, dict, dict, Any], tuple[jax.Array, jax.Array]]


def make_extract_step(
    graphdef: nnx.GraphDef,
    prepare: Callable[..., jax.Array],
    mesh: Mesh | None,
    dtype: jax.typing.DTypeLike,
) -> ExtractStep:
    """Builds the forward pass of one batch; the caller compiles it.

    Args:
      graphdef: the model without its arrays.
      prepare: (uint8 images, episode, positions) -> what the image tower takes.
      mesh: over which the parameters are cut, if they are.
      dtype: the model's compute type.

    The step takes params, batch_stats, a batch ("image", "tokens", "position") and the episode,
    and returns the projected, L2-normalised image and text features, float32 (b, d). Batch
    normalisation uses running statistics, as the reference's extraction does.
    """

    def extract_step(params, batch_stats, batch, episode):
        images = prepare(batch["image"], episode, batch["position"])
        features, _ = clip.apply(
            graphdef,
            sharding.gathered(params, mesh, dtype),
            batch_stats,
            images,
            batch["tokens"],
            train=False,
            project=True,
        )
        return features.image_projected, features.text_projected

    return extract_step


def in_episode_order(
    batches: Iterable[tuple[Array, Array]], size: int, place: Sharding | None = None
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
    """Joins the features of consecutive batches; what pads the last one is cut off.

    Args:
      batches: image and text features (b, d), over all devices.
      size: positions of the pass.
      place: where the result lies; None: where it is made.

    Raises:
      RuntimeError: fewer rows came than the episode has positions.
    """
    images, texts = zip(*batches, strict=True)
    rows = sum(part.shape[0] for part in images)
    if rows < size:
        raise RuntimeError(f"extraction gave {rows} rows for {size} episode positions")

    def join(*parts):
        return jnp.concatenate(parts)[:size]

    # Compiled, since the devices of several processes take no other way.
    joined = jax.jit(join, out_shardings=place)
    return joined(*images), joined(*texts)
