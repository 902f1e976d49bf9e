"""Prototypes of an episode: cluster centres, and their translations into the other space."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from protoclip_jax.episodes.kmeans import Clusters
from protoclip_jax.episodes.segments import segment_means

_segment_means = jax.jit(segment_means, static_argnums=2)


def back_translate(
    features_nd: Float[Array | np.ndarray, "n d"],
    labels_n: Int[Array | np.ndarray, "labels"],
    k: int,
) -> tuple[Float[Array, "k d"], Int[Array, "k"]]:
    """Prototype back translation (paper, section 3.3): the mean of the features of each cluster.

    The clusters come from another space (text, say), the features from the student's own, so the
    student is compared with prototypes it can reach. Means are not normalised again. The sums run
    through integers and have the same bits on any number of devices.

    Args:
      features_nd: features in the student's space. Rows that are not finite are left out.
      labels_n: cluster of each row; labels outside [0, k) are left out.
      k: number of clusters.

    Returns:
      Means (float32, or float64 for float64 features; zero where a cluster has no member) and
      the number of rows in each mean.

    Raises:
      ValueError: when features and labels differ in length.
    """
    if features_nd.shape[0] != labels_n.shape[0]:
        raise ValueError(
            f"{features_nd.shape[0]} features but {labels_n.shape[0]} labels: back translation "
            "needs one label a row"
        )
    return _segment_means(jnp.asarray(features_nd), jnp.asarray(labels_n), k)


def build_prototypes(
    image_nd: Float[Array | np.ndarray, "n d"],
    text_nd: Float[Array | np.ndarray, "n d"],
    image_clusters: Clusters,
    text_clusters: Clusters,
    external_labels_n: Int[Array | np.ndarray, "n"] | None = None,
    external_k: int = 0,
) -> dict:
    """Everything the prototype loss compares with, as a plain nested dict of arrays.

    Args:
      image_nd: projected image features of the episode.
      text_nd: projected text features of the episode.
      image_clusters: k-means of `image_nd`.
      text_clusters: k-means of `text_nd`.
      external_labels_n: clusters of an external teacher's rows for the same pairs, if any.
      external_k: number of external clusters.

    Returns:
      `image` and `text`: `centroids` (k, d) and `counts` (k,) of that modality's own clusters;
      `text_in_image`: means of image features by text cluster; `image_in_text`: means of text
      features by image cluster; with a teacher `external`: `in_image`, `in_text` (m, d) and
      `counts` (m,). A prototype with count 0 is unused and must be masked.
    """
    image_k, text_k = image_clusters.counts.shape[0], text_clusters.counts.shape[0]
    prototypes = {
        "image": {"centroids": image_clusters.centroids, "counts": image_clusters.counts},
        "text": {"centroids": text_clusters.centroids, "counts": text_clusters.counts},
        "text_in_image": back_translate(image_nd, text_clusters.labels, text_k)[0],
        "image_in_text": back_translate(text_nd, image_clusters.labels, image_k)[0],
    }
    if external_labels_n is not None:
        in_image, counts = back_translate(image_nd, external_labels_n, external_k)
        in_text, _ = back_translate(text_nd, external_labels_n, external_k)
        prototypes["external"] = {"in_image": in_image, "in_text": in_text, "counts": counts}
    return prototypes
