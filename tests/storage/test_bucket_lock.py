"""A bucket's folder is used by one run at a time too."""

import subprocess
import sys

import pytest

from protoclip_jax.storage import lock
from protoclip_jax.storage.lock import HeldError, holder, locked
from protoclip_jax.storage.paths import as_path

HOLD = (
    "import sys, time\n"
    "from protoclip_jax.storage import lock, paths\n"
    "lock.REMOTE_BEAT = 0.2\n"
    "with lock.locked(paths.as_path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(lock, "REMOTE_BEAT", 0.2)


def test_a_second_run_is_refused_and_a_killed_one_is_no_obstacle(bucket, environment):
    folder = as_path(f"{bucket.url}/run")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(HeldError, match=rf"in use by process {process.pid} on "),
            locked(folder),
        ):
            pass
        assert holder(folder).process == process.pid
    finally:
        process.kill()
        process.wait()
    with locked(folder):
        assert holder(folder).process != process.pid
    assert holder(folder) is None


def test_a_busy_server_costs_no_lock(bucket):
    folder = as_path(f"{bucket.url}/run")
    with locked(folder), bucket.faults({"contains": ".lock.json", "count": 2, "status": 503}):
        before = holder(folder)
        assert before is not None
