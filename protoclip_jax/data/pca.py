"""Principal components: fewer numbers a row, with as much of the variance kept as possible."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class PCA(NamedTuple):
    """A fitted projection.

    Attributes:
      mean_e: subtracted first.
      components_de: orthonormal directions, the one with most variance first. The sign is such
        that the entry of largest size is positive.
      share_d: share of the variance that lies along each.
    """

    mean_e: Float[np.ndarray, " e"]
    components_de: Float[np.ndarray, "d e"]
    share_d: Float[np.ndarray, " d"]

    def project(self, features_ne: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n d"]:
        """Coordinates along the components, neither whitened nor scaled to length 1; float32."""
        return ((features_ne - self.mean_e) @ self.components_de.T).astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """Hash of the mean and the components."""
        numbers = self.mean_e.tobytes() + self.components_de.tobytes()
        return hashlib.blake2b(numbers, digest_size=16).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the arrays to an .npz file."""
        part = Path(f"{path}.part")
        with open(part, "wb") as file:
            np.savez(file, mean=self.mean_e, components=self.components_de, share=self.share_d)
        os.replace(part, path)


def fit_pca(features_ne: Float[np.ndarray, "n e"], dimensions: int) -> PCA:
    """Fits in float64, the rows taken some at a time.

    Raises:
      ValueError: more dimensions than the features have numbers a row, or rows to tell them by.
    """
    count, width = features_ne.shape
    if not 0 < dimensions <= min(count, width):
        raise ValueError(
            f"dimensions is {dimensions}: wanted 1 to {min(count, width)}, "
            f"for features of {width} numbers and {count} rows to fit on"
        )
    mean_e = np.mean(features_ne, axis=0, dtype=np.float64)
    scatter_ee = np.zeros((width, width))
    for first in range(0, count, 4096):
        centred = features_ne[first : first + 4096] - mean_e
        scatter_ee += centred.T @ centred
    variance, directions = np.linalg.eigh(scatter_ee)
    components = directions.T[::-1][:dimensions]
    largest = np.take_along_axis(components, np.abs(components).argmax(1)[:, None], 1)
    total = max(float(np.trace(scatter_ee)), np.finfo(np.float64).tiny)
    return PCA(
        mean_e.astype(np.float32),
        (components * np.sign(largest)).astype(np.float32),
        (np.maximum(variance[::-1][:dimensions], 0) / total).astype(np.float32),
    )


def load_pca(path: str | Path) -> PCA:
    """Reads what `PCA.save` wrote.

    Raises:
      ValueError: the file is something else.
    """
    try:
        file = np.load(path, allow_pickle=False)
        return PCA(file["mean"], file["components"], file["share"])
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is no fitted PCA ({error}): give a teacher's .pca.npz") from None
