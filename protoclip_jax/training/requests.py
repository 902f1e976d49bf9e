"""What is asked of a run while it trains: save, or save and leave; agreed by all processes."""

import collections
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from protoclip_jax import signals
from protoclip_jax.distributed import Rows

SAVE, LEAVE = 1, 2

# Steps between asking the other processes and acting: the answer is there by then, so that nobody
# waits for it.
_LAG = 2


class Leaving(Exception):
    """The run saved and leaves because it was told to (SIGTERM or SIGINT)."""

    def __init__(self, step: int):
        done = f"saved after step {step} and stopped" if step else "stopped before the first step"
        super().__init__(done)
        self.step = step


class AtOnce(BaseException):
    """Raised in what is not worth finishing when a signal asks to save and leave."""


class Requests:
    """Signals and the clock. Use it in a `with`, which catches SIGTERM and SIGINT.

    The first signal asks to save at the next step and leave; a second SIGINT ends at once. With
    several processes the clock of process 0 counts, a signal to any of them is heard by all, and
    all act after the same step. One process alone need not wait for a step where all is saved, or
    where it only measures.
    """

    def __init__(
        self, minutes: float | None, mesh: Mesh, settled: Callable[[], bool] = lambda: False
    ):
        """Args:
        minutes: between timed saves; none = only what signals ask for.
        mesh: the devices of all processes.
        settled: whether the run could end now without losing anything.
        """
        self._seconds = None if minutes is None else 60 * minutes
        self._saved = time.monotonic()
        self._signals = 0
        self._settled = settled
        self._leaving = self._may_break = False
        self._asked: collections.deque[jax.Array] = collections.deque()
        self._agree = None
        if jax.process_count() > 1:
            by_device = NamedSharding(mesh, PartitionSpec(tuple(mesh.axis_names)))
            self._devices = Rows(by_device, mesh.size)
            whole = NamedSharding(mesh, PartitionSpec())
            self._agree = jax.jit(jnp.max, out_shardings=whole)

    def __enter__(self):
        self._heard_here = signals.heard_by(
            self._heard, lambda: not self._leaving and self._settled()
        )
        self._heard_here.__enter__()
        return self

    def __exit__(self, *error):
        self._heard_here.__exit__(*error)

    def _heard(self, number: int) -> None:
        self._signals += 1
        if self._signals > 1:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        settled = self._settled()
        if self._agree is None and (self._may_break or settled):
            self._leaving = not settled
            raise AtOnce
        # os.write, since a handler may interrupt a print.
        os.write(2, b"\nSaving at the next step, then leaving. Ctrl-C again ends at once.\n")

    def left(self) -> None:
        """All is saved that this process can save: what is left to do may be cut short."""
        self._leaving = self._agree is not None

    @property
    def heard(self) -> bool:
        """Whether a signal came to this process."""
        return self._signals > 0

    @contextlib.contextmanager
    def breaking(self) -> Iterator[None]:
        """What is inside is given up on a signal, by `AtOnce`, if the process is alone."""
        self._may_break = self._agree is None
        try:
            if self._may_break and self._signals:
                self._leaving = not self._settled()
                raise AtOnce
            yield
        finally:
            self._may_break = False

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
            self._leaving = mine == LEAVE
            return mine
        flags = np.full(len(self._devices.local), mine, np.int32)
        self._asked.append(self._agree(self._devices.on_devices(flags)))
        agreed = int(self._asked.popleft()) if len(self._asked) > _LAG else 0
        self._leaving = agreed == LEAVE
        return agreed
