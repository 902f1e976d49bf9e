"""PCA: scikit-learn's, up to the sign."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from protoclip_jax.data.pca import fit_pca, load_pca


@pytest.mark.core
@pytest.mark.parametrize("count", [40, 9000])
def test_equals_scikit_learn(count):
    rng = np.random.default_rng(count)
    spread = np.geomspace(1, 0.05, 24)
    features = (rng.normal(size=(count, 24)) * spread + rng.normal(size=24)).astype(np.float32)
    expected = PCA(7, svd_solver="full").fit(features.astype(np.float64))
    fitted = fit_pca(features, 7)
    signs = np.sign((fitted.components_de * expected.components_).sum(1))[:, None]
    np.testing.assert_allclose(fitted.components_de, expected.components_ * signs, atol=1e-5)
    np.testing.assert_allclose(fitted.share_d, expected.explained_variance_ratio_, rtol=1e-4)
    projected = fitted.project(features)
    assert projected.dtype == np.float32
    expected_nd = expected.transform(features) * signs.T
    np.testing.assert_allclose(projected, expected_nd, atol=2e-5)
    largest = np.abs(fitted.components_de).argmax(1)
    assert (fitted.components_de[np.arange(7), largest] > 0).all()


def test_saved_and_read_again(tmp_path):
    fitted = fit_pca(np.random.default_rng(0).normal(size=(30, 6)), 3)
    fitted.save(tmp_path / "a.pca.npz")
    read = load_pca(tmp_path / "a.pca.npz")
    for one, other in zip(fitted, read, strict=True):
        np.testing.assert_array_equal(one, other)
    assert read.fingerprint == fitted.fingerprint


def test_same_rows_give_zero_shares_and_no_nan():
    fitted = fit_pca(np.ones((20, 4), np.float32), 2)
    assert np.isfinite(fitted.components_de).all()
    np.testing.assert_array_equal(fitted.share_d, 0)


@pytest.mark.parametrize("dimensions", [0, 7, 5])
def test_impossible_dimensions_are_refused(dimensions):
    with pytest.raises(ValueError, match=f"dimensions is {dimensions}: wanted 1 to 4"):
        fit_pca(np.ones((4, 6), np.float32), dimensions)


def test_other_files_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", np.ones(3))
    np.save(tmp_path / "a.npy", np.ones(3))
    (tmp_path / "a.txt").write_text("mean")
    for name in ("a.npz", "a.npy", "a.txt"):
        with pytest.raises(ValueError, match="is no fitted PCA"):
            load_pca(tmp_path / name)
