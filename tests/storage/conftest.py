"""A bucket for tests: the storage emulator on loopback, one for all tests of a process."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import types
import urllib.request
import uuid
from pathlib import Path

# Read at gcsfs's import: it would ask the real service what kind of bucket this is.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")

import fsspec
import gcsfs.retry
import pytest
from etils.epath import backend

from protoclip_jax.storage import retries

BUCKET = "bucket"


class Bucket:
    """A folder in the emulator's bucket that no other test has."""

    def __init__(self, server: str):
        self._server, self._folder = server, uuid.uuid4().hex[:8]
        self.url = f"gs://{BUCKET}/{self._folder}"

    @property
    def files(self) -> fsspec.AbstractFileSystem:
        return fsspec.filesystem("gs")

    def put(self, folder: Path, name: str = "") -> str:
        """Copies a local file or folder; its gs:// name."""
        target = f"{self.url}/{name or folder.name}"
        paths = [folder] if folder.is_file() else [p for p in folder.rglob("*") if p.is_file()]
        for path in paths:
            below = "" if folder.is_file() else f"/{path.relative_to(folder).as_posix()}"
            self.files.pipe_file(f"{target}{below}", path.read_bytes())
        return target

    def get(self, name: str, folder: Path) -> None:
        """Copies a folder from the bucket."""
        for found in self.names(name):
            target = folder / found
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.files.cat_file(f"{self.url}/{name}/{found}"))

    def names(self, name: str = "") -> list[str]:
        """All objects below a folder."""
        root = f"{BUCKET}/{self._folder}" + (f"/{name}" if name else "")
        return sorted(path.removeprefix(f"{root}/") for path in self.files.find(root))

    @contextlib.contextmanager
    def faults(self, *rules: dict):
        """Faults of the server: see emulator.py."""
        self._rules(list(rules))
        try:
            yield
        finally:
            self._rules([])

    def _rules(self, rules: list[dict]) -> None:
        request = urllib.request.Request(
            f"{self._server}/_faults", json.dumps(rules).encode(), method="PUT"
        )
        urllib.request.urlopen(request, timeout=10).close()

    def requests(self, text: str = "") -> list[str]:
        """What was asked of the server so far."""
        with urllib.request.urlopen(f"{self._server}/_requests", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return [line for line in lines if text in line]


@pytest.fixture(scope="session")
def storage_server():
    """Starts the emulator; gives the environment in which clients find it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("emulator.py")), str(port), BUCKET]
    )
    server = f"http://127.0.0.1:{port}"
    try:
        _wait(process, server)
        yield {
            "STORAGE_EMULATOR_HOST": server,
            "TENSORSTORE_GCS_HTTP_URL": server,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": server,
            "GOOGLE_CLOUD_PROJECT": "tests",
            "NO_GCE_CHECK": "true",
        }
    finally:
        process.terminate()
        process.wait(10)


def _wait(process: subprocess.Popen, server: str) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{server}/_requests", timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("the storage emulator does not start")


@pytest.fixture
def bucket(storage_server, monkeypatch, tmp_path):
    """A folder of its own in the bucket; caches of its own too."""
    for name, value in storage_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield Bucket(storage_server["STORAGE_EMULATOR_HOST"])
    # Clients know where the server was.
    fsspec.filesystem("gs").clear_instance_cache()
    backend.fsspec_backend._get_filesystem.cache_clear()


@pytest.fixture
def environment(storage_server, tmp_path):
    """For processes that a test starts."""
    return os.environ | storage_server | {"XDG_CACHE_HOME": str(tmp_path / "cache")}


class Clock:
    """Stands for the clock that the retries know: waiting takes no time."""

    def __init__(self, monkeypatch):
        self.now, self.waits = 0.0, []
        monkeypatch.setattr(retries, "time", self)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.waits.append(seconds)


@pytest.fixture
def no_waiting(monkeypatch):
    """A clock of the retries, and of the client's, that goes on by itself."""

    async def at_once(seconds):
        clock.now += seconds

    clock = Clock(monkeypatch)
    monkeypatch.setattr(gcsfs.retry, "asyncio", types.SimpleNamespace(sleep=at_once))
    return clock
