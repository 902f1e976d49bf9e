"""Learning rates of the two towers: a linear warm-up, then half a cosine."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

Step = int | np.integer | Int[jax.Array | np.ndarray, "..."]


@dataclass(frozen=True)
class ScheduleSettings:
    """When each tower learns, in steps from 0, and how fast at the peak.

    Attributes:
        total_steps: Steps of the whole run.
        warmup_steps: Steps in which a rate rises to its peak.
        image_steps: Steps before the image tower is locked: the total if it never is, 0 if it
            always is. Its cosine ends there.
        text_start_step: First step in which everything but the image tower learns.
        text_end_step: The step at which its cosine has ended.
        lr: Peak rate of the image tower.
        lr_text: Peak rate of everything else.
        parity: The reference's formula, step for step: the warm-up overrides the lock, and a
            text rate that starts late rises again after `text_end_step`.
    """

    total_steps: int
    warmup_steps: int
    image_steps: int
    text_start_step: int
    text_end_step: int
    lr: float
    lr_text: float
    parity: bool = False


def learning_rates(settings: ScheduleSettings) -> Callable[[Step], dict]:
    """Checks the settings and returns step -> {"image": rate, "text": rate}.

    The function takes a traced int32 step (rates in JAX's float type: float32, or float64 under
    x64), or an int or an array of numpy ints (rates in float64, for tables).
    Reference: `cosine_lr` with its visual and non-visual groups.

    Raises:
        ValueError: The warm-up leaves no step for a cosine, a tower's steps are negative, or
            (parity) the reference would divide by zero.
    """
    (_check_parity if settings.parity else _check)(settings)
    s = settings
    text_steps = s.text_end_step - s.text_start_step
    # The reference compares the shifted step with the unshifted end: the rate rises again.
    text_last = s.text_end_step if s.parity else text_steps

    def rates(step: Step) -> dict:
        step = step if isinstance(step, jax.Array) else np.asarray(step)
        xp = jnp if isinstance(step, jax.Array) else np
        image = _warmup_cosine(xp, step, s.lr, s.warmup_steps, s.image_steps, s.image_steps)
        if not s.parity:
            image = xp.where(step < s.image_steps, image, 0.0)
        text_step = step - s.text_start_step
        text = _warmup_cosine(xp, text_step, s.lr_text, s.warmup_steps, text_steps, text_last)
        text = xp.where(text_step < 0, 0.0, text)
        return {"image": image, "text": text}

    return rates


def _warmup_cosine(xp, step, peak: float, warmup: int, length: int, last: int):
    """Rate after `step` steps: peak after `warmup`, 0 at `length`, and 0 beyond `last`."""
    # `float` is float64 in numpy and JAX's default float type in jax.numpy.
    rising = peak * (step + 1).astype(float) / max(warmup, 1)
    # Settings in which a zero length would be reached have been refused.
    phase = (step - warmup).astype(float) / ((length - warmup) or 1)
    falling = 0.5 * peak * (1 + xp.cos(math.pi * phase))
    return xp.where(step < warmup, rising, xp.where(step <= last, falling, 0.0))


def _check(s: ScheduleSettings) -> None:
    text_steps = s.text_end_step - s.text_start_step
    if s.warmup_steps < 0:
        raise ValueError(f"warm-up is {s.warmup_steps} steps; give 0 or more")
    if s.warmup_steps >= s.total_steps:
        raise ValueError(
            f"warm-up of {s.warmup_steps} steps leaves nothing of the run's {s.total_steps}; "
            "shorten the warm-up or train longer"
        )
    if not 0 <= s.image_steps <= s.total_steps:
        raise ValueError(
            f"the image tower is locked after {s.image_steps} steps, which is not within "
            f"0..{s.total_steps}; phases count from 1, and no lock means image_steps = total_steps"
        )
    if 0 < s.image_steps <= s.warmup_steps:
        raise ValueError(
            f"warm-up of {s.warmup_steps} steps is not shorter than the {s.image_steps} steps "
            "before the image tower is locked; shorten the warm-up or lock later"
        )
    if not 0 <= s.text_start_step < s.text_end_step <= s.total_steps:
        raise ValueError(
            f"text learns from step {s.text_start_step} to {s.text_end_step}, which is not a "
            f"span within 0..{s.total_steps}"
        )
    if s.warmup_steps >= text_steps:
        raise ValueError(
            f"warm-up of {s.warmup_steps} steps is not shorter than the {text_steps} steps in "
            "which text learns; shorten the warm-up or lengthen the span"
        )


def _check_parity(s: ScheduleSettings) -> None:
    """Refuses what divides by zero in the reference, and only that."""
    spans = {
        "image": (s.image_steps, 0, s.image_steps),
        "text": (s.text_end_step - s.text_start_step, s.text_start_step, s.text_end_step),
    }
    for name, (length, start, last) in spans.items():
        reached = s.warmup_steps <= last and start + s.warmup_steps < s.total_steps
        if length == s.warmup_steps and reached:
            raise ValueError(
                f"warm-up of {s.warmup_steps} steps equals the {name} steps, where the reference "
                "divides by zero; change one of them"
            )
