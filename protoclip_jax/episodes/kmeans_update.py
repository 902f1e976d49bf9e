"""The update step: means of the members, and what happens to a centroid without any."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from protoclip_jax.episodes.segments import exact_segment_sums, segment_counts, segment_sums


def member_means(
    points_nd: Float[Array, "n d"],
    weights_n: Float[Array, "n"] | None,
    labels_n: Int[Array, "n"],
    centroids_kd: Float[Array, "k d"],
    *,
    exact: bool,
) -> tuple[Float[Array, "k d"], Int[Array, "k"]]:
    """Means of the members (weighted, if weights are given) and member counts.

    Args:
      points_nd: finite points.
      weights_n: weights, or None for equal ones.
      labels_n: cluster of each point; a label of k leaves the point out.
      centroids_kd: what a cluster without members keeps.
      exact: sum through integers (`exact_segment_sums`), for hardware that adds in no fixed order.
    """
    k = centroids_kd.shape[0]
    add = exact_segment_sums if exact else segment_sums
    counts = segment_counts(labels_n, k)
    if weights_n is None:
        sums, totals = add(points_nd, labels_n, k), counts.astype(jnp.float32)[:, None]
    else:
        sums = add(points_nd * weights_n[:, None], labels_n, k)
        totals = add(weights_n[:, None], labels_n, k)
    means = jnp.where(totals > 0, sums / jnp.where(totals > 0, totals, 1), centroids_kd)
    return means, counts


def split_largest(
    centroids_kd: Float[Array, "k d"],
    counts_k: Int[Array, "k"],
    nudge: float,
    wanted: Bool[Array, ""],
) -> Float[Array, "k d"]:
    """Gives each empty cluster a copy of a large one, the two pushed apart by `nudge`.

    The first empty cluster copies the cluster with most members, the second the next, ties to the
    lower index; a cluster of one member is never copied, and empty clusters left over stay as
    they are. Only integer counts decide, so the choice is the same on every device.
    """
    k = counts_k.shape[0]
    empty = counts_k == 0
    largest_first = jnp.argsort(-counts_k, stable=True)
    donor = largest_first[jnp.maximum(jnp.cumsum(empty) - 1, 0)]
    receives = empty & (counts_k[donor] >= 2) & wanted
    gives = jnp.zeros(k, bool).at[donor].max(receives)
    apart = jnp.where(jnp.arange(centroids_kd.shape[1]) % 2 == 0, nudge, -nudge)
    copied = jnp.where(receives[:, None], centroids_kd[donor] * (1 + apart), centroids_kd)
    return jnp.where(gives[:, None], centroids_kd * (1 - apart), copied)


def normalised(
    means_kd: Float[Array, "k d"], before_kd: Float[Array, "k d"]
) -> Float[Array, "k d"]:
    """Centroids of length 1 for spherical k-means; one of length 0 keeps its place."""
    length = jnp.sqrt(jnp.sum(means_kd * means_kd, axis=1, keepdims=True))
    return jnp.where(length > 0, means_kd / jnp.where(length > 0, length, 1), before_kd)
