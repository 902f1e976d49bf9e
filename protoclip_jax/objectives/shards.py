"""A loss over a batch whose rows lie on the devices of a mesh.

Every device computes its local rows against the global columns. The gradients are those of the
global loss: the transpose of an all-gather sums what all devices owe a row, and there is no
factor of 1/devices as in the reference.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

# Names of the mesh axes over which the batch is spread; empty without a mesh.
Axes = tuple[str, ...]


def over_rows(function: Callable, mesh: Mesh | None, by_row: tuple, whole: tuple):
    """Calls `function(*by_row, *whole, axes)` with the rows spread over the mesh.

    Args:
        function: Gets its device's rows of `by_row`, all of `whole`, and the mesh axes to gather
            and sum over. What it returns must be the same on all devices.
        mesh: None calls the function once, on everything, with no axes.
        by_row: Arrays of b rows each, spread over all axes of the mesh.
        whole: Arrays that every device sees whole.

    Raises:
        ValueError: The mesh has a number of devices that does not divide b.
    """
    if mesh is None:
        return function(*by_row, *whole, ())
    rows = by_row[0].shape[0]
    if rows % mesh.size:
        raise ValueError(
            f"a batch of {rows} does not divide over {mesh.size} devices; "
            f"make the batch size a multiple of {mesh.size}"
        )
    axes = tuple(mesh.axis_names)
    specs = (PartitionSpec(axes),) * len(by_row) + (PartitionSpec(),) * len(whole)
    local = jax.shard_map(
        lambda *arrays: function(*arrays, axes),
        mesh=mesh,
        in_specs=specs,
        out_specs=PartitionSpec(),
    )
    return local(*by_row, *whole)


def gathered(rows: jax.Array, axes: Axes) -> jax.Array:
    """The rows of all devices, in the order of the global batch."""
    return jax.lax.all_gather(rows, axes, tiled=True) if axes else rows


def summed(value: jax.Array, axes: Axes) -> jax.Array:
    """The sum of `value` over all devices."""
    return jax.lax.psum(value, axes) if axes else value


def positions(rows: int, axes: Axes) -> jax.Array:
    """Where this device's rows stand in the global batch: int32 (rows,)."""
    first = jax.lax.axis_index(axes) * rows if axes else 0
    return first + jnp.arange(rows, dtype=jnp.int32)
