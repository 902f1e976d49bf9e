"""Labels at the step: the nearest prototype of a pair's current feature (online assignment).

Beyond the paper: only a sample of the episode is extracted and clustered, and every training pair
takes the label that its own feature has now. A label then costs a batch-sized product instead of a
forward pass, and is not stale.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from protoclip_jax.objectives.logits import similarity, wide


def nearest_used(
    points_bd: Float[Array | np.ndarray, "b d"],
    centroids_kd: Float[Array | np.ndarray, "k d"],
    counts_k: Int[Array | np.ndarray, " k"],
) -> Int[Array, " b"]:
    """The nearest centroid that has members, ties to the lowest index; no gradient.

    For extracted points these are the labels of k-means (`kmeans.assign`), here for a batch that
    lies on many devices and a matrix of scores that fits.
    """
    points_bd, centroids_kd = wide(*jax.lax.stop_gradient((points_bd, centroids_kd)))
    used_k = jnp.asarray(counts_k) > 0
    # Far from the origin x.c - |c|^2 / 2 would cancel.
    members = jnp.maximum(jnp.sum(used_k), 1)
    origin_d = jnp.sum(jnp.where(used_k[:, None], centroids_kd, 0), axis=0) / members
    centred_kd = centroids_kd - origin_d
    scores_bk = similarity(points_bd - origin_d, centred_kd)
    scores_bk -= 0.5 * jnp.sum(centred_kd * centred_kd, axis=1)
    return jnp.argmax(jnp.where(used_k, scores_bk, -jnp.inf), axis=1).astype(jnp.int32)


def online_labels(
    features: Any, teacher_be: Float[Array | np.ndarray, "b e"] | None, prototypes: dict
) -> dict[str, Int[Array, " b"]]:
    """Labels of a batch by teacher, from projected features and the external teacher's rows.

    Args:
      features: has `image_projected` and `text_projected` (b, d).
      teacher_be: the external teacher's rows of the same pairs, if there is one.
      prototypes: `episodes.prototypes.build_prototypes`, with `centroids` of the external clusters.
    """
    spaces = {"image": features.image_projected, "text": features.text_projected}
    if teacher_be is not None:
        spaces["external"] = teacher_be
    return {
        name: nearest_used(points, prototypes[name]["centroids"], prototypes[name]["counts"])
        for name, points in spaces.items()
    }


def agreement(
    online: dict[str, Int[Array, " b"]], offline: dict[str, Int[Array, " b"]]
) -> dict[str, Float[Array, ""]]:
    """How many rows of a batch have an offline label, and how many have the same online.

    Args:
      online: labels by teacher.
      offline: the same from k-means; -1 for pairs that were not extracted.

    Returns:
      Shares of the batch: `online/known`, and `online/same_...` by teacher.
    """
    known = next(iter(offline.values())) >= 0
    shares = {"online/known": jnp.mean(known, dtype=jnp.float32)}
    for name, labels in online.items():
        shares[f"online/same_{name}"] = jnp.mean(labels == offline[name], dtype=jnp.float32)
    return shares
