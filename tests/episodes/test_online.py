"""Labels at the step are the labels of k-means."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protoclip_jax.episodes.kmeans import assign, kmeans
from protoclip_jax.episodes.online import agreement, nearest_used, online_labels


def features(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(12, d))[rng.integers(0, 12, n)] + 0.4 * rng.normal(size=(n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.accelerator
@pytest.mark.parametrize("shift", [0.0, 100.0])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_frozen_features_get_the_labels_of_kmeans(shift, batch):
    points = features(448, 16) + np.float32(shift)
    found = kmeans(points, 40, seed=0)
    label = jax.jit(nearest_used)
    labels = [
        label(points[at : at + batch], found.centroids, found.counts)
        for at in range(0, len(points), batch)
    ]
    np.testing.assert_array_equal(np.concatenate(labels), found.labels)


@pytest.mark.accelerator
def test_labels_agree_with_float64():
    points, centroids = features(200, 16), features(30, 16, seed=1)
    counts = np.arange(30) % 3
    distances = np.sum(
        (points[:, None].astype(np.float64) - centroids[None].astype(np.float64)) ** 2, axis=2
    )
    distances[:, counts == 0] = np.inf
    labels = nearest_used(points, centroids, counts)
    np.testing.assert_array_equal(labels, np.argmin(distances, axis=1))
    np.testing.assert_array_equal(labels, assign(points, centroids, used=counts > 0))


def test_unused_prototypes_are_no_ones_label():
    centroids = np.array([[0.0, 0], [1, 0], [np.nan, 0]], np.float32)
    points = np.array([[0.0, 0], [0.9, 0]], np.float32)
    assert nearest_used(points, centroids, np.array([0, 5, 0])).tolist() == [1, 1]


def test_labels_carry_no_gradient():
    points, centroids = features(8, 4), features(3, 4, seed=1)

    def loss(points):
        return jnp.sum(nearest_used(points, centroids, np.ones(3, int)) * jnp.sum(points))

    plain = jax.grad(loss)(points)
    labels = nearest_used(points, centroids, np.ones(3, int))
    np.testing.assert_array_equal(plain, np.full((8, 4), float(np.sum(labels))))


def test_each_teacher_labels_its_own_space():
    image, text, rows = (features(20, width, seed) for seed, width in enumerate((6, 6, 9)))
    prototypes = {
        name: {"centroids": points[:5], "counts": np.ones(5, int)}
        for name, points in (("image", image), ("text", text), ("external", rows))
    }
    batch = SimpleNamespace(image_projected=image, text_projected=text)
    labels = online_labels(batch, rows, prototypes)
    for name in ("image", "text", "external"):
        np.testing.assert_array_equal(labels[name][:5], np.arange(5))
    assert "external" not in online_labels(batch, None, prototypes)


def test_agreement_counts_only_pairs_that_were_extracted():
    online = {"image": jnp.array([1, 2, 3, 4]), "text": jnp.array([0, 0, 0, 0])}
    offline = {"image": jnp.array([1, 5, 3, -1]), "text": jnp.array([1, 0, 0, -1])}
    shares = agreement(online, offline)
    assert {name: float(value) for name, value in shares.items()} == {
        "online/known": 0.75,
        "online/same_image": 0.5,
        "online/same_text": 0.5,
    }
