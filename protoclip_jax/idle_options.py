"""Options that cannot act in a recipe: refused where the run would not be what was asked for, told
where they are harmless."""

import dataclasses
import difflib
from collections.abc import Iterator

from protoclip_jax.config import REFERENCE_FLAGS, Config, ConfigError, flatten
from protoclip_jax.evaluation.table import SUITE_METRICS
from protoclip_jax.models.presets import ResNetConfig, preset

LISTS = (".tsv", ".csv", ".txt")

_OF_LISTS = ("data.image_column", "data.caption_column", "data.separator", "data.image_root")
_OF_TFDS = ("data.split", "data.image_feature", "data.text_feature")
_OF_HEADS = ("model.projection_hidden", "model.projection_width")
_OF_CLUSTERS = (
    "episode.online",
    "episode.prototypes",
    "episode.external_prototypes",
    "episode.iterations",
    "episode.redos",
    "episode.seeding",
    "episode.empty",
    "episode.spherical",
    "objective.temperature",
    "objective.back_translation",
    "objective.mask_unused",
    "data.augment_extraction",
    "data.keep_gigabytes",
)


def refuse(config: Config) -> None:
    """Refuses a recipe in which what was asked for cannot happen.

    Raises:
      ConfigError: the first impossibility found.
    """
    _refuse_model(config)
    _refuse_batch(config)
    _refuse_weights(config)
    _refuse_text_span(config)
    _refuse_best(config)
    if config.data.max_unreadable > 1:
        raise ConfigError(
            f"config.data.max_unreadable={config.data.max_unreadable:g} is a share, at most 1"
        )


def _refuse_model(config: Config) -> None:
    try:
        preset(config.model.name)
    except ValueError as error:
        raise ConfigError(f"config.model.name={config.model.name}: {error}") from None


def _has_batch_norm(config: Config) -> bool:
    resnet = isinstance(preset(config.model.name).vision, ResNetConfig)
    return resnet or bool(config.model.projection)


def _refuse_batch(config: Config) -> None:
    batch, parts = config.optimizer.batch, config.optimizer.accumulate
    if batch == 1 and config.objective.clip:
        raise ConfigError(
            "optimizer.batch=1: InfoNCE tells a pair from the others of its batch, and there are "
            "none; take 2 or more"
        )
    group = config.model.batch_norm_group or batch // parts
    if group == 1 and _has_batch_norm(config):
        option = "model.batch_norm_group=1"
        if config.model.batch_norm_group is None:
            option = f"optimizer.batch={batch} in optimizer.accumulate={parts} parts"
        raise ConfigError(
            f"{option}: BatchNorm has the statistics of one row, after which all rows are alike; "
            "take groups of 2 or more"
        )


def _refuse_weights(config: Config) -> None:
    objective, episode = config.objective, config.episode
    few = {"prototypes": objective.prototype, "external_prototypes": objective.external}
    for name, weight in few.items():
        count = episode.prototypes if name == "prototypes" else config.external_prototypes
        if weight and count == 1 and len(config.prototype_episodes):
            raise ConfigError(
                f"episode.{name}=1: a softmax over one prototype is always right; take 2 or more"
            )
    if objective.clip:
        return
    if not len(config.prototype_episodes):
        raise ConfigError(
            "objective.clip=0 and no episode trains on prototypes: every weight is 0, and nothing "
            "would be trained"
        )
    only_clip = config.episode.count - len(config.prototype_episodes)
    if only_clip:
        raise ConfigError(
            f"objective.clip=0: {only_clip} of {episode.count} episodes have no other loss; set "
            "episode.warmup=0 and episode.locked=0, or give objective.clip a weight"
        )


def _refuse_text_span(config: Config) -> None:
    """The span in which all but the image tower learns."""
    optimizer, count = config.optimizer, config.episode.count
    start = optimizer.text_start_episode
    end = count if optimizer.text_end_episode is None else optimizer.text_end_episode
    if start >= count:
        raise ConfigError(
            f"optimizer.text_start_episode={start} is not within the run of episode.count={count}: "
            "text would never be trained"
        )
    steps = (end - start) * config.steps_per_episode
    # The reference only cannot divide by zero: where the cosine has no step, and begins in the run.
    begins = start * config.steps_per_episode + optimizer.warmup_steps < config.total_steps
    parity = optimizer.parity_schedule
    if (optimizer.warmup_steps == steps and begins) if parity else optimizer.warmup_steps >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps={optimizer.warmup_steps} is not shorter than the {steps} "
            f"steps from text_start_episode={start} to text_end_episode={end}, in which text learns"
        )


def _refuse_best(config: Config) -> None:
    best = config.checkpoint.best
    if best is None:
        return
    if not config.evaluation.suite:
        raise ConfigError(
            f"checkpoint.best={best} is a metric of an evaluation, and evaluation.suite is empty: "
            "set evaluation.suite=emoji_text, or checkpoint.best=none"
        )
    name = best.removeprefix("-")
    if name not in SUITE_METRICS:
        near = difflib.get_close_matches(name, SUITE_METRICS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUITE_METRICS)}"
        raise ConfigError(f"checkpoint.best={best}: no evaluation measures {name!r}: {hint}")


