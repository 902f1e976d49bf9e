"""Episodes: every row once an epoch, a pure function, nothing replayed."""

import numpy as np
import pytest

from protoclip_jax.episodes.sampling import episode_rows


@pytest.mark.parametrize(("pairs", "size"), [(12, 4), (13, 5), (10, 10), (100, 7)])
def test_without_replacement_each_epoch_covers_every_row_once(pairs, size):
    epochs = 3
    episodes = -(-epochs * pairs // size)
    stream = np.concatenate([episode_rows(pairs, size, e, 9, False) for e in range(episodes)])
    orders = stream[: epochs * pairs].reshape(epochs, pairs)
    np.testing.assert_array_equal(np.sort(orders, axis=1), np.tile(np.arange(pairs), (epochs, 1)))
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[1], orders[2])


def test_pure_function_of_its_arguments():
    np.random.seed(1)
    first = episode_rows(1000, 100, 7, 3, False)
    np.random.seed(2)
    np.testing.assert_array_equal(first, episode_rows(1000, 100, 7, 3, False))
    drawn = episode_rows(1000, 100, 7, 3, True)
    np.testing.assert_array_equal(drawn, episode_rows(1000, 100, 7, 3, True))
    for other in ((8, 3), (7, 4)):
        assert not np.array_equal(first, episode_rows(1000, 100, *other, False))
        assert not np.array_equal(drawn, episode_rows(1000, 100, *other, True))


@pytest.mark.parametrize("replacement", [False, True])
def test_shape_and_range(replacement):
    rows = episode_rows(50, 20, 11, 0, replacement)
    assert rows.dtype == np.int64
    assert rows.shape == (20,)
    assert rows.min() >= 0
    assert rows.max() < 50


def test_with_replacement_is_uniform_and_repeats():
    rows = episode_rows(10, 20_000, 0, 5, True)
    assert np.all(np.abs(np.bincount(rows, minlength=10) - 2000) < 250)


def test_episode_larger_than_the_data():
    with pytest.raises(ValueError, match=r"101 pairs .*from 100 pairs"):
        episode_rows(100, 101, 0, 0, False)
    assert len(episode_rows(100, 101, 0, 0, True)) == 101
    with pytest.raises(ValueError, match="episode -1"):
        episode_rows(100, 10, -1, 0, False)
