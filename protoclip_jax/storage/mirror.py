"""The files of a remote workdir that grow line by line: written here, and mirrored there.

An object cannot be appended to. Such files are written to a local folder, from which whole files
are uploaded: now and then in the background, and before each checkpoint, so that what a killed
run goes on from has all its lines.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from protoclip_jax.storage import objects
from protoclip_jax.storage.atomic import PART
from protoclip_jax.storage.cache import machine_folder
from protoclip_jax.storage.paths import AnyPath, is_remote
from protoclip_jax.storage.retries import describe

SECONDS = 60.0  # between two uploads in the background
_NOT_MIRRORED = "wandb"  # folder of what Weights & Biases sends to its own place
_LEFT = 7 * 86400.0  # seconds for which the files of a killed process are kept

Mark = tuple[int, int]  # size and time of a file: another mark, another content


class Mirror:
    """A local folder whose files are in a workdir too.

    For a local workdir the folder is the workdir itself, and nothing is done. Failures to upload
    are told in a line and end nothing: the next upload tries again.

    Attributes:
      local: where to write.
    """

    def __init__(
        self,
        workdir: AnyPath,
        appended: Sequence[str] = (),
        *,
        say: Callable[[str], None] = print,
        seconds: float = SECONDS,
    ):
        """Starts; fetches the files that are appended to.

        Args:
          workdir: of the run.
          appended: patterns of their names, right below the workdir.
          say: gets a line for people, from another thread too.
          seconds: between two uploads in the background.

        Raises:
          Unreachable: no answer for minutes.
          OSError: the workdir cannot be read.
        """
        self._workdir, self._say, self._seconds = workdir, say, seconds
        self._remote = is_remote(workdir)
        if not self._remote:
            self.local = Path(workdir)
            return
        self.local = _fresh_folder()
        self._uploaded: dict[Path, Mark] = {}  # by path below the folder
        for pattern in appended:
            for name in objects.listing(str(workdir), pattern):
                self._fetch(name)
        self._failing = False
        self._busy, self._over = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._now_and_then, daemon=True)
        self._thread.start()
        atexit.register(self.close)  # where a run fails before it is closed

    def flush(self) -> bool:
        """Uploads what has changed; whether all of it is there now."""
        if not self._remote:
            return True
        with self._busy:
            return all(self._upload(name) for name in self._changed())  # up to the first failure

    def close(self) -> None:
        """Uploads what is left, and removes the local folder unless that failed."""
        if not self._remote or self._over.is_set():
            return
        atexit.unregister(self.close)
        self._over.set()
        self._thread.join()
        if self.flush():
            shutil.rmtree(self.local, ignore_errors=True)
        else:
            self._say(
                f"the newest lines and events of this run are in {self.local} only: copy its files "
                f"to {self._workdir}"
            )

    def _fetch(self, name: str) -> None:
        target = self.local / name
        target.write_bytes(objects.read(str(self._workdir / name)))
        self._uploaded[Path(name)] = _mark(target)

    def _now_and_then(self) -> None:
        while not self._over.wait(self._seconds):
            self.flush()

    def _changed(self) -> list[Path]:
        changed = []
        for path in sorted(self.local.rglob("*")):
            name = path.relative_to(self.local)
            with contextlib.suppress(FileNotFoundError):  # it had another name meanwhile
                wanted = path.is_file() and path.suffix != PART and name.parts[0] != _NOT_MIRRORED
                if wanted and self._uploaded.get(name) != _mark(path):
                    changed.append(name)
        return changed

    def _upload(self, name: Path) -> bool:
        target = f"{self._workdir}/{name.as_posix()}"
        try:
            # The mark first: what is appended while the file is read makes another one.
            mark = _mark(self.local / name)
            objects.write(target, (self.local / name).read_bytes())
        except Exception as error:  # whatever it is, the run is worth more than its log
            if not self._failing:
                self._say(
                    f"  {target} cannot be written: the run goes on, and tries it again "
                    f"({describe(error)})"
                )
            self._failing = True
            return False
        if self._failing:
            self._say(f"  {target} is written again")
        self._failing = False
        self._uploaded[name] = mark
        return True


def _mark(path: Path) -> Mark:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _fresh_folder() -> Path:
    """An empty folder of this process; those of processes that are long gone are removed."""
    folder = machine_folder("written")
    for path in folder.iterdir():
        owner = path.name.partition("-")[0]
        if time.time() - path.stat().st_mtime > _LEFT and not _lives(owner):
            shutil.rmtree(path, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=folder))


def _lives(owner: str) -> bool:
    try:
        os.kill(int(owner), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
