"""Features of a whole episode, from the model as it stands."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

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


class EpisodeFeatures:
    """Image and text features of an episode by position, filled batch by batch where they will lie.

    One buffer, which each batch is written into: nothing is held twice, and the writing is one
    small program for all batches of all episodes. A row goes where its position says, whatever the
    order of devices or batches; a position past the end is padding and goes nowhere.
    """

    def __init__(self, size: int, width: int, place: NamedSharding | None = None):
        """Allocates it.

        Args:
            size: Positions of the pass.
            width: Of the features.
            place: Where it lies; None: on one device.
        """
        self._size, self._write = size, _writer(place)
        self._features = jnp.full((2, size, width), jnp.nan, jnp.float32, device=place)
        self._count = jnp.zeros((), jnp.int32, device=place)

    def add(
        self,
        image_bd: Float[Array | np.ndarray, "b d"],
        text_bd: Float[Array | np.ndarray, "b d"],
        position_b: Int[Array | np.ndarray, " b"],
    ) -> Int[Array, ""]:
        """Takes the features of a batch, over all devices, and where in the episode they belong.

        Returns:
            How many rows came so far: there as soon as the batch is written.
        """
        self._features, self._count = self._write(
            self._features, self._count, image_bd, text_bd, position_b
        )
        return self._count

    def whole(self) -> Float[Array, "2 n d"]:
        """The features, image before text; no batch follows.

        Raises:
            RuntimeError: Fewer rows came than the episode has positions, or more.
        """
        if (rows := int(self._count)) != self._size:
            raise RuntimeError(f"extraction gave {rows} rows for {self._size} episode positions")
        features, self._features = self._features, None
        return features


@functools.cache
def _writer(place: NamedSharding | None) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Compiled once a run: `jax.jit` knows a function by its identity."""

    def write(features, count, image_bd, text_bd, position_b):
        rows = jnp.stack([image_bd, text_bd])
        if place is not None:  # rows of all devices, wherever they are wanted
            everywhere = NamedSharding(place.mesh, PartitionSpec())
            rows = jax.lax.with_sharding_constraint(rows, everywhere)
            position_b = jax.lax.with_sharding_constraint(position_b, everywhere)
        features = features.at[:, position_b].set(rows, mode="drop", unique_indices=True)
        return features, count + jnp.sum(position_b < features.shape[1], dtype=jnp.int32)

    return jax.jit(write, donate_argnums=0, out_shardings=place)
