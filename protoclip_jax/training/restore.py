"""A trained model out of a workdir."""

import sys

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from protoclip_jax.config import ConfigError
from protoclip_jax.encoder import Encoder
from protoclip_jax.recipe import from_flat
from protoclip_jax.storage.paths import AnyPath
from protoclip_jax.training import record, state
from protoclip_jax.training.checkpoint import Checkpoints, differences


def start_weights(workdir: AnyPath, like: dict) -> dict:
    """Parameters and batch statistics of another run, where a new run starts from them.

    Args:
      workdir: of the other run.
      like: the new run's TrainState, for shapes and shardings.

    Raises:
      ConfigError: no run, or one of another model; lists what differs.
    """
    config = from_flat(record.read(workdir)["recipe"])
    _, other = state.shapes(config)
    items = ("params", "batch_stats")
    stored, wanted = (
        {
            jax.tree_util.keystr(path): str(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path([tree[name] for name in items])
        }
        for tree in (other, like)
    )
    if lines := differences(stored, wanted):
        raise ConfigError(
            f"config.model.weights={workdir} is another model. Differences:\n  "
            + "\n  ".join(lines[:20])
        )
    return _newest(workdir, {name: like[name] for name in items})


def _newest(workdir: AnyPath, like: dict, step: int | None = None) -> dict:
    """Items of a checkpoint of another run, in which nothing is changed."""
    checkpoints = Checkpoints(workdir)
    try:
        if step is not None:
            return checkpoints.restore(step, like)
        found = checkpoints.newest_whole(lambda step: checkpoints.restore(step, like), _warn)
    finally:
        checkpoints.close()
    if found is None:
        raise ConfigError(f"{workdir} holds no complete checkpoint yet")
    return found[1]


def _warn(text: str) -> None:
    print(f"protoclip_jax: {text}", file=sys.stderr)


def restore_encoder(workdir: AnyPath, step: int | None = None) -> Encoder:
    """Reads parameters and batch statistics of a checkpoint, whole, onto each of our devices.

    Raises:
      ConfigError: no run, or no such checkpoint, in the folder.
    """
    config = from_flat(record.read(workdir)["recipe"])
    graphdef, like = state.shapes(config)
    mesh = jax.make_mesh(
        (jax.local_device_count(),), ("data",), (AxisType.Auto,), devices=jax.local_devices()
    )
    here = NamedSharding(mesh, PartitionSpec())
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {name: like[name] for name in ("params", "batch_stats")},
    )
    restored = _newest(workdir, wanted, step)
    return Encoder(
        state.model_of(config),
        graphdef,
        restored["params"],
        restored["batch_stats"],
        rows=NamedSharding(mesh, PartitionSpec("data")),
    )
