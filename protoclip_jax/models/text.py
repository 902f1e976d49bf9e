"""CLIP's text tower."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from protoclip_jax.models.layers import wide
from protoclip_jax.models.normalization import LayerNorm
from protoclip_jax.models.presets import TextConfig
from protoclip_jax.models.start import Draws, normal
from protoclip_jax.models.transformer import Transformer, clip_start


class TextTransformer(nnx.Module):
    """A causal transformer; the end-of-text token's output is the text's embedding.

    Because it is causal, tokens after the end change nothing: a batch may be cut to its longest
    text.

    Args:
      config: sizes.
      embed_dim: width of the embedding.
      activation: of the MLPs.
      dtype: compute type.
      draws: random numbers for the start.
    """

    def __init__(self, config: TextConfig, embed_dim: int, activation: str, *, dtype, draws: Draws):
        width = config.width
        self.token_embedding = nnx.Param(normal(0.02)(draws, (config.vocab_size, width)))
        self.positional_embedding = nnx.Param(normal(0.01)(draws, (config.context_length, width)))
        self.transformer = Transformer(
            width,
            config.layers,
            config.heads,
            activation,
            clip_start(width, config.layers),
            dtype=dtype,
            draws=draws,
        )
        self.ln_final = LayerNorm(width)
        self.text_projection = nnx.Param(normal(width**-0.5)(draws, (width, embed_dim)))
        self.dtype = jnp.dtype(dtype)

    def __call__(self, tokens: Int[Array, "b t"]) -> Float[Array, "b e"]:
        """The embeddings in at least float32.

        Args:
          tokens: ids, padded with anything below the end-of-text id, which is the vocabulary's
            largest: the first largest id of a row marks the output taken.

        Raises:
          ValueError: more tokens than the context.
        """
        x = self.transformer(self.embed(tokens), causal=True)
        end = tokens.argmax(-1)[:, None, None]
        x = self.ln_final(jnp.take_along_axis(x, end, axis=1)[:, 0])
        return jnp.matmul(
            x,
            self.text_projection[...].astype(self.dtype),
            preferred_element_type=wide(self.dtype),
        )

    def embed(self, tokens: Int[Array, "b t"]) -> Float[Array, "b t c"]:
        """Token plus position."""
        position = self.positional_embedding[...]
        if tokens.shape[1] > position.shape[0]:
            raise ValueError(
                f"texts of {tokens.shape[1]} tokens: this model reads at most "
                f"{position.shape[0]}; tokenise with that context length"
            )
        x = jnp.take(self.token_embedding[...], tokens, axis=0).astype(self.dtype)
        return x + position[: tokens.shape[1]].astype(self.dtype)
