"""Numbers as TensorBoard events, written by the thread that logs them.

tensorboardX's own writer has a thread of its own, which dies of a full disk; whoever then hands
it a number waits for ever.
"""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

_SECONDS = 30.0  # between two flushes


class Events:
    """A file of events. On a full or failing disk there are none from then on, and that is told."""

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]):
        """Args:
        folder: where the files of this run's processes lie.
        step: finished steps: TensorBoard hides the later ones of an earlier process.
        say: gets a line when events end.
        """
        self._folder, self._say = folder, say
        self._writer: EventsWriter | None = None
        self._flushed = time.monotonic()
        with self._told():
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
            begin = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=step + 1, session_log=begin))
            self._writer.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Records numbers of a step."""
        if self._writer is None:
            return
        with self._told():
            for name, value in values.items():
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._writer.write_event(event)
            if time.monotonic() - self._flushed > _SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def flush(self) -> None:
        """Writes what is still in memory."""
        if self._writer is not None:
            with self._told():
                self._writer.flush()

    def close(self) -> None:
        """Writes what is still in memory; nothing follows."""
        if self._writer is not None:
            with self._told():
                self._writer.close()
        self._writer = None

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except OSError as error:
            self._writer = None
            self._say(
                f"  {self._folder} cannot be written ({error.strerror}): no more TensorBoard "
                "events; metrics.jsonl has the numbers"
            )
