"""What an episode's features become before training: clusters, prototypes, labels."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from protoclip_jax.config import Config
from protoclip_jax.data.teacher import Teacher
from protoclip_jax.episodes.kmeans import Clusters, kmeans
from protoclip_jax.episodes.prototypes import build_prototypes
from protoclip_jax.training.labels import EpisodeLabels


class Clustering:
    """The steps of an episode between extraction and training, as a recipe asks for them."""

    def __init__(self, config: Config, mesh: Mesh, teacher: Teacher | None):
        """Args:
        config: a checked recipe.
        mesh: of the devices, all of which cluster.
        teacher: its rows are clustered too; none = image and text alone.
        """
        self._config, self._mesh, self._teacher = config, mesh, teacher

    def clusters(self, episode: int, features, rows: np.ndarray) -> dict[str, Clusters]:
        """k-means in each modality, and of the teacher's rows.

        Args:
          episode: 0-based.
          features: image's and text's, float32 (2, n, d), by position.
          rows: the pair read at each position, (n,).
        """
        settings = self._config.episode
        run = functools.partial(
            kmeans,
            seed=self._config.seed + episode,
            iterations=settings.iterations,
            redos=settings.redos,
            seeding=settings.seeding,
            empty=settings.empty,
            spherical=settings.spherical,
            mesh=self._mesh,
        )
        both = run(features, settings.prototypes)
        clusters = {
            name: Clusters(*(field[index] for field in both))
            for index, name in enumerate(("image", "text"))
        }
        if self._teacher is not None:
            teacher = self._teacher.rows(rows)
            clusters["external"] = run(teacher, self._config.external_prototypes)
        return jax.block_until_ready(clusters)

    def prototypes(self, image, text, clusters: dict[str, Clusters]) -> dict:
        """Prototypes in each student's own space, on all devices, from features (n, d)."""
        external = clusters.get("external")
        prototypes = build_prototypes(
            image,
            text,
            clusters["image"],
            clusters["text"],
            None if external is None else external.labels,
            self._config.external_prototypes,
        )
        if external is not None and self._config.episode.online is not None:
            prototypes["external"]["centroids"] = external.centroids
        replicated = NamedSharding(self._mesh, PartitionSpec())
        return jax.block_until_ready(jax.device_put(prototypes, replicated))

    def labels(self, clusters: dict[str, Clusters], rows: np.ndarray) -> EpisodeLabels:
        """The labels of the rows that were extracted."""
        labels = {name: np.asarray(found.labels) for name, found in clusters.items()}
        return EpisodeLabels(labels, rows, self._config.episode.size)
