"""A step compiled once for each shape of its batch, which knows how much it computes."""

from collections.abc import Callable
from typing import Any

import jax

from protoclip_jax import distributed
from protoclip_jax.training.flops import flops

# Peak of dense bfloat16 products a device, in FLOP/s, by what its kind starts with: vendors'
# data sheets.
PEAKS = (
    ("NVIDIA H100", 989e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100", 312e12),
    ("Tesla V100", 125e12),
    ("TPU v3", 61.5e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6", 918e12),
)


class CompiledStep:
    """A function of (state, batch, ...) under `jax.jit`, compiled ahead by the batch's shapes.

    Attributes:
      flops: floating-point operations of the last call over all devices (see flops.py); None
        before the first one.
    """

    def __init__(self, function: Callable, **options: Any):
        """Args:
        function: what to compile.
        options: of `jax.jit`.
        """
        self._function = jax.jit(function, **options)
        self._programs: dict[tuple[int, ...], tuple[Callable, float]] = {}
        self.flops: float | None = None

    def __call__(self, state: Any, batch: dict[str, jax.Array], *rest: Any) -> Any:
        """Runs the program of the batch's shape. All that varies is the length of captions."""
        shape = batch["tokens"].shape
        if shape not in self._programs:
            self._programs[shape] = self._compile(state, batch, *rest)
        program, self.flops = self._programs[shape]
        return program(state, batch, *rest)

    def _compile(self, *arguments: Any) -> tuple[Callable, float]:
        traced = self._function.trace(*arguments)
        program = traced.lower().compile()
        # Collective operations give up on a process that compiles half a minute longer.
        distributed.barrier()
        return program, flops(traced.jaxpr)


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOP/s of a device where it is known."""
    kinds = (peak for kind, peak in PEAKS if device.device_kind.startswith(kind))
    return next(kinds, None)
