"""Gradients of a loss over the features of a whole batch: in one go, or part by part."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from protoclip_jax.models.layers import BLOCK

Tree = dict[str, Any]
# (params, rows of a batch) -> (features, batch statistics)
Forward = Callable[[Tree, Tree], tuple[Any, Tree]]
# (features, logit scales) -> (loss, metrics)
Loss = Callable[[Any, Tree], tuple[jax.Array, Tree]]


def rematerialised(forward: Forward) -> Forward:
    """The same function, whose backward pass computes the insides of its blocks again."""
    kept = jax.checkpoint_policies.save_only_these_names(BLOCK)
    return jax.checkpoint(forward, policy=kept)


def at_once(
    forward: Forward, loss: Loss, params: Tree, batch: Tree, scales: Callable[[Tree], Tree]
) -> tuple[Tree, Tree, Tree]:
    """Gradients, metrics and moved statistics of a batch that fits.

    Args:
      forward: the towers.
      loss: of the features of the whole batch.
      params: all parameters.
      batch: rows.
      scales: takes the logit scales out of the parameters.
    """

    def whole(params):
        features, stats = forward(params, batch)
        value, metrics = loss(features, scales(params))
        return value, (metrics, stats)

    gradients, (metrics, stats) = jax.grad(whole, has_aux=True)(params)
    return gradients, metrics, stats


def by_parts(
    forward: Forward,
    loss: Loss,
    params: Tree,
    batch: Tree,
    scales: Callable[[Tree], Tree],
    parts: int,
    mesh: Mesh | None = None,
) -> tuple[Tree, Tree, Tree]:
    """The same for a batch of which only one part at a time fits.

    A contrastive loss needs the features of all pairs: a first pass makes them, without keeping
    activations; the loss is differentiated by the features; a second pass carries that on to the
    parameters, part by part. Both passes see the same pictures, since augmentation is a function of
    the position. Batch statistics are those of each part, as with BatchNorm groups of its size; the
    running ones move once, by the mean over the parts. (GradCache: Gao et al. 2021.)

    Args:
      forward: the towers; called with the rows of a part.
      loss: of the features of the whole batch.
      params: all parameters.
      batch: rows; part p holds the p-th stretch of them.
      scales: takes the logit scales out of the parameters.
      parts: how many; divides the rows.
      mesh: spreads the rows of each part over all its axes.
    """
    cut = jax.tree.map(lambda rows: _cut(rows, parts, mesh), batch)
    features, stats = jax.lax.map(lambda part: forward(params, part), cut)
    joined = jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), features)
    (by_feature, by_scale), metrics = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        joined, scales(params)
    )
    by_feature = jax.tree.map(lambda rows: _cut(rows, parts, mesh), by_feature)

    def add(total, part):
        rows, directions = part

        def along(params):
            found, _ = forward(params, rows)
            products = jax.tree.map(lambda x, direction: jnp.sum(x * direction), found, directions)
            return sum(jax.tree.leaves(products))

        return jax.tree.map(jnp.add, total, jax.grad(along)(params)), None

    start = jax.tree.map(jnp.zeros_like, params)
    gradients, _ = jax.lax.scan(add, start, (cut, by_feature))
    gradients |= {name: gradients[name] + found for name, found in by_scale.items()}
    return gradients, metrics, jax.tree.map(lambda parts: jnp.mean(parts, axis=0), stats)


def _cut(rows: jax.Array, parts: int, mesh: Mesh | None) -> jax.Array:
    """(b, ...) as (parts, b / parts, ...), each part over all devices."""
    rows = rows.reshape(parts, -1, *rows.shape[1:])
    if mesh is None:
        return rows
    spec = PartitionSpec(None, tuple(mesh.axis_names))
    return jax.lax.with_sharding_constraint(rows, NamedSharding(mesh, spec))
