"""Which values and combinations of settings cannot be run."""

import dataclasses

import numpy as np

from protoclip_jax.config import Config, ConfigError, flatten
from protoclip_jax.data.kept import FORMS

CHOICES = {
    "parity": ("", "reference"),
    "model.dtype": ("bfloat16", "float32"),
    "data.augmentation": ("none", "clip", "light"),
    "data.keep": ("auto", *FORMS),
    "episode.seeding": ("d2", "random"),
    "episode.empty": ("split", "keep"),
    "evaluation.suite": ("", "emoji_text"),
}
# Texts that may be empty, as the name of a data frame's index is; of `data.train` more is said.
MAY_BE_EMPTY = (
    "parity",
    "evaluation.suite",
    "data.train",
    "data.image_column",
    "data.caption_column",
)
ABOVE_ZERO = (
    "model.projection_hidden",
    "model.projection_width",
    "model.batch_norm_group",
    "data.limit",
    "data.threads",
    "data.keep_side",
    "episode.count",
    "episode.size",
    "episode.prototypes",
    "episode.external_prototypes",
    "episode.online",
    "episode.iterations",
    "episode.redos",
    "objective.temperature",
    "optimizer.batch",
    "optimizer.epsilon",
    "optimizer.clip_norm",
    "optimizer.accumulate",
    "optimizer.max_skipped",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.keep_every",
    "log.every",
    "mesh.fsdp",
)
NOT_NEGATIVE = (
    "seed",
    "model.projection",
    "data.workers",
    "data.keep_gigabytes",
    "data.max_unreadable",
    "episode.warmup",
    "episode.locked",
    "objective.clip",
    "objective.prototype",
    "objective.external",
    "optimizer.learning_rate",
    "optimizer.text_learning_rate",
    "optimizer.warmup_steps",
    "optimizer.weight_decay",
    "optimizer.text_start_episode",
    "evaluation.every",
    "checkpoint.minutes",
)
_INT32, _INT64 = 2**31 - 1, 2**63 - 1
_LEAST, _MOST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# Whole numbers are counts and indices on devices, in 32 bits, up to _INT32, but for these.
AT_MOST = {
    "seed": _INT64 // 2,  # the episode's number is added to it
    "model.projection": 100,
    "model.projection_hidden": 40_000,  # squared, the numbers of a layer fit into 32 bits
    "model.projection_width": 40_000,
    "data.limit": _INT64,
    "data.workers": 10_000,
    "data.threads": 10_000,
    "data.keep_gigabytes": 1e9,
    "episode.count": 1_000_000,  # each is planned at the start
}


def check(config: Config, num_devices: int | None = 1) -> None:
    """Refuses impossible settings, naming both numbers.

    Args:
      config: all settings.
      num_devices: devices of the run; None where they are not known yet: some multiple of those
        that share one copy of the parameters.

    Raises:
      ConfigError: the first impossibility found.
    """
    episode, optimizer = config.episode, config.optimizer
    _check_ranges(config)
    num_devices = num_devices or config.mesh.fsdp
    if not config.data.train:
        raise ConfigError("config.data.train is empty: name emoji_text/train or a pair list")
    if optimizer.batch > episode.size:
        raise ConfigError(
            f"optimizer.batch={optimizer.batch} is larger than episode.size={episode.size}: "
            "an episode would have no step"
        )
    if optimizer.batch % num_devices:
        raise ConfigError(
            f"optimizer.batch={optimizer.batch} does not divide over {num_devices} devices"
        )
    if num_devices % config.mesh.fsdp:
        raise ConfigError(f"mesh.fsdp={config.mesh.fsdp} does not divide {num_devices} devices")
    parts, part = optimizer.accumulate, optimizer.batch // optimizer.accumulate
    if optimizer.batch % parts or part % num_devices:
        raise ConfigError(
            f"optimizer.batch={optimizer.batch} cannot be cut into optimizer.accumulate={parts} "
            f"parts for {num_devices} devices"
        )
    group = config.model.batch_norm_group
    if group is not None and part % group:
        raise ConfigError(
            f"optimizer.batch={optimizer.batch} is not a multiple of model.batch_norm_group={group}"
            + (f" in each of optimizer.accumulate={parts} parts" if parts > 1 else "")
        )
    if config.total_steps > _INT32:
        raise ConfigError(
            f"episode.count={episode.count} episodes of {config.steps_per_episode} steps are too "
            f"many to be counted: at most {_INT32} steps"
        )
    if optimizer.warmup_steps >= config.total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is not shorter than the run of "
            f"{config.total_steps} steps ({episode.count} episodes of {config.steps_per_episode})"
        )
    _check_phases(config)
    _check_prototypes(config)


