"""Seconds of each part of an episode, with compilation apart from the work itself."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

# Lowering and the compiler itself. Tracing is left out: nested traces are reported by each of
# their levels, so their sum would be too much.
_COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)
_compiled = {"seconds": 0.0}


def _listen(event: str, seconds: float, **_) -> None:
    if event in _COMPILING:
        _compiled["seconds"] += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


def compile_seconds() -> float:
    """Seconds that this process has spent compiling so far."""
    return _compiled["seconds"]


class Stopwatch:
    """Seconds of each named part; what is compiled meanwhile counts as the part "compile"."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds the time of the block to the part."""
        start, compiled = time.perf_counter(), compile_seconds()
        try:
            yield
        finally:
            compiling = compile_seconds() - compiled
            self._add(name, time.perf_counter() - start - compiling)
            if compiling:
                self._add("compile", compiling)

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def line(self) -> str:
        """The parts in one line, in the order in which they happened."""
        return ", ".join(f"{name} {value:.1f} s" for name, value in self.seconds.items())
