"""The peer of our k-means: faiss, doing the same Lloyd steps from the same start."""

import importlib

import numpy as np
from jaxtyping import Float

INSTALL = "pip install faiss-cpu"


def load(threads: int):
    """The module, with that many threads and its libraries started; None if not installed."""
    try:
        faiss = importlib.import_module("faiss")
    except ImportError:
        return None
    faiss.omp_set_num_threads(threads)
    points = np.random.default_rng(0).normal(size=(512, 16)).astype(np.float32)
    train(faiss, points, points[:8].copy(), iterations=2)
    return faiss


def train(
    faiss, points_nd: Float[np.ndarray, "n d"], start_kd: Float[np.ndarray, "k d"], iterations: int
) -> Float[np.ndarray, "k d"]:
    """Centroids (k, d) after exactly `iterations` steps on all points.

    faiss returns no labels for them: the time holds no last assignment, ours does.
    """
    k, d = start_kd.shape
    clustering = faiss.Kmeans(
        d,
        k,
        niter=iterations,
        seed=1,
        # Otherwise faiss draws at most 256 points a centroid, and warns of few.
        max_points_per_centroid=(2**31 - 1) // k,
        min_points_per_centroid=1,
    )
    clustering.train(points_nd, init_centroids=start_kd)
    return clustering.centroids