def _check_ranges(config: Config) -> None:
    values = flatten(dataclasses.asdict(config))
    for path in ABOVE_ZERO:
        if values[path] is not None and not values[path] > 0:
            raise ConfigError(f"config.{path}={values[path]} must be above 0")
    for path in NOT_NEGATIVE:
        if values[path] is not None and not values[path] >= 0:
            raise ConfigError(f"config.{path}={values[path]} must not be negative")
    for path, value in values.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_size(path, value)
        if value == "" and path not in MAY_BE_EMPTY:
            raise ConfigError(f"config.{path} is empty{_none_hint(path)}")
    for path, choices in CHOICES.items():
        if values[path] not in choices:
            wanted = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"config.{path}={values[path]!r} must be one of {wanted}")
    for path in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= values[path] < 1:
            raise ConfigError(f"config.{path}={values[path]} must lie in [0, 1)")


def _none_hint(path: str) -> str:
    """How none of it is written, where there may be none."""
    optional = flatten(dataclasses.asdict(Config()))[path] is None
    return f": give it a value, or none as config.{path}=none" if optional else ""


def _check_size(path: str, value: int | float) -> None:
    """Refuses a number that the types of the devices cannot hold, or no machine."""
    if path in AT_MOST or isinstance(value, int):
        most = AT_MOST.get(path, _INT32)
        if value > most:
            raise ConfigError(f"config.{path}={value} is too large: at most {most:.10g}")
        return
    if value and not _LEAST <= abs(value) <= _MOST:
        what = "large" if abs(value) > 1 else "small"
        raise ConfigError(f"config.{path}={value} is too {what} for float32")


def _check_phases(config: Config) -> None:
    episode, optimizer = config.episode, config.optimizer
    if episode.warmup > episode.count or episode.locked > episode.count:
        raise ConfigError(
            f"episode.warmup={episode.warmup} or episode.locked={episode.locked} is longer than "
            f"the run of episode.count={episode.count}"
        )
    image_steps = (episode.count - episode.locked) * config.steps_per_episode
    if episode.locked and image_steps and optimizer.warmup_steps >= image_steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is not shorter than the "
            f"{image_steps} steps before the image tower is locked"
        )
    end = optimizer.text_end_episode
    if end is not None and not optimizer.text_start_episode < end <= episode.count:
        raise ConfigError(
            f"optimizer.text_end_episode={end} must lie after text_start_episode="
            f"{optimizer.text_start_episode} and within episode.count={episode.count}"
        )


def _check_prototypes(config: Config) -> None:
    episode, objective = config.episode, config.objective
    if config.model.projection is None:
        if config.uses_teacher:
            raise ConfigError(
                f"objective.external={objective.external} needs projection heads: "
                "set model.projection (hidden layers), or objective.external=0"
            )
        return
    if episode.online is not None and episode.online > 1:
        raise ConfigError(f"config.episode.online={episode.online} must lie in (0, 1]")
    pairs = f"episode.size={episode.size}"
    if episode.online is not None:
        pairs = f"the {config.extracted} extracted pairs (episode.online={episode.online})"
    if episode.prototypes > config.extracted:
        raise ConfigError(
            f"episode.prototypes={episode.prototypes} is larger than {pairs}: "
            "k-means needs at least one pair a prototype"
        )
    if config.uses_teacher and config.external_prototypes > config.extracted:
        raise ConfigError(
            f"episode.external_prototypes={config.external_prototypes} is larger than {pairs}"
        )
    if config.uses_teacher and not objective.back_translation:
        raise ConfigError(
            f"objective.external={objective.external} needs objective.back_translation=True: "
            "the teacher's own space has no student"
        )
    if config.uses_teacher and config.data.teacher is None:
        raise ConfigError(
            f"objective.external={objective.external} needs data.teacher (a .npy file)"
        )
