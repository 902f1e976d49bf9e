"""Linear and convolution layers and activations.

Every layer keeps float32 parameters and computes in the type it was built with; its matrix
products are accumulated, and optionally returned, in at least float32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from protoclip_jax.models.start import Distribution, Draws, uniform

BLOCK = "block"  # what the towers' blocks call their outputs, for rematerialisation to keep


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The type for sums, softmaxes and outputs: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def activate(x: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """ "quickgelu": x sigmoid(1.702 x); "gelu": x times the normal distribution function."""
    if name == "quickgelu":
        return x * jax.nn.sigmoid(1.702 * x)
    return jax.nn.gelu(x, approximate=False)


class Linear(nnx.Module):
    """x W + b with W of shape (inputs, outputs).

    The start is torch's default, uniform within 1/sqrt(inputs), unless `kernel` and `bias` say
    otherwise.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: Distribution | None = None,
        bias: Distribution | None = None,
        dtype: jax.typing.DTypeLike,
        output_dtype: jax.typing.DTypeLike | None = None,
        draws: Draws,
    ):
        default = uniform(1 / math.sqrt(inputs))
        self.kernel = nnx.Param((kernel or default)(draws, (inputs, outputs)))
        self.bias = nnx.Param((bias or default)(draws, (outputs,)))
        self.dtype = jnp.dtype(dtype)
        self.output_dtype = jnp.dtype(output_dtype or dtype)

    def __call__(self, x: Float[Array, "*rows i"]) -> Float[Array, "*rows o"]:
        """The product in `output_dtype`, which is the compute type unless told otherwise."""
        kernel = self.kernel[...].astype(self.dtype)
        y = jnp.matmul(x.astype(self.dtype), kernel, preferred_element_type=self.output_dtype)
        return y + self.bias[...].astype(self.output_dtype)


class Conv(nnx.Module):
    """Square convolution without bias, NHWC pictures and HWIO kernel, started as torch does."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        stride: int = 1,
        dtype: jax.typing.DTypeLike,
        draws: Draws,
    ):
        bound = 1 / math.sqrt(inputs * size * size)
        self.kernel = nnx.Param(uniform(bound)(draws, (size, size, inputs, outputs)))
        self.stride = stride
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b p q o"]:
        """Padded to keep the size (a stride divides it); no padding for patches."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        size = kernel.shape[0]
        if size == self.stride:
            # Patches do not overlap: one matrix product, faster than a convolution on CPU.
            b, h, w, i = x.shape
            patches = x.reshape(b, h // size, size, w // size, size, i)
            return jnp.einsum("bpyqxi,yxio->bpqo", patches, kernel)
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            [((size - 1) // 2,) * 2] * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


def average_pool(x: Float[Array, "b h w c"], size: int) -> Float[Array, "b p q c"]:
    """Means of non-overlapping squares; `size` divides the height and the width."""
    if size == 1:
        return x
    b, h, w, c = x.shape
    return x.reshape(b, h // size, size, w // size, size, c).mean((2, 4))