def told(config: Config) -> list[str]:
    """Lines on what a recipe sets without any effect; empty for most recipes.

    An option counts as set where it is not at its default. Each is told once, with the first reason
    that there is.
    """
    values, plain = (flatten(dataclasses.asdict(one)) for one in (config, Config()))
    plain |= REFERENCE_FLAGS if config.parity else {}
    lines, known = [], set()
    for reason, options in _reasons(config):
        idle = [path for path in options if values[path] != plain[path] and path not in known]
        known.update(idle)
        if idle:
            named = ", ".join(f"{path}={values[path]!r}" for path in idle)
            lines.append(f"of no effect: {named}: {reason}")
    return lines + list(_notes(config))


def _reasons(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Why some options cannot act, and which."""
    yield from _reasons_of_prototypes(config)
    yield from _reasons_of_data(config)
    model, optimizer, evaluation = config.model, config.optimizer, config.evaluation
    if not _has_batch_norm(config):
        yield "nothing in this model is a BatchNorm", ("model.batch_norm_group",)
    if not evaluation.suite:
        yield "evaluation.suite is empty", ("evaluation.every",)
    elif evaluation.every >= config.episode.count:
        yield (
            f"the run has {config.episode.count} episodes, and its end is evaluated anyway",
            ("evaluation.every",),
        )
    keep_every = config.checkpoint.keep_every
    if keep_every is not None and not any(number % keep_every == 0 for number in _saved(config)):
        yield "no checkpoint is written at the end of such an episode", ("checkpoint.keep_every",)
    all_prototype = len(config.prototype_episodes) == config.episode.count
    if not config.episode.locked and (model.projection is None or all_prototype):
        yield "nothing is without a loss in any episode", ("objective.freeze",)
    moved = optimizer.text_start_episode or optimizer.text_end_episode not in (
        None,
        config.episode.count,
    )
    if not config.episode.locked and not moved:
        yield "no tower is locked and no schedule shifted", ("optimizer.parity_schedule",)


def _reasons_of_prototypes(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    model, objective = config.model, config.objective
    if model.projection is None:
        yield "model.projection=none is plain CLIP", (*_OF_HEADS, *_OF_CLUSTERS)
    if model.projection == 0:
        yield "model.projection=0 has no hidden layer", ("model.projection_hidden",)
    if not len(config.prototype_episodes):
        yield "no episode trains on prototypes", _OF_CLUSTERS
    if not objective.external:
        yield "objective.external=0", ("data.teacher", "episode.external_prototypes")
    if not objective.prototype:
        yield "objective.prototype=0, and a teacher's labels are hard", ("objective.temperature",)


def _reasons_of_data(config: Config) -> Iterator[tuple[str, tuple[str, ...]]]:
    data, train = config.data, config.data.train.lower()
    if not train.endswith(LISTS):
        yield f"{data.train} is no pair list", _OF_LISTS
    if train.endswith((*LISTS, ".tar")) or train.startswith("emoji_text/"):
        yield f"{data.train} is no set of TFDS", _OF_TFDS
    if data.augmentation == "none":
        yield "data.augmentation=none", ("data.augment_extraction",)
    if data.workers:
        yield f"data.workers={data.workers} decode", ("data.threads",)
    if data.keep == "none":
        yield "data.keep=none", ("data.keep_side", "data.keep_gigabytes")


def _notes(config: Config) -> Iterator[str]:
    """What else cannot act, though its value is a default or a number like any other."""
    objective, optimizer = config.objective, config.optimizer
    weights = [
        f"objective.{name}={weight:g}"
        for name, weight in (("prototype", objective.prototype), ("external", objective.external))
        if weight
    ]
    if config.model.projection is not None and weights and not len(config.prototype_episodes):
        yield (
            f"of no effect: {', '.join(weights)}: warm-up and locked episodes take all of "
            f"episode.count={config.episode.count}"
        )
    if not optimizer.learning_rate and not optimizer.text_learning_rate:
        yield "optimizer.learning_rate=0: nothing will be trained"
    if (
        len(config.prototype_episodes)
        and config.data.keep != "none"
        and config.data.keep_gigabytes == 0
    ):
        yield "data.keep_gigabytes=0: no picture is kept, and both passes read all of them"
    if config.checkpoint.best is not None and len(_evaluated(config)) == 1:
        yield (
            f"of no effect: checkpoint.best={config.checkpoint.best!r}: only the last checkpoint "
            f"is evaluated (evaluation.every={config.evaluation.every}, "
            f"checkpoint.every={config.checkpoint.every})"
        )


def _saved(config: Config) -> list[int]:
    """Episodes, from 1, after which a checkpoint is written."""
    count, every = config.episode.count, config.checkpoint.every
    return [number for number in range(1, count + 1) if number % every == 0 or number == count]


def _evaluated(config: Config) -> list[int]:
    """Those of them whose checkpoint has metrics."""
    count, every = config.episode.count, config.evaluation.every
    return [
        number for number in _saved(config) if number == count or (every and number % every == 0)
    ]
