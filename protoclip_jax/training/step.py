"""One training step: a pure function of (state, batch, prototypes), compiled once a phase."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from protoclip_jax.config import Config
from protoclip_jax.data import augmentation, walk
from protoclip_jax.episodes.online import agreement, online_labels
from protoclip_jax.models import clip, sharding
from protoclip_jax.objectives.total import total_loss
from protoclip_jax.training import gradients, optimizer, schedule
from protoclip_jax.training.phases import Phase

State = dict[str, Any]
Step = Callable[[State, dict, dict | None], tuple[State, dict[str, jax.Array]]]


def schedule_settings(config: Config) -> schedule.ScheduleSettings:
    """The learning-rate schedule of a recipe, in steps."""
    episode, settings, steps = config.episode, config.optimizer, config.steps_per_episode
    end = episode.count if settings.text_end_episode is None else settings.text_end_episode
    rate = settings.learning_rate
    return schedule.ScheduleSettings(
        total_steps=config.total_steps,
        warmup_steps=settings.warmup_steps,
        image_steps=(episode.count - episode.locked) * steps,
        text_start_step=settings.text_start_episode * steps,
        text_end_step=end * steps,
        lr=rate,
        lr_text=rate if settings.text_learning_rate is None else settings.text_learning_rate,
        parity=settings.parity_schedule,
    )


def optimizer_settings(config: Config) -> optimizer.OptimizerSettings:
    """AdamW's settings of a recipe."""
    settings = config.optimizer
    return optimizer.OptimizerSettings(
        beta1=settings.beta1,
        beta2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
    )


def make_train_step(
    graphdef: nnx.GraphDef, config: Config, phase: Phase, mesh: Mesh | None = None
) -> Step:
    """Builds the step of a phase; the caller compiles it.

    The step takes
      state: {"step", "params", "batch_stats", "opt_state"},
      batch: "image" (b, h, w, 3), uint8 or already normalised floats; "tokens" int32 (b, t);
        "position" int32 (b,), places in the episode; "labels": cluster of every row by teacher
        ("image", "text", "external") in a prototype episode, with online assignment -1 for pairs
        that were not extracted; "teacher" (b, e), with online assignment and a teacher,
      prototypes: what `episodes.prototypes.build_prototypes` returns, or None;
    and returns the next state and float32 scalars. Where the loss or the gradient is not finite,
    nothing moves but the count of steps, and `skipped` is 1.
    """
    rates = schedule.learning_rates(schedule_settings(config))
    adamw, parts = optimizer_settings(config), config.optimizer.accumulate

    def train_step(state, batch, prototypes):
        params, step = state["params"], state["step"]
        forward = _forward(graphdef, config, phase, state, mesh)
        loss = _loss(config, phase, mesh, batch, prototypes)
        rows = {name: batch[name] for name in ("image", "tokens", "position")}
        if parts == 1:
            grads, metrics, stats = gradients.at_once(forward, loss, params, rows, _logit_scales)
        else:
            grads, metrics, stats = gradients.by_parts(
                forward, loss, params, rows, _logit_scales, parts, mesh
            )
        lrs = rates(step)
        params, opt_state, norms = optimizer.update(
            grads, state["opt_state"], params, lrs, adamw, phase.trained
        )
        finite = jnp.isfinite(metrics["loss/total"]) & jnp.isfinite(norms["grad_norm"])
        moved = {"params": params, "batch_stats": stats, "opt_state": opt_state}
        moved = {
            name: jax.tree.map(lambda new, old: jnp.where(finite, new, old), tree, state[name])
            for name, tree in moved.items()
        }
        metrics |= norms | {"skipped": 1.0 - finite.astype(jnp.float32)}
        metrics |= {f"learning_rate/{tower}": rate for tower, rate in lrs.items()}
        scales = _logit_scales(moved["params"])
        metrics |= {f"{name}_after": value for name, value in scales.items()}
        return moved | {"step": step + 1}, metrics

    return train_step


def _forward(
    graphdef: nnx.GraphDef, config: Config, phase: Phase, state: State, mesh: Mesh | None
) -> gradients.Forward:
    """The towers on rows of a batch, augmentation included."""
    prepare = image_preparation(config, "train")
    episode, dtype = state["step"] // config.steps_per_episode, config.model.dtype

    def forward(params, rows):
        return clip.apply(
            graphdef,
            _without_gradient(sharding.gathered(params, mesh, dtype), phase.trained),
            state["batch_stats"],
            prepare(rows["image"], episode, rows["position"]),
            rows["tokens"],
            train=True,
            train_image=phase.train_image,
            project=phase.project,
        )

    return gradients.rematerialised(forward) if config.model.rematerialise else forward


def _loss(
    config: Config, phase: Phase, mesh: Mesh | None, batch: dict, prototypes: dict | None
) -> gradients.Loss:
    """The phase's objective on the features of the whole batch."""
    online = config.episode.online is not None and phase.prototypes

    def loss(features, scales):
        labels, metrics = batch.get("labels", {}), {}
        if online:
            offline, labels = labels, online_labels(features, batch.get("teacher"), prototypes)
            metrics = agreement(labels, offline)
        total, terms = total_loss(
            features,
            scales,
            labels,
            prototypes or {},
            phase.weights,
            temperature=config.objective.temperature,
            back_translation=config.objective.back_translation,
            mask_unused=config.objective.mask_unused,
            compute_all=phase.compute_all,
            mesh=mesh,
        )
        return total, metrics | terms

    return loss


def image_preparation(config: Config, purpose: str) -> Callable[..., jax.Array]:
    """The device's part of preparing pictures: colour augmentation and normalisation.

    Args:
      config: the recipe.
      purpose: "train" or "extract": each pass has its own random stream.

    Returns:
      (images, episode, positions) -> normalised pictures. Floats are taken as normalised already.
    """
    chosen = augmentation.augmentation_named(config.data.augmentation)
    colour = chosen.colour if chosen else None
    if purpose == "extract" and not config.data.augment_extraction:
        colour = None

    def prepare(images, episode, positions):
        if images.dtype != jnp.uint8:
            return images
        images = augmentation.unit(images)
        if colour is not None:
            number = walk.PASSES[purpose]
            keys = augmentation.sample_keys(config.seed, episode, number, positions)
            images = augmentation.colour(images, keys, colour)
        return augmentation.normalise(images)

    return prepare


def _logit_scales(params: dict) -> dict[str, jax.Array]:
    return {name: params[name] for name in ("logit_scale", "logit_scale_proto") if name in params}


def _without_gradient(params: dict, trained: tuple[str, ...]) -> dict:
    """Stops the gradient of parameters that do not move, so that XLA leaves their backward out."""
    moving = optimizer.merge(*(optimizer.select(params, group) for group in trained))
    still = [group for group in optimizer.GROUPS if group not in trained]
    held = (jax.lax.stop_gradient(optimizer.select(params, group)) for group in still)
    return optimizer.merge(moving, *held)
