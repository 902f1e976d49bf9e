"""The transformer of both towers: pre-norm blocks of attention and MLP."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from protoclip_jax.models.layers import BLOCK, Linear, activate, wide
from protoclip_jax.models.normalization import LayerNorm
from protoclip_jax.models.start import Distribution, Draws, normal, uniform, zeros


class BlockStart(NamedTuple):
    """How the four weight matrices of a block are filled; None is torch's default for Linear."""

    in_proj: Distribution
    out_proj: Distribution | None = None
    c_fc: Distribution | None = None
    c_proj: Distribution | None = None


def torch_start(width: int) -> BlockStart:
    """The image tower's start: torch's defaults (Xavier-uniform for the packed q, k and v)."""
    return BlockStart(uniform(math.sqrt(6 / (4 * width))))


def clip_start(width: int, layers: int) -> BlockStart:
    """The text tower's start: normal, the residual branches scaled down by depth."""
    residual = normal(width**-0.5 * (2 * layers) ** -0.5)
    return BlockStart(normal(width**-0.5), residual, normal((2 * width) ** -0.5), residual)


def attend(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    *,
    causal: bool = False,
) -> Float[Array, "b t h d"]:
    """Scaled dot-product attention with the softmax in at least float32."""
    logits = jnp.einsum(
        "bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k, preferred_element_type=wide(q.dtype)
    )
    if causal:
        past = jnp.tril(jnp.ones(logits.shape[-2:], bool))
        logits = jnp.where(past, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhts,bshd->bthd", weights, v)


class Attention(nnx.Module):
    """Multi-head self-attention with packed q, k, v."""

    def __init__(self, width: int, heads: int, start: BlockStart, *, dtype, draws: Draws):
        options = {"bias": zeros, "dtype": dtype, "draws": draws}
        self.in_proj = Linear(width, 3 * width, kernel=start.in_proj, **options)
        self.out_proj = Linear(width, width, kernel=start.out_proj, **options)
        self.heads = heads

    def __call__(self, x: Float[Array, "b t c"], *, causal: bool) -> Float[Array, "b t c"]:
        """Mixes the tokens; with `causal` each sees only itself and earlier ones."""
        b, t, c = x.shape
        packed = self.in_proj(x).reshape(b, t, 3, self.heads, c // self.heads)
        mixed = attend(packed[:, :, 0], packed[:, :, 1], packed[:, :, 2], causal=causal)
        return self.out_proj(mixed.reshape(b, t, c))


class MLP(nnx.Module):
    """Two Linear layers, `inner` wide in between."""

    def __init__(
        self, width: int, inner: int, activation: str, start: BlockStart, *, dtype, draws: Draws
    ):
        self.c_fc = Linear(width, inner, kernel=start.c_fc, dtype=dtype, draws=draws)
        self.c_proj = Linear(inner, width, kernel=start.c_proj, dtype=dtype, draws=draws)
        self.activation = activation

    def __call__(self, x: Float[Array, "b t c"]) -> Float[Array, "b t c"]:
        """Each token for itself."""
        return self.c_proj(activate(self.c_fc(x), self.activation))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        inner: int,
        activation: str,
        start: BlockStart,
        *,
        dtype,
        draws: Draws,
    ):
        self.ln_1 = LayerNorm(width)
        self.attn = Attention(width, heads, start, dtype=dtype, draws=draws)
        self.ln_2 = LayerNorm(width)
        self.mlp = MLP(width, inner, activation, start, dtype=dtype, draws=draws)

    def __call__(self, x: Float[Array, "b t c"], *, causal: bool) -> Float[Array, "b t c"]:
        """The block's output; `causal` as in `Attention`."""
        x = x + self.attn(self.ln_1(x), causal=causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nnx.Module):
    """A stack of blocks."""

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        activation: str,
        start: BlockStart,
        *,
        mlp: int | None = None,
        dtype,
        draws: Draws,
    ):
        """Args:
        width: of the tokens.
        layers: number of blocks.
        heads: of the attention; divides the width.
        activation: of the MLPs.
        start: how the weights are filled.
        mlp: width inside the MLPs; None for four times the width.
        dtype: compute type.
        draws: random numbers for the start.
        """
        inner = mlp or 4 * width
        self.resblocks = nnx.List(
            [
                Block(width, heads, inner, activation, start, dtype=dtype, draws=draws)
                for _ in range(layers)
            ]
        )

    def __call__(self, x: Float[Array, "b t c"], *, causal: bool) -> Float[Array, "b t c"]:
        """The last block's output; `causal` as in `Attention`."""
        for block in self.resblocks:
            x = checkpoint_name(block(x, causal=causal), BLOCK)
        return x
