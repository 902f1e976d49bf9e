"""Back translation and the sums it is made of."""

import jax
import numpy as np
import pytest
from golden_files import golden
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protoclip_jax.episodes.kmeans import kmeans
from protoclip_jax.episodes.prototypes import back_translate, build_prototypes
from protoclip_jax.episodes.segments import exact_segment_sums, segment_sums

FILE = golden("pbt")
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(4000, 24)).astype(np.float32)
LABELS = RNG.integers(0, 300, 4000).astype(np.int32)


@pytest.mark.accelerator
@pytest.mark.core
@pytest.mark.parametrize("name", sorted({key.split("/")[0] for key in FILE}))
def test_golden_back_translation(name):
    part = {key.split("/")[1]: FILE[key] for key in FILE if key.startswith(f"{name}/")}
    means, counts = back_translate(part["features"], part["labels"], int(part["k"]))
    np.testing.assert_allclose(means, part["centroids"], rtol=0, atol=1e-6)
    np.testing.assert_array_equal(counts, part["counts"])
    with jax.enable_x64(True):
        wide, _ = back_translate(
            part["features"].astype(np.float64), part["labels"], int(part["k"])
        )
        assert wide.dtype == np.float64
        np.testing.assert_allclose(wide, part["centroids"], rtol=0, atol=1e-6)


def test_sums_have_the_same_bits_in_any_order_and_on_any_devices():
    means, counts = back_translate(FEATURES, LABELS, 300)
    order = np.random.default_rng(1).permutation(len(LABELS))
    shuffled, _ = back_translate(FEATURES[order], LABELS[order], 300)
    np.testing.assert_array_equal(means, shuffled)
    for devices in (2, 8):
        axes = (AxisType.Auto,)
        mesh = jax.make_mesh((devices,), ("data",), axes, devices=jax.devices()[:devices])
        rows = NamedSharding(mesh, PartitionSpec("data"))
        put = [jax.device_put(part, rows) for part in (FEATURES, LABELS)]
        spread, spread_counts = back_translate(*put, 300)
        np.testing.assert_array_equal(means, spread)
        np.testing.assert_array_equal(counts, spread_counts)


@pytest.mark.accelerator
@pytest.mark.parametrize(("rows", "scale"), [(1, 1.0), (4000, 1e-20), (4000, 1.0), (4000, 3e7)])
def test_exact_sums_against_float64(rows, scale):
    values, labels = FEATURES[:rows] * np.float32(scale), LABELS[:rows]
    wanted = np.zeros((300, 24))
    np.add.at(wanted, labels, values.astype(np.float64))
    largest = np.abs(values).max()
    members = np.bincount(labels, minlength=300).max()
    for add in (exact_segment_sums, segment_sums):
        error = np.abs(
            np.asarray(add(jax.numpy.asarray(values), jax.numpy.asarray(labels), 300)) - wanted
        ).max()
        assert error <= members * largest * 2.0**-22


def test_rows_left_out():
    features = FEATURES[:50].copy()
    labels = np.arange(50, dtype=np.int32) % 5
    features[7] = np.nan
    labels[[8, 9]] = -1, 5
    means, counts = back_translate(features, labels, 5)
    kept = np.delete(np.arange(50), [7, 8, 9])
    wanted = [features[kept][labels[kept] == k].mean(0) for k in range(5)]
    np.testing.assert_allclose(means, wanted, atol=1e-6)
    np.testing.assert_array_equal(counts, np.bincount(labels[kept], minlength=5))


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="50 features but 49 labels"):
        back_translate(FEATURES[:50], LABELS[:49], 300)


def test_prototypes_of_an_episode():
    image, text = FEATURES[:600], FEATURES[600:1200] * 2
    image_clusters = kmeans(image, 20, seed=0, precision="float32")
    text_clusters = kmeans(text, 20, seed=1, precision="float32")
    teacher = LABELS[:600] % 7
    built = build_prototypes(image, text, image_clusters, text_clusters, teacher, 9)
    assert set(built) == {"image", "text", "text_in_image", "image_in_text", "external"}

    def mean(features, labels, k):
        return features[np.asarray(labels) == k].mean(0)

    close = {"rtol": 0, "atol": 1e-6}
    for k in range(20):
        np.testing.assert_allclose(
            built["text_in_image"][k], mean(image, text_clusters.labels, k), **close
        )
        np.testing.assert_allclose(
            built["image_in_text"][k], mean(text, image_clusters.labels, k), **close
        )
    np.testing.assert_array_equal(built["image"]["centroids"], image_clusters.centroids)
    np.testing.assert_array_equal(built["text"]["counts"], text_clusters.counts)
    np.testing.assert_allclose(built["external"]["in_text"][3], mean(text, teacher, 3), **close)
    np.testing.assert_allclose(built["external"]["in_image"][3], mean(image, teacher, 3), **close)
    np.testing.assert_array_equal(built["external"]["counts"], np.bincount(teacher, minlength=9))
    assert "external" not in build_prototypes(image, text, image_clusters, text_clusters, None, 0)
