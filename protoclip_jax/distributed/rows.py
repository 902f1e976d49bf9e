"""Which rows of a batch belong to which process: asked of the sharding, never assumed.

A mesh need not be in the order of the processes (JAX lays the chips of a TPU slice by topology), so
the rows of a process need not be one stretch of the batch. Positions, labels, the teacher's rows,
padding and what travels to the devices all take their places from here.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jaxtyping import Int


class Rows:
    """The rows of a global batch that one process supplies.

    Attributes:
        batch: Rows of the global batch.
        local: Places in the global batch of this process's rows, ascending: int64 (local batch,).
    """

    def __init__(
        self,
        sharding: NamedSharding,
        batch: int,
        *,
        process: int | None = None,
        process_of: Callable[[jax.Device], int] = lambda device: device.process_index,
    ):
        """Args:
        sharding: how a batch is spread over the mesh: its first axis over all devices.
        batch: rows of the global batch.
        process: whose rows; this process's by default.
        process_of: the process that owns a device.

        Raises:
            ValueError: The devices do not divide the batch, or the process has none of them.
        """
        process = jax.process_index() if process is None else process
        if batch % sharding.num_devices:
            raise ValueError(
                f"a batch of {batch} does not divide over {sharding.num_devices} devices"
            )
        self.batch, self._sharding = batch, sharding
        places = {
            device: range(*index[0].indices(batch))
            for device, index in sharding.devices_indices_map((batch,)).items()
        }
        mine = {device: rows for device, rows in places.items() if process_of(device) == process}
        if not mine:
            raise ValueError(f"the mesh has no device of process {process}")
        self.local = np.unique(np.concatenate([np.asarray(rows) for rows in mine.values()]))
        # Where each device's rows stand in the local batch: rows next to each other stay so.
        self._parts = {
            device: slice(at := int(np.searchsorted(self.local, rows.start)), at + len(rows))
            for device, rows in mine.items()
        }

    def shards(self, rows: np.ndarray) -> list[jax.Array]:
        """The local batch's rows on this process's devices, one array a device."""
        parts = [rows[part] for part in self._parts.values()]
        return jax.device_put(parts, list(self._parts))

    def on_devices(self, rows: np.ndarray) -> jax.Array:
        """The global batch, of which this process gives its local rows.

        Args:
            rows: (local batch, ...), row i at the global place `local[i]`.
        """
        if len(rows) != len(self.local):
            raise ValueError(f"{len(rows)} rows, where this process supplies {len(self.local)}")
        shape = (self.batch, *rows.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, self._sharding, self.shards(rows))


def by_position(
    positions: Int[np.ndarray, "..."], values: Int[np.ndarray, "..."], size: int
) -> Int[np.ndarray, " size"]:
    """Values of all processes, ordered by their positions.

    Args:
        positions: Of this process's values; those of `size` or above are padding.
        values: Of the same shape on every process.
        size: Positions of the pass.

    Raises:
        RuntimeError: A position that no process has.
    """
    pairs = np.stack([positions.reshape(-1), values.reshape(-1)]).astype(np.int32)
    if jax.process_count() > 1:
        pairs = np.concatenate(list(multihost_utils.process_allgather(pairs)), axis=1)
    ordered = np.zeros(size, values.dtype)
    found = np.zeros(size, bool)
    real = pairs[0] < size
    ordered[pairs[0][real]] = pairs[1][real]
    found[pairs[0][real]] = True
    if not found.all():
        raise RuntimeError(f"position {int(np.argmin(found))} of {size} was read by no process")
    return ordered
