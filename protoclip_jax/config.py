"""All settings of a run, as frozen dataclasses, and what combinations can not be run.

The dataclasses are the only list of options: their comments are the reference for recipes and
for `--config.section.name=value`. How a recipe becomes a `Config` is in recipe.py.
"""

import dataclasses
from typing import Any

from protoclip_jax.data.kept import FORMS


class ConfigError(ValueError):
    """A recipe or an override that cannot be run; the message is one line for the user."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which towers and heads."""

    name: str = "RN50"  # a preset: see protoclip_jax/models/presets.py
    projection: int | None = 1  # hidden layers of the projection heads; none = plain CLIP
    projection_hidden: int = 2048  # width of the hidden layers
    projection_width: int = 128  # width of the projected features
    batch_norm_group: int | None = None  # rows that share batch statistics; none = whole batch
    weights: str | None = None  # workdir of another run, from whose weights a new run starts
    rematerialise: bool = False  # compute activations again in the backward pass: less memory
    dtype: str = "bfloat16"  # compute type: bfloat16 or float32 (parameters stay float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the pairs come from and how pictures become batches."""

    train: str = ""  # pair list (.tsv, .csv), folder of `prepare convert`, .tar shards, tfds:NAME
    image_column: str = "filepath"  # names of the columns of a pair list
    caption_column: str = "title"
    separator: str = "\t"
    image_root: str | None = None  # folder of relative paths; none = the list's own folder
    split: str = "train"  # of a TFDS set, and the names of its features
    image_feature: str = "image"
    text_feature: str = "caption"
    limit: int | None = None  # use a seeded random subset of this many pairs
    teacher: str | None = None  # .npy of one row a pair, or emoji_text; none = no teacher
    augmentation: str = "light"  # none, clip (crop 0.9-1) or light (ProtoCLIP's)
    augment_extraction: bool = True  # extraction sees augmented pictures, as the reference does
    workers: int = 0  # worker processes that decode; 0 = threads of this process
    threads: int = 8  # threads that decode where there are no workers
    keep: str = "auto"  # between an episode's passes: pixels, jpeg, none (read twice); auto = fits
    keep_side: int = 256  # shorter side of a kept picture; crops come from the kept copy
    keep_gigabytes: float = 4.0  # host memory of a process for them; the rest is read twice
    max_unreadable: float = 0.5  # stop at the start when a larger share cannot be read
    parity_preprocess: bool = False  # convert odd pictures after resizing, as the reference does


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """How many episodes, of what, with how many prototypes."""

    count: int = 100  # episodes of the run
    size: int = 200_000  # pairs of an episode
    warmup: int = 1  # first episodes with InfoNCE only
    locked: int = 0  # last episodes with InfoNCE only and the image tower locked (LiT)
    replacement: bool = False  # draw pairs with replacement, as the reference does
    online: float | None = None  # share that is extracted; labels at the step. none = offline: all
    prototypes: int = 20_000  # clusters K in each modality
    external_prototypes: int | None = None  # clusters of the external teacher; none = K
    iterations: int = 20  # of k-means
    redos: int = 1  # k-means runs, of which the best counts
    seeding: str = "d2"  # d2 (rounds of D2 sampling) or random (permutation)
    empty: str = "split"  # empty clusters: split the largest, or keep
    spherical: bool = False  # normalise the centroids


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """Weights and form of the loss."""

    clip: float = 1.0  # weight of InfoNCE
    prototype: float = 1.0  # weight of the prototype terms
    external: float = 0.0  # weight of the external teacher's terms
    temperature: float | None = 0.01  # of the soft targets; none = hard labels
    back_translation: bool = True  # compare a student with prototypes in its own space (PBT)
    mask_unused: bool = True  # prototypes without members leave both softmaxes
    freeze: bool = True  # what has no loss stands still; false = it drifts as in the reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its two learning-rate schedules."""

    batch: int = 512  # pairs of a step, over all devices
    learning_rate: float = 5e-4
    text_learning_rate: float | None = None  # of all but the image tower; none = the same
    warmup_steps: int = 2000
    weight_decay: float = 0.5
    beta1: float = 0.9
    beta2: float = 0.999  # the reference: 0.98 for ViT
    epsilon: float = 1e-8  # the reference: 1e-6 for ViT
    clip_norm: float | None = None  # of the global gradient; none = no clipping
    accumulate: int = 1  # parts of a batch that take turns; each is its own BatchNorm group
    max_skipped: int = 10  # steps in a row with a loss or gradient that is not finite: then stop
    text_start_episode: int = 0  # all but the image tower stand still before
    text_end_episode: int | None = None  # and after; none = the end of the run
    parity_schedule: bool = False  # warm-up overrides the lock, shifted cosine rises again


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What is measured, and when."""

    suite: str = ""  # emoji_text, or empty for none
    every: int = 0  # episodes between evaluations; 0 = only before and after the run


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept."""

    every: int = 1  # episodes between checkpoints; the last is always saved
    minutes: float | None = 15.0  # between checkpoints inside an episode; none = only at its end
    keep: int = 2  # newest checkpoints that stay
    keep_every: int | None = None  # and those at the end of every so many episodes
    best: str | None = None  # and the best by this metric: zero_shot/top1, or -NAME for the least


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is told while it runs."""

    every: int = 50  # steps between lines of metrics.jsonl
    progress: bool = True  # progress bar
    tensorboard: bool = True
    wandb_project: str | None = None  # needs the wandb extra


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How the devices are arranged."""

    fsdp: int = 1  # devices that share one copy of the parameters; the rest is data parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A whole recipe."""

    seed: int = 0
    parity: str = ""  # "reference" sets every flag that reproduces the PyTorch code's numbers
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    episode: EpisodeConfig = dataclasses.field(default_factory=EpisodeConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)

    @property
    def steps_per_episode(self) -> int:
        """Whole batches of an episode; the tail past the last one is extracted, not trained."""
        return self.episode.size // self.optimizer.batch

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.episode.count * self.steps_per_episode

    @property
    def prototype_episodes(self) -> range:
        """The episodes that extract, cluster and train on prototypes."""
        if self.model.projection is None or not (self.objective.prototype or self.uses_teacher):
            return range(0)
        return range(self.episode.warmup, self.episode.count - self.episode.locked)

    @property
    def extracted(self) -> int:
        """Pairs of an episode that are extracted and clustered: its first ones, a random sample."""
        share = 1.0 if self.episode.online is None else self.episode.online
        return round(share * self.episode.size)

    @property
    def uses_teacher(self) -> bool:
        """Whether the external teacher's terms have a weight."""
        return self.objective.external > 0

    @property
    def external_prototypes(self) -> int:
        """Clusters of the external teacher."""
        return self.episode.external_prototypes or self.episode.prototypes


CHOICES = {
    "parity": ("", "reference"),
    "model.dtype": ("bfloat16", "float32"),
    "data.augmentation": ("none", "clip", "light"),
    "data.keep": ("auto", *FORMS),
    "episode.seeding": ("d2", "random"),
    "episode.empty": ("split", "keep"),
    "evaluation.suite": ("", "emoji_text"),
}
# What parity="reference" sets.
REFERENCE_FLAGS = {
    "data.keep": "none",
    "data.parity_preprocess": True,
    "episode.replacement": True,
    "objective.mask_unused": False,
    "objective.freeze": False,
    "optimizer.parity_schedule": True,
}
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
    for path, choices in CHOICES.items():
        if values[path] not in choices:
            wanted = ", ".join(repr(choice) for choice in choices)
            raise ConfigError(f"config.{path}={values[path]!r} must be one of {wanted}")
    for path in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= values[path] < 1:
            raise ConfigError(f"config.{path}={values[path]} must lie in [0, 1)")


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


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A nested dict by dotted path."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
