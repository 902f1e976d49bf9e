"""Counts the programs that JAX makes, for tests of what is compiled once."""

import contextlib
from collections.abc import Iterator

from jax import monitoring

_LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_count = [0]


def _listen(event: str, seconds: float, **_) -> None:
    _count[0] += event == _LOWERED


monitoring.register_event_duration_secs_listener(_listen)


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """Yields a list that holds, at the end, how many programs were made meanwhile."""
    before, found = _count[0], []
    yield found
    found.append(_count[0] - before)
