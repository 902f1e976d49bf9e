"""What goes through Python's logging and warnings: one form on the screen, the rest in a file.

Libraries tell one trouble in hundreds of lines, among which ours would be lost, and each in a form
of its own. On the screen is our own line; theirs are in `libraries.log` of the workdir, with times
and tracebacks.
"""

import contextlib
import logging
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import logging as absl_logging

FILE = "libraries.log"
OURS = "protoclip_jax"
_MOST = 10_000  # messages in the file: a library may repeat one at every step
_EARLY = 200  # kept until it is known where the file is

_form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")


class Messages(logging.Handler):
    """The only handler of the process: ours to the screen, libraries' warnings into the file."""

    def __init__(self, say: Callable[[str], None] | None = None):
        """Args:
        say: gets lines for the screen; stderr by default.
        """
        super().__init__(logging.WARNING)
        self._say = say or _print
        self._early: list[str] = []
        self._path: Path | None = None
        self.count = 0  # messages in the file

    def emit(self, record: logging.LogRecord) -> None:
        """Takes in a message."""
        with contextlib.suppress(OSError):  # a full disk is told by those who need it
            if record.name.partition(".")[0] == OURS:
                self._say(f"  {record.levelname.lower()}: {record.getMessage()}")
            else:
                self._keep(_form.format(record))

    def keep_in(self, path: Path) -> None:
        """From here on libraries' messages go to this file, the earlier ones too."""
        with self.lock:
            self._path, early, self._early = path, self._early, []
        for text in early:
            with contextlib.suppress(OSError):
                self._keep(text)

    def say_with(self, say: Callable[[str], None]) -> None:
        """From here on lines for the screen go there, for example above a bar."""
        self._say = say

    def where(self) -> str:
        """What an error's line adds about the file, if there is something in it."""
        return f" (the libraries' own words are in {self._path})" if self.count else ""

    def _keep(self, text: str) -> None:
        with self.lock:
            if self._path is None:
                self._early = [*self._early, text][-_EARLY:]
                return
            if self.count >= _MOST:
                return
            with self._path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(text + "\n")
            self.count += 1


def _print(text: str) -> None:
    print(f"protoclip_jax: {text.strip()}", file=sys.stderr, flush=True)


def take_over() -> Messages:
    """Makes a `Messages` the only handler of this process, of warnings and of threads' errors."""
    found = Messages()
    root = logging.getLogger()
    absl_logging.use_absl_handler()  # so that it is not added later
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(found)
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax and tfds tell every step of theirs
    logging.captureWarnings(True)

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        lines = traceback.format_exception(
            arguments.exc_type, arguments.exc_value, arguments.exc_traceback
        )
        name = arguments.thread.name if arguments.thread else "a thread"
        logging.getLogger("threads").error("%s ended:\n%s", name, "".join(lines))

    threading.excepthook = of_thread
    return found
