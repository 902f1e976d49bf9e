"""What a training step takes, made up: state, batch, prototypes of the shapes of a run."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from protoclip_jax.config import Config
from protoclip_jax.models.presets import CLIPConfig
from protoclip_jax.training.phases import Phase
from protoclip_jax.training.state import BATCH_AXES

TEACHER_WIDTH = 64  # the paper's sentence features after their PCA


def batch(config: Config, model: CLIPConfig, phase: Phase, mesh: Mesh) -> dict[str, Any]:
    """A batch on the devices: uint8 noise and captions that fill the whole context."""
    rng, rows = np.random.default_rng(0), config.optimizer.batch
    side, text = model.vision.image_size, model.text
    tokens = rng.integers(1, text.vocab_size - 1, (rows, text.context_length), np.int32)
    tokens[:, -1] = text.vocab_size - 1  # the end token has the largest id
    arrays: dict[str, Any] = {
        "image": rng.integers(0, 256, (rows, side, side, 3), np.uint8),
        "tokens": tokens,
        "position": np.arange(rows, dtype=np.int32),
    }
    if phase.prototypes:
        arrays["labels"] = {
            name: rng.integers(0, k, rows, np.int32) for name, k in _clusters(config).items()
        }
        if config.uses_teacher and config.episode.online is not None:
            arrays["teacher"] = rng.normal(size=(rows, TEACHER_WIDTH)).astype(np.float32)
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(BATCH_AXES)))


def prototypes(config: Config, phase: Phase, mesh: Mesh) -> dict[str, Any] | None:
    """Random prototypes, on every device, as `build_prototypes` returns them."""
    if not phase.prototypes:
        return None
    rng, k = np.random.default_rng(1), config.episode.prototypes
    projected = config.model.projection_width

    def rows(number: int, width: int = projected) -> np.ndarray:
        values = rng.normal(size=(number, width))
        return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)

    def counts(number: int) -> np.ndarray:
        return np.full(number, max(1, config.episode.size // number), np.int32)

    arrays: dict[str, Any] = {
        "image": {"centroids": rows(k), "counts": counts(k)},
        "text": {"centroids": rows(k), "counts": counts(k)},
        "text_in_image": rows(k),
        "image_in_text": rows(k),
    }
    if config.uses_teacher:
        many = config.external_prototypes
        arrays["external"] = {"in_image": rows(many), "in_text": rows(many), "counts": counts(many)}
        if config.episode.online is not None:
            arrays["external"]["centroids"] = rows(many, TEACHER_WIDTH)
    return jax.device_put(arrays, NamedSharding(mesh, PartitionSpec()))


def _clusters(config: Config) -> dict[str, int]:
    k = config.episode.prototypes
    external = {"external": config.external_prototypes} if config.uses_teacher else {}
    return {"image": k, "text": k, **external}
