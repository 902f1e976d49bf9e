"""All settings of a run, as frozen dataclasses.

The dataclasses are the only list of options: their comments are the reference for recipes and
for `--config.section.name=value`. How a recipe becomes a `Config` is in recipe.py, and
which cannot be run in config_checks.py.
"""

import dataclasses
from typing import Any


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


# What parity="reference" sets.
REFERENCE_FLAGS = {
    "data.keep": "none",
    "data.parity_preprocess": True,
    "episode.replacement": True,
    "objective.mask_unused": False,
    "objective.freeze": False,
    "optimizer.parity_schedule": True,
}


def flatten(tree: dict, prefix: str = "") -> dict[str, Any]:
    """A nested dict by dotted path."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
