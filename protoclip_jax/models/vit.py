"""CLIP's vision transformer."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from protoclip_jax.models.layers import Conv, wide
from protoclip_jax.models.normalization import LayerNorm
from protoclip_jax.models.presets import ViTConfig
from protoclip_jax.models.start import Draws, normal
from protoclip_jax.models.transformer import Transformer, torch_start


class VisionTransformer(nnx.Module):
    """Patches and a class token through a transformer; the class token is the picture's embedding.

    Args:
      config: sizes.
      embed_dim: width of the embedding.
      activation: of the MLPs.
      dtype: compute type.
      draws: random numbers for the start.
    """

    def __init__(self, config: ViTConfig, embed_dim: int, activation: str, *, dtype, draws: Draws):
        width = config.width
        draw = normal(width**-0.5)
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.conv1 = Conv(
            3, width, config.patch_size, stride=config.patch_size, dtype=dtype, draws=draws
        )
        self.class_embedding = nnx.Param(draw(draws, (width,)))
        self.positional_embedding = nnx.Param(draw(draws, (tokens, width)))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            activation,
            torch_start(width),
            mlp=config.mlp,
            dtype=dtype,
            draws=draws,
        )
        self.ln_post = LayerNorm(width)
        self.proj = nnx.Param(draw(draws, (width, embed_dim)))
        self.dtype = jnp.dtype(dtype)

    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool = False
    ) -> Float[Array, "b e"]:
        """The embeddings in at least float32; `train` changes nothing in this tower."""
        patches = self.conv1(images)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        first = jnp.broadcast_to(
            self.class_embedding[...].astype(self.dtype),
            (patches.shape[0], 1, patches.shape[-1]),
        )
        x = jnp.concatenate([first, patches], axis=1)
        x = self.ln_pre(x + self.positional_embedding[...].astype(self.dtype))
        x = self.ln_post(self.transformer(x, causal=False)[:, 0])
        return jnp.matmul(
            x, self.proj[...].astype(self.dtype), preferred_element_type=wide(self.dtype)
        )
