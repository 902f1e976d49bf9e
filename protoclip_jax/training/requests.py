"""What is asked of a run while it trains: save, or save and leave; agreed by all processes."""

import collections
import os
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from protoclip_jax.distributed import Rows

SAVE, LEAVE = 1, 2

# Steps between asking the other processes and acting: the answer is there by then, so that nobody
# waits for it.
_LAG = 2


class Leaving(Exception):
    """The run saved and leaves because it was told to (SIGTERM or SIGINT)."""

    def __init__(self, step: int):
        super().__init__(f"saved after step {step} and stopped")
        self.step = step


class Requests:
    """Signals and the clock. Use it in a `with`, which catches SIGTERM and SIGINT.

    The first signal asks to save at the next step and leave; a second SIGINT ends at once. With
    several processes the clock of process 0 counts, a signal to any of them is heard by all, and
    all act after the same step.
    """

    def __init__(self, minutes: float | None, mesh: Mesh):
        """Args:
        minutes: between timed saves; none = only what signals ask for.
        mesh: the devices of all processes.
        """
        self._seconds = None if minutes is None else 60 * minutes
        self._saved = time.monotonic()
        self._signals = 0
        self._earlier: dict[int, object] = {}
        self._asked: collections.deque[jax.Array] = collections.deque()
        self._agree = None
        if jax.process_count() > 1:
            by_device = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
            self._devices = Rows(by_device, mesh.size)
            whole = NamedSharding(mesh, PartitionSpec())
            self._agree = jax.jit(jnp.max, out_shardings=whole)

    def __enter__(self):
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._earlier[number] = signal.signal(number, self._heard)
            except ValueError:  # not the main thread: somebody else is in charge of signals
                break
        return self

    def __exit__(self, *_):
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}

    def _heard(self, number: int, frame) -> None:
        self._signals += 1
        if number == signal.SIGINT and self._signals > 1:
            raise KeyboardInterrupt
        # os.write, since a handler may interrupt a print.
        os.write(2, b"\nSaving at the next step, then leaving. Ctrl-C again ends at once.\n")

    def saved(self) -> None:
        """Starts the clock anew; what was asked meanwhile is answered. A signal is asked again."""
        self._saved = time.monotonic()
        self._asked.clear()

    def after_step(self) -> int:
        """What to do after this step: 0, SAVE or LEAVE; the same on every process."""
        mine = LEAVE if self._signals else 0
        due = self._seconds is not None and time.monotonic() - self._saved >= self._seconds
        if due and jax.process_index() == 0:
            mine = max(mine, SAVE)
        if self._agree is None:
            return mine
        flags = np.full(len(self._devices.local), mine, np.int32)
        self._asked.append(self._agree(self._devices.on_devices(flags)))
        return int(self._asked.popleft()) if len(self._asked) > _LAG else 0
