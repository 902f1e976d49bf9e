"""SIGTERM and SIGINT, from the first line of a command to its last.

Wherever a signal comes, the process ends with a code that says what to do next, and nothing
swallows it. Imports only the standard library: `install` runs before anything heavy is imported.
What is done depends on how far the command is:

  until `raised`   it ends at once;
  in `raised`      `Stopped` is raised in the main thread;
  in `heard_by`    somebody else decides, who has something to save;
  from `over` on   its exit code is known: it ends with that.

A main thread that is deep in the compiler, or waits for a lost machine, does not come to its
handlers. A second thread is told of every signal, and ends the process when nothing happens.
"""

import atexit
import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

LEFT = 75  # EX_TEMPFAIL: what a scheduler may start again
INTERRUPTED = 130  # 128 + SIGINT, as shells say

NUMBERS = (signal.SIGTERM, signal.SIGINT)
PATIENCE = 10.0  # seconds that the main thread has to react, and to tidy up
SHORT = 3.0  # after a second SIGINT


class Stopped(KeyboardInterrupt):
    """A signal ends this process, which has nothing to save.

    Attributes:
      code: exit code.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.code = code_of(number)


def code_of(number: int) -> int:
    """Exit code of a process that a signal ends."""
    return INTERRUPTED if number == signal.SIGINT else LEFT


class _Ending:
    """How the process ends; shared by the handler and the thread that watches."""

    def __init__(self):
        self.installed = False
        self.listener: Callable[[int], None] = _at_once
        self.may_end: Callable[[], bool] = _always
        self.code: int | None = None  # once it is known
        self.raised = self.over = False
        self.since = 0.0  # when the main thread began to tidy up


def _always() -> bool:
    return True


def _at_once(number: int) -> None:
    _say(b"\nStopped. The same command starts again.\n")
    os._exit(code_of(number))


def _nothing(number: int) -> None:
    """The main thread is on its way out."""


def _raise(number: int) -> None:
    if not _ending.raised:  # whoever catches it is not disturbed again
        _ending.raised = True
        raise Stopped(number)


_ending = _Ending()


def install() -> None:
    """Takes over both signals, also where they were ignored; for programs, from the main thread."""
    if _ending.installed:
        return
    _ending.installed = True
    read, write = os.pipe()
    os.set_blocking(write, False)
    for number in NUMBERS:
        signal.signal(number, _handle)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(read,), name="signals", daemon=True).start()
    atexit.register(_last)  # registered first, so it runs last


def _handle(number: int, frame) -> None:
    _ending.listener(number)


def program(main: Callable[[], int]) -> int:
    """Runs a command that has nothing to save; its exit code, also where a signal ends it."""
    install()
    try:
        with raised():
            code = main()
            over(code)
    except Stopped as error:
        code = error.code
        over(code)
        _say(b"\nstopped\n")
    return code


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Inside, the first signal raises `Stopped`."""
    with heard_by(_raise):
        yield


@contextlib.contextmanager
def heard_by(
    listener: Callable[[int], None], may_end: Callable[[], bool] = _always
) -> Iterator[None]:
    """Inside, signals go to a listener. Where nothing is installed, they do so in here only.

    Args:
      listener: called in the main thread with a signal's number.
      may_end: whether the process may end without the main thread, which does not react.
    """
    earlier = _ending.listener, _ending.may_end
    _ending.listener, _ending.may_end = listener, may_end
    handlers = {}
    if not _ending.installed:
        with contextlib.suppress(ValueError):  # not the main thread: somebody else is in charge
            for number in NUMBERS:
                handlers[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        if not _ending.over:
            _ending.listener, _ending.may_end = earlier
        for number, handler in handlers.items():
            signal.signal(number, handler)


def over(code: int | None = None) -> None:
    """For programs: from here on a signal changes nothing but an exit code that is not known."""
    if not _ending.installed:
        return
    _ending.listener, _ending.may_end = _nothing, _always
    _ending.over, _ending.since = True, time.monotonic()
    if code is not None:
        _ending.code = code


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Threads that are started inside never get the signals, nor do processes started by them.

    A process inherits what is blocked, so that it is safe before its first instruction; this one
    hears the signals in its other threads, or afterwards.
    """
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, NUMBERS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _deaf() -> None:
    for number in NUMBERS:
        signal.signal(number, signal.SIG_IGN)


def _last() -> None:
    """Keeps the exit code from what still may take its place while Python takes itself down."""
    # Python gives its own handlers back to the system before it ends.
    _deaf()
    if _ending.code in (LEFT, INTERRUPTED):
        # What a signal broke off inside of the compiler's own code crashes when it is taken down.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        os._exit(_ending.code)


def ignore() -> None:
    """In a worker process: the process that started it decides what a signal means."""
    _deaf()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, NUMBERS)


def _watch(pipe: int) -> None:
    """Ends the process if the main thread has not done so in time."""
    first: int | None = None
    end, forced = float("inf"), False
    while True:
        waits = None if first is None else 0.2
        if select.select([pipe], [], [], waits)[0]:
            for number in os.read(pipe, 64):
                if number not in NUMBERS:
                    continue
                if first is None:
                    first, end = number, time.monotonic() + PATIENCE
                elif number == signal.SIGINT and not forced:
                    first, forced = number, True
                    end = min(end, time.monotonic() + SHORT)
        now = time.monotonic()
        if now >= end and (forced or (now - _ending.since > PATIENCE and _ending.may_end())):
            if _ending.code is not None:
                os._exit(_ending.code)
            _say(b"\nStopped. The same command goes on from the last checkpoint.\n")
            os._exit(code_of(first))


def _say(text: bytes) -> None:
    # os.write, since a handler may interrupt a print.
    with contextlib.suppress(OSError):
        os.write(2, text)
