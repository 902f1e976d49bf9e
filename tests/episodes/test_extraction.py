"""Features of an episode: written in place, by position, by one program for all episodes."""

import jax
import numpy as np
import pytest
from compilations import counted
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from protoclip_jax.episodes.extraction import EpisodeFeatures

RNG = np.random.default_rng(0)
IMAGE, TEXT = RNG.normal(size=(2, 48, 5)).astype(np.float32)


def filled(size: int, batch: int, place=None, by_row=None, order=None) -> EpisodeFeatures:
    features = EpisodeFeatures(size, IMAGE.shape[1], place)
    for first in order or range(0, size, batch):
        positions = np.arange(first, first + batch, dtype=np.int32)
        rows = IMAGE[positions], TEXT[positions], positions
        features.add(*(jax.device_put(part, by_row) for part in rows))
    return features


@pytest.mark.parametrize(("size", "batch"), [(9, 4), (11, 4), (12, 4), (3, 8)])
def test_every_position_is_kept_and_no_padding(size, batch):
    """Also where the last batch is not full, or the only one longer than the episode."""
    image, text = filled(size, batch).whole()
    np.testing.assert_array_equal(image, IMAGE[:size])
    np.testing.assert_array_equal(text, TEXT[:size])


def test_rows_that_never_came_or_came_twice_are_refused():
    features = EpisodeFeatures(12, 5)
    for first in (0, 8):
        rows = slice(first, first + 4)
        features.add(IMAGE[rows], TEXT[rows], np.arange(first, first + 4, dtype=np.int32))
    assert np.isnan(features._features[:, 4:8]).all()
    with pytest.raises(RuntimeError, match="8 rows for 12 episode positions"):
        features.whole()
    for _ in range(2):
        count = features.add(IMAGE[4:8], TEXT[4:8], np.arange(4, 8, dtype=np.int32))
    assert count == 16
    with pytest.raises(RuntimeError, match="16 rows for 12 episode positions"):
        features.whole()


def mesh_of(devices, shape=(4, 2)) -> Mesh:
    return Mesh(np.array(devices).reshape(shape), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_devices_and_batches_gives_the_same_on_all(seed):
    """What a batch holds follows the order of the mesh; the result does not, and is whole."""
    rng = np.random.default_rng(seed)
    mesh = mesh_of(rng.permutation(jax.devices()))
    whole, by_row = (
        NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), (("data", "fsdp"),))
    )
    order = rng.permutation(np.arange(0, 40, 8)).tolist()
    features = filled(37, 8, whole, by_row, order).whole()
    assert features.sharding == whole
    for shard in features.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.stack([IMAGE[:37], TEXT[:37]]))


def test_rows_go_where_their_positions_say():
    """Even where the rows of a batch are not in order, as in a mesh laid out by topology."""
    places = np.random.default_rng(1).permutation(16).astype(np.int32)
    features = EpisodeFeatures(13, 5)
    for part in np.split(places, 2):
        features.add(IMAGE[part], TEXT[part], part)
    np.testing.assert_array_equal(features.whole(), np.stack([IMAGE[:13], TEXT[:13]]))


def test_three_episodes_take_the_programs_of_one_and_hold_nothing_twice():
    mesh = mesh_of(jax.devices(), (8, 1))
    whole, by_row = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    filled(46, 8, whole, by_row).whole()
    for _ in range(2):
        with counted() as programs:
            features = filled(46, 8, whole, by_row, range(0, 40, 8))
        assert programs == [0]
        held = [array for array in jax.live_arrays() if array.shape == (2, 46, 5)]
        assert len(held) == 1
        before = [shard.data.unsafe_buffer_pointer() for shard in held[0].addressable_shards]
        del held
        rows = (IMAGE[40:], TEXT[40:], np.arange(40, 48, dtype=np.int32))
        features.add(*(jax.device_put(part, by_row) for part in rows))
        array = features.whole()
        after = [shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards]
        assert after == before
        del features, array
