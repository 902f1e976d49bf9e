"""The whole model, and the pure functions that the rest of the package calls."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from protoclip_jax.models.normalization import unit
from protoclip_jax.models.presets import CLIPConfig, ResNetConfig
from protoclip_jax.models.projection import ProjectionHead
from protoclip_jax.models.resnet import ModifiedResNet
from protoclip_jax.models.start import Draws
from protoclip_jax.models.text import TextTransformer
from protoclip_jax.models.vit import VisionTransformer

Tree = dict[str, Any]

LOGIT_SCALE = math.log(1 / 0.07)


class Features(NamedTuple):
    """L2-normalised features of a batch of pairs, in at least float32.

    Attributes:
      image: (b, e).
      text: (b, e).
      image_projected: (b, d), or None where the heads did not run.
      text_projected: (b, d), likewise.
    """

    image: Array
    text: Array
    image_projected: Array | None = None
    text_projected: Array | None = None


class CLIP(nnx.Module):
    """Two towers, ProtoCLIP's two heads if the config has them, and the log temperatures.

    Args:
      config: sizes.
      dtype: compute type (bfloat16, float32, float64); parameters are float32.
      draws: random numbers for the start.
    """

    def __init__(
        self, config: CLIPConfig, *, dtype: jax.typing.DTypeLike = jnp.float32, draws: Draws
    ):
        group = config.batch_norm_group
        if isinstance(config.vision, ResNetConfig):
            self.visual = ModifiedResNet(
                config.vision, config.embed_dim, group, dtype=dtype, draws=draws
            )
        else:
            self.visual = VisionTransformer(
                config.vision, config.embed_dim, config.activation, dtype=dtype, draws=draws
            )
        self.text = TextTransformer(
            config.text, config.embed_dim, config.activation, dtype=dtype, draws=draws
        )
        self.logit_scale = nnx.Param(jnp.asarray(LOGIT_SCALE, jnp.float32))
        # The same draws for both: the heads start equal, as the reference's deepcopy makes them.
        self.image_projection_head = _head(config, dtype, draws.copy())
        self.text_projection_head = _head(config, dtype, draws)
        self.logit_scale_proto = (
            nnx.Param(jnp.asarray(LOGIT_SCALE, jnp.float32)) if config.projection else None
        )
        self.image_size = config.vision.image_size

    def encode_image(
        self, images: Float[Array | np.ndarray, "b h w 3"], *, train: bool = False
    ) -> Float[Array, "b e"]:
        """Embeddings, not normalised, of pictures that are (per channel, as the tower expects).

        Raises:
          ValueError: the pictures do not have the model's size.
        """
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"pictures of {images.shape[1]}x{images.shape[2]} pixels: this model reads "
                f"{self.image_size}x{self.image_size}; resize them or choose another preset"
            )
        return self.visual(jnp.asarray(images), train=train)

    def encode_text(
        self, tokens: Int[Array | np.ndarray, "b t"], *, train: bool = False
    ) -> Float[Array, "b e"]:
        """Embeddings, not normalised, of token ids; `train` changes nothing in this tower.

        Raises:
          ValueError: more tokens than the model's context.
        """
        return self.text(jnp.asarray(tokens))

    def __call__(
        self,
        images: Float[Array | np.ndarray, "b h w 3"],
        tokens: Int[Array | np.ndarray, "b t"],
        *,
        train: bool,
        train_image: bool | None = None,
        project: bool = True,
    ) -> Features:
        """Features of a batch of pairs.

        Args:
          images: normalised pictures.
          tokens: token ids.
          train: use and move batch statistics.
          train_image: the same for the image tower alone (False: a locked tower); None: as
            `train`. The heads always follow `train`.
          project: run the projection heads, if there are any. They read the un-normalised
            embeddings.
        """
        image = self.encode_image(images, train=train if train_image is None else train_image)
        text = self.encode_text(tokens, train=train)
        if not project or self.image_projection_head is None:
            return Features(unit(image), unit(text))
        return Features(
            unit(image),
            unit(text),
            unit(self.image_projection_head(image, train=train)),
            unit(self.text_projection_head(text, train=train)),
        )


def _head(config: CLIPConfig, dtype, draws: Draws) -> ProjectionHead | None:
    if config.projection is None:
        return None
    return ProjectionHead(
        config.embed_dim, config.projection, config.batch_norm_group, dtype=dtype, draws=draws
    )


def initialise(
    config: CLIPConfig, seed: int | Array, dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef, Tree, Tree]:
    """A fresh model: its definition, parameters and batch statistics.

    Pure, so it also runs under `jax.eval_shape` (shapes only) and `jax.jit` (with shardings of the
    result); the definition has no leaves, and two of the same config and dtype are equal.

    Args:
      config: sizes.
      seed: an integer, or a typed key of `jax.random.key`.
      dtype: compute type; the parameters are float32 whatever it is.

    Returns:
      The definition for `apply`, and two nested dicts with string keys and float32 arrays.
    """
    key = seed
    if not (isinstance(seed, Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)):
        key = jax.random.key(seed)
    return split(CLIP(config, dtype=dtype, draws=Draws(key)))


def apply(
    graphdef: nnx.GraphDef,
    params: Tree,
    batch_stats: Tree,
    images: Float[Array | np.ndarray, "b h w 3"],
    tokens: Int[Array | np.ndarray, "b t"],
    *,
    train: bool,
    train_image: bool | None = None,
    project: bool = True,
) -> tuple[Features, Tree]:
    """Features of a batch and the moved batch statistics; see `CLIP.__call__`.

    Without `train` the statistics come back as they were.
    """
    model = bind(graphdef, params, batch_stats)
    features = model(images, tokens, train=train, train_image=train_image, project=project)
    return features, _to_dict(nnx.state(model, nnx.BatchStat))


def apply_image(
    graphdef: nnx.GraphDef,
    params: Tree,
    batch_stats: Tree,
    images: Float[Array | np.ndarray, "b h w 3"],
) -> Float[Array, "b e"]:
    """Embeddings of pictures with the running statistics; not normalised."""
    return bind(graphdef, params, batch_stats).encode_image(images)


def apply_text(
    graphdef: nnx.GraphDef,
    params: Tree,
    batch_stats: Tree,
    tokens: Int[Array | np.ndarray, "b t"],
) -> Float[Array, "b e"]:
    """Embeddings of token ids; not normalised."""
    return bind(graphdef, params, batch_stats).encode_text(tokens)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """A module's definition, parameters and batch statistics; the inverse of `bind`."""
    graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return graphdef, _to_dict(params), _to_dict(batch_stats)


def bind(graphdef: nnx.GraphDef, params: Tree, batch_stats: Tree) -> nnx.Module:
    """A module that holds these arrays, to call its parts; changing it changes no argument.

    Takes a few milliseconds of the host for a large model: call it inside what is traced.
    """
    return nnx.merge(graphdef, _to_numbered(params), _to_numbered(batch_stats), copy=True)


def _to_dict(state: nnx.State) -> Tree:
    """Plain nested dicts with string keys (NNX numbers the items of a list)."""

    def rename(node):
        if isinstance(node, dict):
            return {str(key): rename(value) for key, value in node.items()}
        return node

    return rename(nnx.to_pure_dict(state))


def _to_numbered(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {int(k) if k.isdigit() else k: _to_numbered(v) for k, v in tree.items()}
    return jnp.asarray(tree)
