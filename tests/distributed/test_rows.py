"""The rows of a process, for any order of devices on the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pod_orders import SLICES, chips, order

from protoclip_jax.distributed.rows import Rows, by_position
from protoclip_jax.training import state

AXES = ("data", "fsdp")


def sharding_of(devices: np.ndarray) -> NamedSharding:
    return NamedSharding(Mesh(devices, AXES), PartitionSpec(AXES))


def random_orders(seed: int, count: int, hosts: int = 4, each: int = 2) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(hosts), each)
    return [rng.permutation(owners).tolist() for _ in range(count)]


@pytest.mark.parametrize("name", SLICES)
@pytest.mark.parametrize("fsdp", [1, 4])
def test_rows_of_the_processes_of_a_slice(name, fsdp):
    """Every row has one process: that of the device which the mesh puts at its place."""
    devices = state.arranged(chips(*SLICES[name]), fsdp)
    sharding, size = sharding_of(devices), devices.size
    batch = 3 * size
    owners = np.repeat([chip.process_index for chip in devices.flat], 3)
    for process in range(max(owners) + 1):
        rows = Rows(sharding, batch, process=process)
        np.testing.assert_array_equal(rows.local, np.flatnonzero(owners == process))


def test_orders_are_jax_own():
    """Where it begins to go wrong: process order holds on one of these slices only."""
    in_order = [name for name in SLICES if order(name) == sorted(order(name))]
    assert in_order == ["v3-32"]
    assert order("v4-32") == [0, 1, 2, 3] * 4


@pytest.mark.parametrize("owners", random_orders(0, 5))
def test_what_hosts_supply_is_the_global_batch(owners):
    """Each host puts its rows on its own devices; together they are the batch."""
    devices = jax.devices()[:8]
    sharding = sharding_of(np.array(devices).reshape(4, 2))
    place = dict(zip(devices, owners, strict=True))
    values = np.random.default_rng(1).normal(size=(24, 5)).astype(np.float32)
    shards, seen = [], []
    for process in range(4):
        rows = Rows(sharding, 24, process=process, process_of=place.__getitem__)
        mine = rows.shards(values[rows.local])
        assert {place[next(iter(shard.devices()))] for shard in mine} == {process}
        shards += mine
        seen += rows.local.tolist()
    assert sorted(seen) == list(range(24))
    whole = jax.make_array_from_single_device_arrays((24, 5), sharding, shards)
    np.testing.assert_array_equal(np.asarray(whole), values)


def test_one_process_supplies_all():
    sharding = sharding_of(np.array(jax.devices()[:8][::-1]).reshape(2, 4))
    rows = Rows(sharding, 16)
    values = np.arange(16, dtype=np.int32)
    np.testing.assert_array_equal(rows.local, values)
    found = rows.on_devices(values)
    assert found.sharding == sharding
    np.testing.assert_array_equal(np.asarray(found), values)
    with pytest.raises(ValueError, match="15 rows, where this process supplies 16"):
        rows.on_devices(values[:15])


def test_batches_that_do_not_divide_and_strangers_are_refused():
    sharding = sharding_of(np.array(jax.devices()[:8]).reshape(8, 1))
    with pytest.raises(ValueError, match="12 does not divide over 8 devices"):
        Rows(sharding, 12)
    with pytest.raises(ValueError, match="no device of process 3"):
        Rows(sharding, 8, process=3)


def test_values_by_position():
    positions = np.array([[3, 0], [1, 5], [2, 4]])
    found = by_position(positions, 10 * positions, 5)
    np.testing.assert_array_equal(found, [0, 10, 20, 30, 40])
    assert found.dtype == positions.dtype
    with pytest.raises(RuntimeError, match="position 2 of 6"):
        by_position(positions[:2], positions[:2], 6)
