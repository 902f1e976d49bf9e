import numpy as np
import pytest
from golden_files import golden, golden_json

from protoclip_jax.evaluation import geometry

NAMES = {
    "modality_gap": "modality_gap",
    "image_std": "image_feature_std",
    "text_std": "text_feature_std",
    "image_self_similarity": "image_mean_offdiag",
    "text_self_similarity": "text_mean_offdiag",
    "image_self_similarity_positive": "image_avg_self_similarity",
    "text_self_similarity_positive": "text_avg_self_similarity",
}


@pytest.mark.core
@pytest.mark.parametrize("name", ["analysis_gap", "analysis_nogap"])
def test_golden_analysis(name):
    data, expected = golden("evaluation", f"{name}/"), golden_json("evaluation")[name]
    found = geometry.evaluate(data["image_features"], data["text_features"])
    for ours, theirs in NAMES.items():
        assert found[ours] == pytest.approx(expected[theirs], abs=1e-5), ours


def test_equals_plain_pair_by_pair_values():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(0.1, 1, size=(40, 6)) for _ in range(2))
    unit_x, unit_y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    found = geometry.evaluate(x.astype(np.float32), y.astype(np.float32))
    pairs = [unit_x[i] @ unit_x[j] for i in range(40) for j in range(40) if i != j]
    assert found["image_self_similarity"] == pytest.approx(np.mean(pairs), abs=1e-6)
    positive = [p for p in [*pairs, *[1.0] * 40] if p > 0]
    assert found["image_self_similarity_positive"] == pytest.approx(np.mean(positive), abs=1e-6)
    aligned = np.mean([a @ b for a, b in zip(unit_x, unit_y, strict=True)])
    assert found["alignment"] == pytest.approx(aligned, abs=1e-6)


def test_unpaired_and_single_rows():
    found = geometry.evaluate(np.eye(3), np.eye(3)[:1])
    assert "alignment" not in found
    assert np.isnan(found["text_std"])
    assert np.isnan(found["text_self_similarity"])
    assert found["image_self_similarity"] == pytest.approx(0)


def test_non_finite_features_are_refused():
    with pytest.raises(ValueError, match="1 of 3 text features are not finite"):
        geometry.evaluate(np.eye(3), np.diag([1, 1, np.nan]))
