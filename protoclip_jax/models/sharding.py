"""Where each parameter lives on the mesh: one table, its lookup, and how it is printed."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Tree = dict[str, Any]

# Pattern of the end of a path -> partition, first match. "fsdp" cuts the parameters over the
# devices that share one copy. Small arrays stay whole: cutting them costs more than it saves.
TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (r"logit_scale(_proto)?", PartitionSpec()),
    (r"running_(mean|var)", PartitionSpec()),
    (r"(bias|(bn|ln_)\w*/weight|layers/\d+/weight)", PartitionSpec()),
    (r"(class|positional)_embedding", PartitionSpec()),
    (r"visual/conv\d/kernel", PartitionSpec()),
    (r"conv\d?/kernel", PartitionSpec(None, None, None, "fsdp")),
    (r"token_embedding", PartitionSpec(None, "fsdp")),
    (r"(text_projection|visual/proj)", PartitionSpec("fsdp", None)),
    (r"(c_proj|out_proj)/kernel", PartitionSpec("fsdp", None)),
    (r"(in_proj|c_fc|[qkv]_proj|layers/\d+)/kernel", PartitionSpec(None, "fsdp")),
)

# What no layer casts to the compute type before it is used.
READ_IN_FLOAT32 = r"token_embedding|projection_head"


class ShardingError(ValueError):
    """A parameter that the table does not know."""


def partition_specs(shapes: Tree, mesh: Mesh | None = None) -> Tree:
    """The partition of every array of a tree of parameters or batch statistics.

    Args:
      shapes: nested dicts whose leaves have a shape (arrays, or the result of `jax.eval_shape`).
      mesh: where given, an array that its axes do not divide stays whole.

    Returns:
      The same tree with a `PartitionSpec` for each leaf.

    Raises:
      ShardingError: no row of the table matches; names all such paths.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(shapes)
    specs = [(_path(keys), _lookup(_path(keys)), leaf.shape) for keys, leaf in flat]
    unknown = [path for path, spec, _ in specs if spec is None]
    if unknown:
        raise ShardingError(
            f"no row of the sharding table matches {', '.join(unknown)}: add one to "
            "protoclip_jax/models/sharding.py"
        )
    leaves = [spec if _divides(spec, shape, mesh) else PartitionSpec() for _, spec, shape in specs]
    return jax.tree_util.tree_unflatten(structure, leaves)


def gathered(params: Tree, mesh: Mesh | None, dtype: jax.typing.DTypeLike = jnp.float32) -> Tree:
    """Parameters as a forward pass takes them: whole on every device; gradients come back cut.

    Left to itself, the compiler cuts what goes through the towers by attention heads or hidden
    units, as the weights are cut, and exchanges activations of the whole batch. Told this, it
    fetches a weight before its use, drops it afterwards (and fetches it again in the backward pass
    where that is rematerialised), and every row stays on its device.

    Args:
      params: nested dicts, cut as `partition_specs` says.
      mesh: None or one without an "fsdp" axis longer than 1: nothing to gather.
      dtype: the model's compute type, in which its matrices travel.
    """
    if mesh is None or mesh.shape.get("fsdp", 1) == 1:
        return params

    def whole(keys, leaf, spec):
        if spec == PartitionSpec():
            return leaf
        if not re.search(READ_IN_FLOAT32, _path(keys)):
            leaf = leaf.astype(dtype)  # as the layer does, but before the exchange
        return _gather(leaf, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(whole, params, partition_specs(params, mesh))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather(leaf: jax.Array, cut: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(leaf, NamedSharding(cut.mesh, PartitionSpec()))


_gather.defvjp(
    lambda leaf, cut: (_gather(leaf, cut), None),
    lambda cut, _, gradient: (jax.lax.with_sharding_constraint(gradient, cut),),
)


def describe(shapes: Tree, specs: Tree) -> str:
    """One line an array: path, shape, type and partition; then the totals."""
    flat, _ = jax.tree_util.tree_flatten_with_path(shapes)
    rows = [
        (_path(keys), "x".join(map(str, leaf.shape)) or "scalar", str(leaf.dtype), str(tuple(spec)))
        for (keys, leaf), spec in zip(
            flat,
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, PartitionSpec)),
            strict=True,
        )
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    numbers = sum(math.prod(leaf.shape) for _, leaf in flat)
    return "\n".join([*lines, f"{len(rows)} arrays, {numbers:,} numbers"])


def _path(keys: tuple) -> str:
    return "/".join(str(key.key) for key in keys)


def _lookup(path: str) -> PartitionSpec | None:
    return next((spec for end, spec in TABLE if re.search(rf"(^|/){end}$", path)), None)


def _divides(spec: PartitionSpec, shape: tuple[int, ...], mesh: Mesh | None) -> bool:
    if mesh is None:
        return True
    return all(
        axis is None or size % mesh.shape[axis] == 0
        for axis, size in zip(spec, shape, strict=False)
    )
