"""The three phases of a run: warm-up, prototype, locked-image."""

import dataclasses

from protoclip_jax.config import Config
from protoclip_jax.objectives.total import Weights


@dataclasses.dataclass(frozen=True)
class Phase:
    """What an episode trains on. Static: each phase is one compiled step.

    Attributes:
      name: "warmup", "prototype" or "locked"; "clip" without projection heads.
      weights: of the loss terms.
      trained: optimizer groups that move ("image", "text", "heads").
      train_image: batch statistics (and their running means) in the image tower.
      project: the projection heads run.
      prototypes: the episode is extracted, clustered and back-translated.
      compute_all: terms of weight 0 are computed and multiplied, as the reference does.
    """

    name: str
    weights: Weights
    trained: tuple[str, ...]
    train_image: bool
    project: bool
    prototypes: bool
    compute_all: bool


def phase_of(config: Config, episode: int) -> Phase:
    """The phase of an episode (0-based). The lock wins over the warm-up.

    With `objective.freeze` the locked image tower, its batch statistics, and heads without a
    loss stand still. Without it (the reference) everything runs in every phase: heads drift on
    momentum and statistics move; the lock is then a learning rate of 0.
    """
    objective, has_heads = config.objective, config.model.projection is not None
    locked = episode >= config.episode.count - config.episode.locked
    prototypes = episode in config.prototype_episodes
    weights = Weights(
        clip=objective.clip,
        proto=objective.prototype if prototypes else 0.0,
        external=objective.external if prototypes else 0.0,
    )
    project = has_heads and (prototypes or not objective.freeze)
    groups = {
        "image": not (locked and objective.freeze),
        "text": True,
        "heads": project,
    }
    return Phase(
        name=_name(has_heads, locked, prototypes),
        weights=weights,
        trained=tuple(name for name, moves in groups.items() if moves),
        train_image=groups["image"],
        project=project,
        prototypes=prototypes,
        compute_all=has_heads and not objective.freeze,
    )


def _name(has_heads: bool, locked: bool, prototypes: bool) -> str:
    if locked:
        return "locked"
    if prototypes:
        return "prototype"
    return "warmup" if has_heads else "clip"
