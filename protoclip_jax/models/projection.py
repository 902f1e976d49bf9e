"""ProtoCLIP's projection heads."""

import jax
from flax import nnx
from jaxtyping import Array, Float

from protoclip_jax.models.layers import Linear, wide
from protoclip_jax.models.normalization import BatchNorm
from protoclip_jax.models.presets import ProjectionConfig
from protoclip_jax.models.start import Draws


class ReLU(nnx.Module):
    """max(x, 0), as a layer so that the others keep torch's numbers."""

    def __call__(self, x: Float[Array, "b c"]) -> Float[Array, "b c"]:
        """The positive part."""
        return jax.nn.relu(x)


class ProjectionHead(nnx.Module):
    """(Linear, BatchNorm, ReLU) x hidden layers, then Linear; in at least float32.

    Args:
      inputs: width of the tower's embedding.
      config: sizes.
      group: rows that share batch statistics; None for the whole batch.
      dtype: compute type of the model; the head widens it to float32, as it costs next to nothing.
      draws: random numbers for the start.
    """

    def __init__(
        self, inputs: int, config: ProjectionConfig, group: int | None, *, dtype, draws: Draws
    ):
        options = {"dtype": wide(dtype), "draws": draws}
        layers = []
        for _ in range(config.hidden_layers):
            layers += [
                Linear(inputs, config.hidden, **options),
                BatchNorm(config.hidden, group=group),
                ReLU(),
            ]
            inputs = config.hidden
        self.layers = nnx.List([*layers, Linear(inputs, config.width, **options)])

    def __call__(self, x: Float[Array, "b e"], *, train: bool) -> Float[Array, "b d"]:
        """Projected features, not normalised; `train` uses and moves batch statistics."""
        for layer in self.layers:
            x = layer(x, train=train) if isinstance(layer, BatchNorm) else layer(x)
        return x
