"""Which checkpoints stay when a new one is saved: the newest, the best, and every k-th."""

import math
from collections.abc import Sequence

from orbax.checkpoint.checkpoint_managers import preservation_policy

from protoclip_jax.config import CheckpointConfig


class Best(preservation_policy.PreservationPolicy):
    """Keeps the checkpoint with the best value of a metric.

    Orbax forgets metrics at a restart, and here they are told again: see `learn`.
    """

    def __init__(self, metric: str):
        """Takes a metric's name; with a minus before it the least value is best."""
        self._sign = -1 if metric.startswith("-") else 1
        self._name = metric.removeprefix("-")
        self._scores: dict[int, float] = {}

    def learn(self, step: int, metrics: dict[str, float]) -> None:
        """Notes what a checkpoint is worth; one without a finite value is never the best."""
        self._scores.pop(step, None)  # of an older one of this number, which was put aside
        value = metrics.get(self._name, math.nan)
        if math.isfinite(value):
            self._scores[step] = self._sign * value

    def should_preserve(
        self,
        checkpoints: Sequence,
        *,
        context: preservation_policy.PreservationContext,
    ) -> Sequence[bool]:
        """Orbax's question: for each checkpoint, whether it must stay."""
        del context
        steps = [info.step for info in checkpoints]
        known = [step for step in steps if step in self._scores]
        # Of equals the newest.
        best = max(known, key=lambda step: (self._scores[step], step), default=None)
        return [step == best for step in steps]


def policy(keep: CheckpointConfig, steps_per_episode: int, best: Best | None):
    """The newest `keep`, the best by a metric, and every k-th: whatever one of them keeps."""
    policies = [preservation_policy.LatestN(n=keep.keep)]
    if best is not None:
        policies.append(best)
    if keep.keep_every is not None:
        policies.append(preservation_policy.EveryNSteps(keep.keep_every * steps_per_episode))
    return preservation_policy.AnyPreservationPolicy(policies)
