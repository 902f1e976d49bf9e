"""One process at a time in a folder, on file systems with locks and without."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from protoclip_jax.storage import lock
from protoclip_jax.storage.lock import HeldError, holder, locked

HOLD = (
    "import sys, time\n"
    "from protoclip_jax.storage import lock\n"
    "if sys.argv[2:] == ['no locks']:\n"
    "    import errno\n"
    "    def none(*_): raise OSError(errno.ENOSYS, 'not there')\n"
    "    lock.fcntl.flock = none\n"
    "with lock.locked(sys.argv[1]):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@pytest.fixture
def hold():
    """Starts processes that hold a folder's lock, and ends them."""
    started = []

    def start(folder, *arguments) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, str(folder), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def without_locks(monkeypatch):
    """RUN-02: a file system that has none."""

    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", flock)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "LOCAL_BEAT", 0.1)


def elsewhere(folder, **changes) -> dict:
    """A note of another host's process in a folder."""
    note = {
        "host": "node7",
        "process": 4711,
        "started": "2026-01-02T03:04:05+00:00",
        "machine": "another boot/pid:[1]",
        "ticks": "1",
        "token": "abc",
        "beat": 3,
        "every": 0.1,
    } | changes
    (folder / lock.NOTE).write_text(json.dumps(note))
    return note


def test_second_process_is_told_who_holds_it(tmp_path, hold):
    process = hold(tmp_path)
    with pytest.raises(HeldError) as refused, locked(tmp_path):
        pass
    for part in (str(tmp_path), f"process {process.pid} on {os.uname().nodename}", "started 20"):
        assert part in str(refused.value)
    process.send_signal(signal.SIGKILL)
    process.wait()
    start = time.monotonic()
    with locked(tmp_path):
        assert holder(tmp_path).process == os.getpid()
    assert time.monotonic() - start < 2  # of this machine: nothing to wait for
    assert holder(tmp_path) is None


def test_second_process_where_there_are_no_file_locks(tmp_path, hold, without_locks):
    process = hold(tmp_path, "no locks")
    with pytest.raises(HeldError, match=f"process {process.pid}"), locked(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(tmp_path):
        assert holder(tmp_path).process == os.getpid()


def test_number_of_a_dead_process_used_again(tmp_path, without_locks, quick):
    """In a container, the first process always has the same number."""
    machine = lock._machine()
    elsewhere(tmp_path, machine=machine, process=os.getpid(), ticks="1")
    with locked(tmp_path):
        pass
    elsewhere(tmp_path, machine=machine, process=os.getpid(), ticks=lock._ticks(os.getpid()))
    with pytest.raises(HeldError), locked(tmp_path):
        pass


@pytest.mark.parametrize("locks", [True, False])
def test_lock_of_a_dead_host_is_taken_over(tmp_path, quick, locks, request):
    if not locks:
        request.getfixturevalue("without_locks")
    elsewhere(tmp_path)
    told = []
    with locked(tmp_path, told.append):
        assert holder(tmp_path).process == os.getpid()
    assert "process 4711 on node7" in told[0]
    assert "taken over" in told[1]


@pytest.mark.parametrize("locks", [True, False])
def test_lock_of_a_host_that_lives_is_respected(tmp_path, quick, locks, request, monkeypatch):
    """Also where the file lock is free: some file systems keep it to one host."""
    if not locks:
        request.getfixturevalue("without_locks")
    note, sleep = elsewhere(tmp_path), time.sleep

    def beats(seconds):
        note["beat"] += 1
        elsewhere(tmp_path, beat=note["beat"])
        sleep(seconds)

    monkeypatch.setattr(lock.time, "sleep", beats)
    with pytest.raises(HeldError, match="process 4711 on node7"), locked(tmp_path):
        pass


def test_holder_renews_its_sign_of_life(tmp_path, quick):
    with locked(tmp_path):
        first = holder(tmp_path)
        end = time.monotonic() + 5
        while holder(tmp_path).beat <= first.beat + 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert holder(tmp_path).beat > first.beat + 1
        assert holder(tmp_path).token == first.token


def test_process_that_was_stopped_for_long_gives_way(tmp_path, quick):
    lost = []
    with locked(tmp_path, lost=lost.append):
        elsewhere(tmp_path)
        end = time.monotonic() + 5
        while not lost and time.monotonic() < end:
            time.sleep(0.02)
    assert "was taken over by process 4711 on node7" in lost[0]
    assert holder(tmp_path).process == 4711  # its note stays


def test_two_at_once_without_locks(tmp_path, quick, without_locks, monkeypatch):
    """Both saw a free folder: the later note wins, the other one gives way."""
    write = lock._write

    def overtaken(folder, mine):
        write(folder, mine)
        elsewhere(tmp_path)

    monkeypatch.setattr(lock, "_write", overtaken)
    with pytest.raises(HeldError, match="node7"), locked(tmp_path):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00"])
def test_damaged_note_does_not_stop_anyone(tmp_path, quick, text):
    (tmp_path / lock.NOTE).write_text(text)
    with locked(tmp_path):
        assert holder(tmp_path).process == os.getpid()


def test_fault_of_the_disk_is_not_called_a_held_lock(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with pytest.raises(ValueError, match="Input/output error") as told, locked(tmp_path):
        pass
    assert not isinstance(told.value, HeldError)
    with pytest.raises(ValueError, match="takes no lock file"), locked(tmp_path / "missing"):
        pass


def test_file_lock_goes_with_an_error_inside(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with open(tmp_path / lock.LOCK) as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert sorted(path.name for path in epath.Path(tmp_path).iterdir()) == [lock.LOCK]
