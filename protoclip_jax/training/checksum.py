"""Checksums of arrays: whether what is read is what was written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

_LARGE = 2**20  # numbers of an array that is summed by itself


def checksum(tree: Any) -> UInt32[np.ndarray, " leaves"]:
    """A number for each array of a tree, by order of its leaves, that a damaged bit changes.

    Integer sums on the devices, so that it is the same for any sharding, and fast.
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    # XLA for CPUs holds a copy of all that one program sums: large arrays have one each.
    large = [number for number, leaf in enumerate(leaves) if leaf.size >= _LARGE]
    small = [number for number, leaf in enumerate(leaves) if leaf.size < _LARGE]
    sums = np.zeros(len(leaves), np.uint32)
    for numbers in filter(None, (*([number] for number in large), small)):
        sums[numbers] = _checksums([leaves[number] for number in numbers])
    return sums


@jax.jit
def _checksums(leaves: list[Array]) -> UInt32[Array, " leaves"]:
    return jnp.stack([_checksum_of(leaf) for leaf in leaves])


def _checksum_of(leaf: Array) -> UInt32[Array, ""]:
    words = jax.lax.bitcast_convert_type(leaf, jnp.uint32)
    # An odd weight by place: moved numbers count too, and no bit is lost.
    place = jnp.zeros(words.shape, jnp.uint32)
    for axis, size in enumerate(words.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
