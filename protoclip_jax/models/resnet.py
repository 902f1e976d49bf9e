"""CLIP's ModifiedResNet: three-convolution stem, anti-aliased strides, attention pooling."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from protoclip_jax.models.layers import BLOCK, Conv, Linear, average_pool, wide
from protoclip_jax.models.normalization import BatchNorm
from protoclip_jax.models.presets import ResNetConfig
from protoclip_jax.models.start import Draws, normal
from protoclip_jax.models.transformer import attend

EXPANSION = 4


class Downsample(nnx.Module):
    """The shortcut of a block that changes size: average pooling, 1x1 convolution, norm."""

    def __init__(self, inputs: int, outputs: int, stride: int, group, *, dtype, draws: Draws):
        self.conv = Conv(inputs, outputs, 1, dtype=dtype, draws=draws)
        self.bn = BatchNorm(outputs, group=group)
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w i"], *, train: bool) -> Float[Array, "b p q o"]:
        """The shortcut; `train` uses and moves batch statistics."""
        return self.bn(self.conv(average_pool(x, self.stride)), train=train)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions around a shortcut; a stride is a pool before the third."""

    def __init__(self, inputs: int, width: int, stride: int, group, *, dtype, draws: Draws):
        outputs = EXPANSION * width
        options = {"dtype": dtype, "draws": draws}
        self.conv1 = Conv(inputs, width, 1, **options)
        self.bn1 = BatchNorm(width, group=group)
        self.conv2 = Conv(width, width, 3, **options)
        self.bn2 = BatchNorm(width, group=group)
        self.conv3 = Conv(width, outputs, 1, **options)
        # A weight of zero: at the start every block is its shortcut.
        self.bn3 = BatchNorm(outputs, group=group, zero=True)
        changes = stride > 1 or inputs != outputs
        self.downsample = Downsample(inputs, outputs, stride, group, **options) if changes else None
        self.stride = stride

    def __call__(self, x: Float[Array, "b h w i"], *, train: bool) -> Float[Array, "b p q o"]:
        """The block's output; `train` uses and moves batch statistics."""
        y = jax.nn.relu(self.bn1(self.conv1(x), train=train))
        y = jax.nn.relu(self.bn2(self.conv2(y), train=train))
        y = self.bn3(self.conv3(average_pool(y, self.stride)), train=train)
        shortcut = x if self.downsample is None else self.downsample(x, train=train)
        return jax.nn.relu(y + shortcut)


class AttentionPool(nnx.Module):
    """Attention of one query, the mean token, over all positions and itself."""

    def __init__(self, side: int, width: int, heads: int, outputs: int, *, dtype, draws: Draws):
        draw = normal(width**-0.5)
        options = {"kernel": draw, "dtype": dtype, "draws": draws}
        self.positional_embedding = nnx.Param(draw(draws, (side * side + 1, width)))
        self.q_proj = Linear(width, width, **options)
        self.k_proj = Linear(width, width, **options)
        self.v_proj = Linear(width, width, **options)
        self.c_proj = Linear(width, outputs, output_dtype=wide(dtype), **options)
        self.heads = heads

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b e"]:
        """The pooled embedding in at least float32."""
        b, c = x.shape[0], x.shape[-1]
        x = x.reshape(b, -1, c)
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = x + self.positional_embedding[...].astype(x.dtype)
        q, k, v = (
            tokens.reshape(b, -1, self.heads, c // self.heads)
            for tokens in (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        )
        return self.c_proj(attend(q, k, v).reshape(b, c))


class ModifiedResNet(nnx.Module):
    """The image tower of CLIP's RN models.

    Args:
      config: sizes.
      embed_dim: width of the embedding.
      group: rows that share batch statistics; None for the whole batch.
      dtype: compute type.
      draws: random numbers for the start.
    """

    def __init__(
        self, config: ResNetConfig, embed_dim: int, group: int | None, *, dtype, draws: Draws
    ):
        width = config.width
        options = {"dtype": dtype, "draws": draws}
        self.conv1 = Conv(3, width // 2, 3, stride=2, **options)
        self.bn1 = BatchNorm(width // 2, group=group)
        self.conv2 = Conv(width // 2, width // 2, 3, **options)
        self.bn2 = BatchNorm(width // 2, group=group)
        self.conv3 = Conv(width // 2, width, 3, **options)
        self.bn3 = BatchNorm(width, group=group)
        inputs = width
        for i, blocks in enumerate(config.layers):
            stage, inputs = _stage(inputs, width * 2**i, blocks, min(i, 1) + 1, group, **options)
            setattr(self, f"layer{i + 1}", stage)
        self.attnpool = AttentionPool(
            config.image_size // 32, inputs, config.heads, embed_dim, **options
        )

    def __call__(
        self, images: Float[Array, "b h w 3"], *, train: bool = False
    ) -> Float[Array, "b e"]:
        """The embeddings in at least float32; `train` uses and moves batch statistics."""
        x = self.stem(images, train=train)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = checkpoint_name(block(x, train=train), BLOCK)
        return self.attnpool(x)

    def stem(self, images: Float[Array, "b h w 3"], *, train: bool) -> Float[Array, "b p q c"]:
        """Three convolutions and a pool: a quarter of the size."""
        x = jax.nn.relu(self.bn1(self.conv1(images), train=train))
        x = jax.nn.relu(self.bn2(self.conv2(x), train=train))
        x = jax.nn.relu(self.bn3(self.conv3(x), train=train))
        return average_pool(x, 2)


def _stage(
    inputs: int, width: int, blocks: int, stride: int, group, *, dtype, draws: Draws
) -> tuple[nnx.List, int]:
    """The blocks of a stage, of which the first may stride, and their number of channels."""
    stage = []
    for i in range(blocks):
        block = Bottleneck(inputs, width, 1 if i else stride, group, dtype=dtype, draws=draws)
        stage.append(block)
        inputs = EXPANSION * width
    return nnx.List(stage), inputs
