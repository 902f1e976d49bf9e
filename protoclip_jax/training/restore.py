"""A trained model out of a workdir."""

from pathlib import Path

import jax
from jax.sharding import SingleDeviceSharding

from protoclip_jax.config import ConfigError
from protoclip_jax.encoder import Encoder
from protoclip_jax.recipe import from_flat
from protoclip_jax.training import record, state
from protoclip_jax.training.checkpoint import Checkpoints


def restore_encoder(workdir: Path, step: int | None = None) -> Encoder:
    """Reads parameters and batch statistics of a checkpoint, whole, onto one device.

    Raises:
      ConfigError: no run, or no such checkpoint, in the folder.
    """
    config = from_flat(record.read(workdir)["recipe"])
    graphdef, like = state.shapes(config)
    here = SingleDeviceSharding(jax.local_devices()[0])
    wanted = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {name: like[name] for name in ("params", "batch_stats")},
    )
    checkpoints = Checkpoints(workdir)
    try:
        found = checkpoints.latest() if step is None else step
        if found is None:
            raise ConfigError(f"{workdir} holds no complete checkpoint yet")
        restored = checkpoints.restore(found, wanted)
    finally:
        checkpoints.close()
    return Encoder(state.model_of(config), graphdef, restored["params"], restored["batch_stats"])
