"""One process at a time in a folder, local or remote.

A lock is two things. A file lock where the file system has them, which ends with its process
however that ends. And a note of the holder (`.lock.json`) with a sign of life, for other hosts and
for file systems without locks (or with locks that no other host sees): a holder whose sign of life
does not move is taken for dead.
"""

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from etils import epath

from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import PART
from protoclip_jax.storage.paths import is_remote

LOCK = ".lock"  # the file that is locked, and the start of the note's name
NOTE = LOCK + ".json"

LOCAL_BEAT = 4.0  # seconds between signs of life in a folder
REMOTE_BEAT = 20.0  # and in a bucket, which takes few writes of one object
# What a file system without locks answers; anything else but "held" is a fault to be told.
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host: Its name.
        process: Its process id, as that host (or container) counts.
        started: When it took the lock, with the time zone.
        machine: Identifies machine, boot and process-id namespace; empty where none can be told.
        ticks: When the process began, in the kernel's clock ticks; tells a process id used again.
        token: A random name of this lock.
        beat: The sign of life: a number that grows.
        every: Seconds between two of them.
    """

    host: str
    process: int
    started: str
    machine: str
    ticks: str
    token: str
    beat: int
    every: float

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, which started {self.started}"


class HeldError(ValueError):
    """Another process holds the lock."""


@contextlib.contextmanager
def locked(
    folder: Path | epath.Path,
    say: Callable[[str], None] | None = None,
    lost: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Holds the folder's lock, which ends with the process however it ends.

    Args:
        folder: There already; local or remote.
        say: Gets a line where something has to be waited for; stderr by default.
        lost: Called from a thread when another process has taken the lock over, which happens only
            to a process that was stopped for long; ends the process by default.

    Raises:
        HeldError: Another process holds it; names host, process id and start.
        ValueError: The folder takes no lock file; names the reason.
    """
    folder = epath.Path(folder)
    remote = is_remote(folder)
    with contextlib.ExitStack() as stack:
        has_locks = not remote and _file_lock(folder, stack)
        mine = _me(REMOTE_BEAT if remote else LOCAL_BEAT)
        _wait_for_the_dead(folder, mine, has_locks, say or _say)
        _write(folder, mine)
        if not has_locks:
            _settle_race(folder, mine)
        beats = _Beats(folder, mine, lost or _leave)
        try:
            yield
        finally:
            beats.close()


def holder(folder: Path | epath.Path) -> Holder | None:
    """Who holds or last held a folder's lock, by the note there; None without a readable one."""
    try:
        return Holder(**json.loads(objects.read_text(epath.Path(folder) / NOTE)))
    except (OSError, ValueError, TypeError):
        return None


def _file_lock(folder: epath.Path, stack: contextlib.ExitStack) -> bool:
    """Takes the file lock until the stack unwinds; False where the file system has none."""
    try:
        file = open(os.fspath(folder / LOCK), "a")  # noqa: SIM115 (the stack closes it)
    except OSError as error:
        raise ValueError(f"{folder} takes no lock file ({error.strerror})") from error
    stack.enter_context(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise HeldError(_in_use(folder, holder(folder))) from error
        if error.errno in NO_LOCKS:
            return False
        raise ValueError(f"{folder / LOCK} cannot be locked ({error.strerror})") from error
    return True


def _wait_for_the_dead(
    folder: epath.Path, mine: Holder, has_locks: bool, say: Callable[[str], None]
) -> None:
    """Returns once the holder named in the folder is known to be gone.

    Raises:
        HeldError: It is alive.
    """
    other = holder(folder)
    if other is None:
        return
    if mine.machine and other.machine == mine.machine:
        if has_locks:  # the file lock was free
            return
        if _ticks(other.process) == other.ticks:
            raise HeldError(_in_use(folder, other))
        return
    seconds = 3.5 * max(other.every, 0.1)
    say(f"{folder} was last used by {other}: looking for a sign of life for {seconds:.0f} s")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(min(1.0, other.every / 4))
        now = holder(folder)
        if now is None:  # released while we looked
            return
        if (now.token, now.beat) != (other.token, other.beat):
            raise HeldError(_in_use(folder, now))
    say(f"it is gone: {folder} is taken over")


def _settle_race(folder: epath.Path, mine: Holder) -> None:
    """Where two take a lock at once and nothing but the note decides, the last note wins."""
    time.sleep(min(2.0, mine.every / 2))
    now = holder(folder)
    if now is not None and now.token != mine.token:
        raise HeldError(_in_use(folder, now))


class _Beats:
    """Renews the note from a thread; takes it away at the end."""

    def __init__(self, folder: epath.Path, mine: Holder, lost: Callable[[str], None]):
        self._folder, self._mine, self._lost = folder, mine, lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lock", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._mine.every):
            now = holder(self._folder)
            if now is not None and now.token != self._mine.token:
                self._lost(f"{self._folder} was taken over by {now}")
                return
            self._mine = dataclasses.replace(self._mine, beat=self._mine.beat + 1)
            # A full disk must not end a run that only wants to say that it lives.
            with contextlib.suppress(OSError):
                _write(self._folder, self._mine)

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        now = holder(self._folder)
        if now is not None and now.token == self._mine.token:
            with contextlib.suppress(OSError):
                objects.remove(self._folder / NOTE)


def _write(folder: epath.Path, mine: Holder) -> None:
    text = json.dumps(dataclasses.asdict(mine)) + "\n"
    if is_remote(folder):
        objects.write(os.fspath(folder / NOTE), text.encode())
        return
    part = folder / f"{NOTE}.{mine.token}{PART}"
    try:
        part.write_text(text)
        part.replace(folder / NOTE)
    except OSError as error:  # a write's error does not name the file
        part.unlink(missing_ok=True)
        raise type(error)(error.errno, error.strerror, os.fspath(folder / NOTE)) from error


def _me(every: float) -> Holder:
    return Holder(
        host=socket.gethostname(),
        process=os.getpid(),
        started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        machine=_machine(),
        ticks=_ticks(os.getpid()),
        token=secrets.token_hex(8),
        beat=0,
        every=every,
    )


def _machine() -> str:
    """Names machine, boot and process-id namespace: process ids mean the same where it is equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return ""


def _ticks(process: int) -> str:
    """When a process began, or nothing where there is no such process."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]  # field 22; the name before it may hold anything


def _in_use(folder: epath.Path, who: Holder | None) -> str:
    named = f"by {who}" if who else "by another process"
    return f"{folder} is in use {named}: wait for it, end it, or use another folder"


def _say(text: str) -> None:
    print(f"protoclip_jax: {text}", file=sys.stderr, flush=True)


def _leave(text: str) -> None:
    _say(f"{text}: this process ends, so that two do not write there")
    os._exit(1)
