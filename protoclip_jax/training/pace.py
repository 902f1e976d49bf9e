"""How far the host runs ahead of the devices, and how long they wait for it."""

import collections
import time
from collections.abc import Iterator
from typing import Any

import jax

# Steps that may be queued on the devices: enough that they never wait for the host's bookkeeping,
# few enough that queued batches take little memory.
_AHEAD = 2


class Pace:
    """Bounds the steps in flight and measures waits for input.

    Attributes:
      waited: seconds that passed while a batch was fetched and the devices had nothing to do.
    """

    def __init__(self):
        self._in_flight: collections.deque[jax.Array] = collections.deque()
        self.waited = 0.0

    def next(self, batches: Iterator[dict]) -> dict[str, Any]:
        """The next batch."""
        start = time.perf_counter()
        batch = next(batches)
        # Where the newest step is already over, the devices stood still for some of this time; at
        # most one step's worth too much is counted.
        if not self._in_flight or self._in_flight[-1].is_ready():
            self.waited += time.perf_counter() - start
        return batch

    def dispatched(self, result: jax.Array) -> None:
        """Notes a step by an array that it will give; waits for an earlier one."""
        self._in_flight.append(result)
        if len(self._in_flight) > _AHEAD:
            jax.block_until_ready(self._in_flight.popleft())
