"""In which order of processes JAX lays the chips of a TPU slice on a mesh; the chips are made up.

The order is JAX's own (`create_device_mesh`), as a function of kind, topology and hosts.
"""

import dataclasses

from jax.experimental import mesh_utils


@dataclasses.dataclass(frozen=True)
class Chip:
    """What JAX and the mesh read of a TPU device."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0


def chips(kind: str, topology: tuple[int, int, int], host: tuple[int, int, int], cores: int):
    """The chips of a slice, cut into hosts of `host` chips; hosts are numbered x first."""
    (x, y, z), (hx, hy, hz) = topology, host
    places = []
    for i, j, k in ((i, j, k) for k in range(z) for j in range(y) for i in range(x)):
        process = i // hx + (x // hx) * (j // hy + (y // hy) * (k // hz))
        places += [(process, (k, j, i), core) for core in range(cores)]
    return [
        Chip(number, "tpu", kind, process, place[::-1], core)
        for number, (process, place, core) in enumerate(sorted(places))
    ]


# Kind, topology, chips of a host, cores of a chip.
SLICES = {
    "v3-32": ("TPU v3", (4, 4, 1), (2, 2, 1), 2),
    "v4-32": ("TPU v4", (2, 2, 4), (2, 2, 1), 1),
    "v4-64": ("TPU v4", (2, 4, 4), (2, 2, 1), 1),
    "v5e-16": ("TPU v5 lite", (4, 4, 1), (2, 2, 1), 1),
    "v5e-32": ("TPU v5 lite", (4, 8, 1), (2, 2, 1), 1),
    "v5p-32": ("TPU v5", (2, 2, 4), (2, 2, 1), 1),
    "v6e-16": ("TPU v6 lite", (4, 4, 1), (2, 2, 1), 1),
}


def order(name: str, fsdp: int = 1) -> list[int]:
    """The process of each place of the mesh, in the mesh's order."""
    devices = chips(*SLICES[name])
    mesh = mesh_utils.create_device_mesh(
        (len(devices) // fsdp, fsdp), devices, allow_split_physical_axes=True
    )
    return [chip.process_index for chip in mesh.flat]
