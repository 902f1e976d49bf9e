"""Floating-point operations of a function, counted in its jaxpr: the same on every platform.

XLA's own count is not to be had on GPUs before the program is optimised, and afterwards products
and convolutions are calls into libraries, which count as nothing.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np


def flops(jaxpr: Any) -> float:
    """Operations of all products and convolutions, over all devices; a multiply-add counts 2.

    What is computed element by element is left out (a hundredth of a training step). A
    convolution's padding and the zeros of its dilation count as nothing. The body of a `while`
    counts once, since nobody knows how often it runs.

    Args:
      jaxpr: of the whole function, with global shapes, as `jax.jit(f).trace(...).jaxpr` is.
    """
    return float(_total(jaxpr))


def _total(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in _open(jaxpr).eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    inner = [_total(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner)
    if name == "shard_map":  # its shapes are those of one device; ours go over all axes
        return params["mesh"].size * sum(inner)
    return sum(inner)


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution(equation: Any) -> int:
    params = equation.params
    numbers = params["dimension_numbers"]
    image, kernel = (value.aval.shape for value in equation.invars)
    made = equation.outvars[0].aval.shape
    rows, features, *places = numbers.out_spec
    # (output place, kernel place) pairs that meet a pixel, by axis.
    met = (
        _meetings(
            made[out], kernel[k], image[i], stride, padding[0], image_dilation, kernel_dilation
        )
        for out, k, i, stride, padding, image_dilation, kernel_dilation in zip(
            places,
            numbers.rhs_spec[2:],
            numbers.lhs_spec[2:],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    )
    return 2 * made[rows] * made[features] * kernel[numbers.rhs_spec[1]] * math.prod(met)


def _meetings(
    out: int, kernel: int, image: int, stride: int, before: int, image_dilation: int, dilation: int
) -> int:
    place = np.arange(out)[:, None] * stride - before + np.arange(kernel) * dilation
    inside = (place >= 0) & (place <= (image - 1) * image_dilation) & (place % image_dilation == 0)
    return int(inside.sum())


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for one in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(_open(one), "eqns"):
                yield one


def _open(jaxpr: Any) -> Any:
    return getattr(jaxpr, "jaxpr", jaxpr)
