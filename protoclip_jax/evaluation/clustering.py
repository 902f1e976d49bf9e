"""Do clusters of image features agree with the classes?"""

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from protoclip_jax.episodes.kmeans import kmeans
from protoclip_jax.evaluation.features import finite_features

# The reference's, in its evaluation.
ITERATIONS = 100
REDOS = 5


def evaluate(
    features: Float[Array | np.ndarray, "n e"],
    labels: Shaped[np.ndarray, "n"] | Int[Array, "n"],
    k: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """k-means on image features (the best of five runs), compared with class labels.

    Args:
        features: one row a picture.
        labels: class of each picture, numbers or names.
        k: number of clusters; by default the number of classes that occur.
        seed: of the k-means start.

    Returns:
        `{"ari": ..., "ami": ...}`: 1 for the same grouping, about 0 for an unrelated one.

    Raises:
        ValueError: when counts differ, k is more than the pictures, or features are not finite.
    """
    features = finite_features(features, "image")
    k = len(np.unique(labels)) if k is None else k
    if k > len(features):
        raise ValueError(f"found {len(features)} pictures for {k} clusters: wanted at least {k}")
    clusters = kmeans(features, k, seed=seed, iterations=ITERATIONS, redos=REDOS)
    return agreement(np.asarray(clusters.labels), labels)


def agreement(
    clusters: Shaped[np.ndarray, "n"] | Int[Array, "n"],
    labels: Shaped[np.ndarray, "labels"] | Int[Array, "labels"],
) -> dict[str, float]:
    """Adjusted Rand index and adjusted mutual information of two groupings.

    Both are symmetric, blind to how groups are numbered, and 0 on average for unrelated ones.
    """
    # Imported late: it takes a second, before which a trainer would tell nothing of its data.
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score

    clusters, labels = np.asarray(clusters), np.asarray(labels)
    if len(clusters) != len(labels):
        raise ValueError(f"found {len(clusters)} clusters and {len(labels)} labels, wanted equal")
    return {
        "ari": float(adjusted_rand_score(labels, clusters)),
        "ami": float(adjusted_mutual_info_score(labels, clusters)),
    }


def chance() -> dict[str, float]:
    """Both indices are adjusted so that unrelated groupings give 0."""
    return {"ari": 0.0, "ami": 0.0}
