import numpy as np
import pytest
from golden_files import golden, golden_json

from protoclip_jax.evaluation import clustering

GOLDEN_SETS = sorted(name for name in golden_json("evaluation") if name.startswith("cluster_"))


@pytest.mark.core
@pytest.mark.parametrize("name", GOLDEN_SETS)
def test_golden_agreement(name):
    data, expected = golden("evaluation", f"{name}/"), golden_json("evaluation")[name]
    found = clustering.agreement(data["labels_a"], data["labels_b"])
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.core
def test_golden_features_cluster_about_as_well_as_the_reference():
    data = golden("evaluation", "zeroshot/")
    expected = golden_json("evaluation")["clustering_evaluation_on_zeroshot_features"]
    features, labels = data["normalised_image_features"], data["labels"]
    runs = [clustering.evaluate(features, labels, seed=seed) for seed in range(5)]
    for name in ("ari", "ami"):
        # Local optima differ: runs of scikit-learn on the same features spread by 0.1.
        assert np.mean([run[name] for run in runs]) == pytest.approx(expected[name], abs=0.2)


def test_separated_classes_are_found_and_names_serve_as_labels():
    rng = np.random.default_rng(0)
    names = np.array(["ant", "bee", "cow"])[np.arange(60) % 3]
    features = 10 * np.eye(3, 4)[np.arange(60) % 3] + 0.1 * rng.normal(size=(60, 4))
    found = clustering.evaluate(features.astype(np.float32), names)
    assert found == pytest.approx({"ari": 1.0, "ami": 1.0})


def test_user_errors_say_what_was_found():
    with pytest.raises(ValueError, match="3 clusters and 2 labels"):
        clustering.agreement(np.arange(3), np.arange(2))
    with pytest.raises(ValueError, match="found 3 pictures for 4 clusters"):
        clustering.evaluate(np.eye(3), np.arange(3), k=4)
    with pytest.raises(ValueError, match="not finite"):
        clustering.evaluate(np.diag([1, np.nan, 1]), np.arange(3), k=2)
