"""Recipes cut down to a few episodes that do nothing but train."""

import dataclasses

from protoclip_jax.config import Config


def short(config: Config, episodes: int) -> Config:
    """So many episodes, all of the middle phase; nothing is evaluated, shown or logged."""
    parts = dataclasses.replace
    return parts(
        config,
        episode=parts(config.episode, count=episodes, warmup=0, locked=0, online=None),
        optimizer=parts(
            config.optimizer, warmup_steps=1, text_start_episode=0, text_end_episode=None
        ),
        evaluation=parts(config.evaluation, suite=""),
        log=parts(config.log, tensorboard=False, progress=False, wandb_project=None),
    )


def as_clip(config: Config) -> Config:
    """The same without prototypes and teacher."""
    parts = dataclasses.replace
    return parts(
        config,
        model=parts(config.model, projection=None),
        objective=parts(config.objective, external=0.0),
    )
