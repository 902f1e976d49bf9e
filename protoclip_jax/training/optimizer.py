"""AdamW over three groups of parameters that can be frozen one by one.

Groups: `image` is the image tower, `heads` both projection heads with the logit scale of the
prototype loss, `text` everything else (text tower and CLIP's logit scale). Each has its own optax
state with its own step count, so that a group that starts late gets its bias correction from
there, and one that is frozen keeps parameters, moments and count.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

GROUPS = ("image", "heads", "text")
MAX_LOGIT_SCALE = math.log(100)

# Nested dicts, keyed by strings; joined with "/" (or ".") a leaf's keys give its name.
Tree = dict[str, Any]

_UNDECAYED = ("bn", "ln", "bias", "logit_scale", "projection_head")


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW (reference defaults: ResNets .999 and 1e-8, ViTs .98 and 1e-6).

    Attributes:
        weight_decay: Times the learning rate, taken from the weights that decay.
        clip_norm: Largest global norm of the trained gradients; None leaves them as they are.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.5
    clip_norm: float | None = None


def group_of(name: str) -> str:
    """The group of a parameter, from its name."""
    if "visual" in name:
        return "image"
    if "projection_head" in name or name.endswith("logit_scale_proto"):
        return "heads"
    return "text"


def decays(name: str, ndim: int) -> bool:
    """Whether weight decay applies: the reference's rule, by name and number of dimensions."""
    return ndim >= 2 and not any(part in name for part in _UNDECAYED)


def select(tree: Tree, group: str, prefix: str = "") -> Tree:
    """The part of a tree that belongs to `group`, nested as before, without empty dicts."""
    chosen = {}
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, dict):
            if inner := select(value, group, name):
                chosen[key] = inner
        elif group_of(name) == group:
            chosen[key] = value
    return chosen


def merge(*trees: Tree) -> Tree:
    """Puts trees without a common leaf back into one: undoes `select`."""
    merged: Tree = {}
    for tree in trees:
        for key, value in tree.items():
            inside = isinstance(value, dict)
            merged[key] = merge(merged.get(key, {}), value) if inside else value
    return merged


def init(params: Tree, settings: OptimizerSettings) -> dict[str, optax.ScaleByAdamState]:
    """Zero moments (nested like the parameters, and of their type) for every group there is."""
    parts = {group: select(params, group) for group in GROUPS}
    return {group: _adam(settings).init(part) for group, part in parts.items() if part}


def state_like(tree: Tree, scalar: Any) -> dict[str, optax.ScaleByAdamState]:
    """A tree of the optimizer state's form whose moments hold the leaves of `tree`.

    For shardings: give the parameters' PartitionSpecs, and that of a scalar for the counts.
    """
    parts = {group: select(tree, group) for group in GROUPS}
    return {g: optax.ScaleByAdamState(scalar, part, part) for g, part in parts.items() if part}


def update(
    grads: Tree,
    opt_state: dict[str, optax.ScaleByAdamState],
    params: Tree,
    lrs: dict[str, Any],
    settings: OptimizerSettings,
    trained: tuple[str, ...] = GROUPS,
) -> tuple[Tree, dict[str, optax.ScaleByAdamState], dict[str, Float[Array, ""]]]:
    """One step: clip by the global norm, AdamW (torch's), clamp both logit scales.

    Pure: nothing is changed in place.

    Args:
        grads: Like `params`; what is not trained may be missing.
        opt_state: From `init` or the step before.
        params: Nested dicts of arrays.
        lrs: "image" for the image tower, "text" for both other groups.
        settings: Of the optimizer.
        trained: Groups to move (static). The others keep parameters, moments and count, and
            their gradients do not enter the norm. The reference always trains all of them.

    Returns:
        params, opt_state, and {"grad_norm": norm of the trained gradients before clipping}.

    Raises:
        ValueError: A name in `trained` that is no group.
    """
    if unknown := set(trained) - set(GROUPS):
        raise ValueError(f"no such parameter group: {sorted(unknown)}; there are {GROUPS}")
    parts = {group: select(params, group) for group in opt_state}
    moving = {group: select(grads, group) for group in opt_state if group in trained}
    norm = optax.tree.norm(moving)
    moving = _clip(moving, norm, settings.clip_norm)
    new_state = dict(opt_state)
    for group, part_grads in moving.items():
        steps, new_state[group] = _adam(settings).update(part_grads, opt_state[group])
        rate = lrs["image" if group == "image" else "text"]
        parts[group] = _step(parts[group], steps, rate, settings.weight_decay)
    params = _clamp_logit_scales(merge(*parts.values()))
    return params, new_state, {"grad_norm": norm}


def _adam(settings: OptimizerSettings) -> optax.GradientTransformation:
    return optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps)


def _clip(grads: Tree, norm: Array, limit: float | None) -> Tree:
    """Scales by torch's factor, limit / (norm + 1e-6), where that is below 1."""
    if limit is None:
        return grads
    factor = jnp.minimum(limit / (norm + 1e-6), 1.0)
    return jax.tree.map(lambda grad: grad * factor.astype(grad.dtype), grads)


def _step(params: Tree, steps: Tree, rate: Any, weight_decay: float, prefix: str = "") -> Tree:
    """p - rate (step + decay p), the decay only where `decays` says so."""
    moved = {}
    for key, value in params.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, dict):
            moved[key] = _step(value, steps[key], rate, weight_decay, name)
        else:
            decay = weight_decay * value if decays(name, value.ndim) else 0.0
            moved[key] = value - jnp.asarray(rate, value.dtype) * (steps[key] + decay)
    return moved


def _clamp_logit_scales(params: Tree) -> Tree:
    """Both raw logit scales within [0, ln 100], after the update and never in the forward."""
    scales = [name for name in ("logit_scale", "logit_scale_proto") if name in params]
    return params | {name: jnp.clip(params[name], 0.0, MAX_LOGIT_SCALE) for name in scales}
