"""Measuring: contenders take turns, medians count."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Seconds(NamedTuple):
    """Time of a call.

    Attributes:
      wall: on the clock.
      cpu: of all threads of the process; waits for a busy machine are not in it.
    """

    wall: float
    cpu: float

    def __truediv__(self, count: int) -> "Seconds":
        return Seconds(self.wall / count, self.cpu / count)

    def of(self, platform: str) -> float:
        """What to compare on a platform: a CPU works for us, an accelerator makes us wait."""
        return self.cpu if platform == "cpu" else self.wall


class Timed:
    """A call whose time is taken; the last result stays in `result`."""

    def __init__(self, call: Callable[[], Any]):
        self._call = call
        self.result: Any = None

    def __call__(self) -> Seconds:
        """Runs to the end, on the devices too."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.result = jax.block_until_ready(self._call())
        return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def alternating(
    contenders: Mapping[str, Callable[[], Seconds]], repeats: int
) -> dict[str, Seconds]:
    """Median times of contenders that run one after the other, `repeats` times around."""
    found: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, contender in contenders.items():
            found[name].append(contender())
    return {name: median(times) for name, times in found.items()}


def median(times: list[Seconds]) -> Seconds:
    """Medians of wall and CPU seconds, each on its own."""
    return Seconds(*(statistics.median(column) for column in zip(*times, strict=True)))


def matmul(rows: int, inner: int, columns: int, dtype: Any, repeats: int) -> Timed:
    """Products of (rows, inner) by (inner, columns) in a compute type, compiled and warmed up.

    Float32 products are full ones, as they are in the code that is compared with it.
    """
    precision = "highest" if jnp.dtype(dtype) == jnp.float32 else None
    left, right = (
        jax.random.normal(jax.random.key(index), shape, dtype)
        for index, shape in enumerate(((rows, inner), (inner, columns)))
    )
    product = jax.jit(
        lambda a, b: jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
    )
    product(left, right).block_until_ready()

    def run():
        result = None
        for _ in range(repeats):
            result = product(left, right)
        return result

    return Timed(run)


def copy(size: int, repeats: int) -> Timed:
    """Reads `size` bytes of a device's memory and writes as many, compiled and warmed up."""
    values = jnp.zeros(size // 4, jnp.float32)
    # An addition, since the compiler would leave out a plain copy.
    copied = jax.jit(lambda x: x + 1)
    copied(values).block_until_ready()

    def run():
        result = None
        for _ in range(repeats):
            result = copied(values)
        return result

    return Timed(run)
