"""ProtoCLIP in JAX: train with `python -m protoclip_jax.main`, use with `load`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from protoclip_jax.encoder import Encoder

__all__ = ["load"]


def load(workdir: str | os.PathLike, step: int | None = None) -> Encoder:
    """The model that a run trained.

    Args:
      workdir: the run's folder, local or gs://.
      step: number of a checkpoint; None for the newest.

    Returns:
      An `Encoder` with `encode_image` and `encode_text`.

    Raises:
      ConfigError: no run, or no such checkpoint, in the folder.
    """
    # Imported here, so that `import protoclip_jax` costs nothing.
    from protoclip_jax.storage.home import at_home
    from protoclip_jax.storage.paths import workdir_at
    from protoclip_jax.training.restore import restore_encoder

    return restore_encoder(workdir_at(at_home(os.fspath(workdir))), step)
