"""How features lie: gap between modalities, spread, self-similarity."""

import numpy as np
from jaxtyping import Array, Float

from protoclip_jax.evaluation.features import finite_features, normalise, score_blocks


def evaluate(
    image_features: Float[Array | np.ndarray, "n e"],
    text_features: Float[Array | np.ndarray, "m e"],
) -> dict[str, float]:
    """All measures of one pair of feature sets; with n == m row i of both is a pair.

    Features are normalised first. The `*_positive` values are the reference's (see
    `mean_positive_similarity`); `alignment` is there for paired rows only.
    """
    image = normalise(np.asarray(finite_features(image_features, "image"), np.float64))
    text = normalise(np.asarray(finite_features(text_features, "text"), np.float64))
    metrics = {"modality_gap": modality_gap(image, text)}
    if len(image) == len(text):
        metrics["alignment"] = alignment(image, text)
    for name, features in (("image", image), ("text", text)):
        metrics[f"{name}_std"] = feature_std(features)
        metrics[f"{name}_self_similarity"] = mean_self_similarity(features)
        metrics[f"{name}_self_similarity_positive"] = mean_positive_similarity(features)
    return metrics


def modality_gap(
    image_features: Float[Array | np.ndarray, "n e"],
    text_features: Float[Array | np.ndarray, "m e"],
) -> float:
    """Distance between the mean image feature and the mean text feature (0 to 2)."""
    means = [np.asarray(x, np.float64).mean(axis=0) for x in (image_features, text_features)]
    return float(np.linalg.norm(means[0] - means[1]))


def feature_std(features: Float[Array | np.ndarray, "n e"]) -> float:
    """Mean over dimensions of the unbiased standard deviation; 0 when all rows are alike.

    Isotropic unit features have 1 / sqrt(e). NaN for a single row.
    """
    array = np.asarray(features, np.float64)
    return float(array.std(axis=0, ddof=1).mean()) if len(array) > 1 else float("nan")


def mean_self_similarity(features: Float[Array | np.ndarray, "n e"]) -> float:
    """Mean cosine over all pairs of different rows of unit features; NaN for a single row.

    From sums only: sum_ij x_i.x_j = |sum_i x_i|^2, less the diagonal.
    """
    array = np.asarray(features, np.float64)
    pairs = len(array) * (len(array) - 1)
    if not pairs:
        return float("nan")
    total = array.sum(axis=0)
    return float((total @ total - np.vdot(array, array)) / pairs)


def mean_positive_similarity(features: Float[Array | np.ndarray, "n e"]) -> float:
    """Mean of the positive entries of the similarity matrix, its diagonal included.

    What the reference reports as self-similarity. It is biased upwards: isotropic features give
    about 0.2 in 16 dimensions where the plain mean gives 0.
    """
    array = np.asarray(features)
    total, count = 0.0, 0
    for _, scores in score_blocks(array, array):
        positive = scores > 0
        total += float(scores.sum(where=positive, dtype=np.float64))
        count += int(positive.sum())
    return total / max(count, 1)


def alignment(
    image_features: Float[Array | np.ndarray, "n e"],
    text_features: Float[Array | np.ndarray, "n e"],
) -> float:
    """Mean cosine of the pairs, for unit features."""
    products = np.asarray(image_features, np.float64) * np.asarray(text_features, np.float64)
    return float(products.sum(axis=1).mean())
