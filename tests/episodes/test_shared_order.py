"""Orders shared by processes: bit for bit those that each would make alone, whatever happens."""

import errno
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from protoclip_jax.episodes import sampling, shared_order
from protoclip_jax.episodes.sampling import episode_rows, epoch_order, order_type
from protoclip_jax.episodes.shared_order import EpisodeRows


def plain(pairs: int, size: int, episode: int, seed: int = 3) -> np.ndarray:
    """The definition: a slice of the permutations of all epochs, each made whole by NumPy."""
    epochs = range(episode * size // pairs, ((episode + 1) * size - 1) // pairs + 1)
    whole = []
    for epoch in epochs:
        sequence = np.random.SeedSequence([seed, 0, epoch])
        whole.append(np.random.RandomState(np.random.MT19937(sequence)).permutation(pairs))
    first = episode * size - epochs[0] * pairs
    return np.concatenate(whole)[first : first + size]


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """Epochs whose order was made, in this process."""
    epochs = []

    def noted(pairs, epoch, seed):
        epochs.append(epoch)
        return epoch_order(pairs, epoch, seed)

    monkeypatch.setattr(shared_order, "epoch_order", noted)
    monkeypatch.setattr(sampling, "epoch_order", noted)
    return epochs


@pytest.mark.parametrize(("pairs", "size"), [(12, 4), (13, 5), (10, 10), (1, 1), (5000, 700)])
def test_rows_are_those_of_plain_permutations(pairs, size):
    shared = EpisodeRows(pairs, size, 3, False)
    copy = pickle.loads(pickle.dumps(shared))
    for episode in [*range(3 * pairs // size + 2), 1, 0]:
        wanted = plain(pairs, size, episode)
        for rows in (shared(episode), copy(episode), episode_rows(pairs, size, episode, 3, False)):
            assert rows.dtype == np.int64
            np.testing.assert_array_equal(rows, wanted)


def test_32_bits_where_they_fit(monkeypatch):
    assert order_type(2**32) == np.uint32
    assert order_type(2**32 + 1) == np.int64
    narrow = epoch_order(1000, 1, 3)
    monkeypatch.setattr(sampling, "order_type", lambda pairs: np.dtype(np.int64))
    np.testing.assert_array_equal(epoch_order(1000, 1, 3), narrow)


def test_draws_with_replacement_need_no_order(made):
    shared = EpisodeRows(50, 70, 3, True)
    np.testing.assert_array_equal(shared(4), episode_rows(50, 70, 4, 3, True))
    assert not made
    assert shared._path is None


def test_an_order_is_made_once_an_epoch(made):
    shared = EpisodeRows(1000, 300, 3, False)
    copies = [pickle.loads(pickle.dumps(shared)) for _ in range(3)]
    for episode in range(10):
        for rows in (shared, *copies):
            rows(episode)
    assert made == [0, 1, 2]


def work(rows: EpisodeRows, episodes: int, queue, ready=None) -> None:
    """A worker process: all episodes, and which orders it made."""
    if ready is not None:
        ready.set()
    made, make = [], shared_order.epoch_order
    shared_order.epoch_order = lambda *key: (made.append(key[1]), make(*key))[1]
    queue.put((made, [rows(episode) for episode in range(episodes)]))


def start(rows: EpisodeRows, count: int, episodes: int):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(rows, episodes, queue)) for _ in range(count)]
    for worker in workers:
        worker.start()
    results = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(60)
    return results


def test_several_processes_make_each_order_once_together():
    # Two epochs: the first to start may be through before the last one starts.
    results = start(EpisodeRows(20_000, 7_000, 3, False), 3, episodes=5)
    for _, rows in results:
        for episode in range(5):
            np.testing.assert_array_equal(rows[episode], plain(20_000, 7_000, episode))
    assert sorted(epoch for epochs, _ in results for epoch in epochs) == [0, 1]


def test_nothing_lies_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shared = EpisodeRows(1000, 100, 3, False)
    assert shared._path is not None
    shared(3)
    assert not list(tmp_path.iterdir())
    assert os.fstat(shared._file).st_size >= 4000


def test_a_kill_leaves_nothing(tmp_path):
    code = (
        "import time\n"
        "from protoclip_jax.episodes.shared_order import EpisodeRows\n"
        "rows = EpisodeRows(1000, 100, 3, False)\n"
        "rows(1)\n"
        "print(rows._path, flush=True)\n"
        "time.sleep(60)\n"
    )
    env = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=env, text=True) as process:
        assert Path(process.stdout.readline().strip()).exists()
        process.send_signal(signal.SIGKILL)
    assert not list(tmp_path.iterdir())


def test_without_a_folder_to_write_in(monkeypatch, made):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, "read-only")

    monkeypatch.setattr(shared_order.tempfile, "TemporaryFile", refused)
    shared = EpisodeRows(1000, 300, 3, False)
    for rows in (shared, pickle.loads(pickle.dumps(shared))):
        np.testing.assert_array_equal(rows(3), plain(1000, 300, 3))
    assert made == [0, 1, 0, 1]


@pytest.mark.parametrize("room", [0, 100, 5000])
def test_a_disk_that_fills_up(monkeypatch, room):
    pwrite = os.pwrite

    def full(file, data, begin):
        if begin >= 4096 + room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[: max(1, 4096 + room - begin)], begin)

    shared = EpisodeRows(2000, 300, 3, False)
    copy = pickle.loads(pickle.dumps(shared))
    monkeypatch.setattr(shared_order.os, "pwrite", full)
    for episode in (0, 7, 6):
        for rows in (shared, copy):
            np.testing.assert_array_equal(rows(episode), plain(2000, 300, episode))


def test_without_file_locks_or_proc(monkeypatch):
    shared = EpisodeRows(1000, 300, 3, False)
    lost = pickle.loads(pickle.dumps(shared))
    lost._path = "/proc/none/fd/3"
    np.testing.assert_array_equal(lost(3), plain(1000, 300, 3))

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(shared_order.fcntl, "flock", none)
    np.testing.assert_array_equal(shared(3), plain(1000, 300, 3))


def test_another_file_under_the_same_number_is_left_alone(tmp_path):
    """The owner has ended, and its number belongs to somebody else."""
    copy = pickle.loads(pickle.dumps(EpisodeRows(1000, 300, 3, False)))
    other = tmp_path / "other"
    other.write_bytes(bytes(5000))
    copy._path = str(other)
    np.testing.assert_array_equal(copy(3), plain(1000, 300, 3))
    assert other.read_bytes() == bytes(5000)


def test_a_process_killed_while_it_writes_leaves_no_half_order(monkeypatch):
    shared = EpisodeRows(5000, 300, 3, False)
    shared(0)
    pwrite, calls = os.pwrite, []

    def killed(file, data, begin):
        calls.append(begin)
        if len(calls) == 2:  # in the middle of the order
            pwrite(file, data[:1000], begin)
            raise KeyboardInterrupt
        return pwrite(file, data, begin)

    monkeypatch.setattr(shared_order.os, "pwrite", killed)
    with pytest.raises(KeyboardInterrupt):
        shared(17)
    monkeypatch.undo()
    for rows in (pickle.loads(pickle.dumps(shared)), shared):
        for episode in (17, 0):
            np.testing.assert_array_equal(rows(episode), plain(5000, 300, episode))


def test_processes_wait_for_the_one_that_makes_an_order(made, monkeypatch):
    """A copy that asks meanwhile takes the finished order, and makes none."""
    shared = EpisodeRows(1000, 300, 3, False)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    noted = shared_order.epoch_order

    def slow(*key):
        worker.start()
        assert ready.wait(60)
        time.sleep(0.3)
        return noted(*key)

    ready = context.Event()
    worker = context.Process(target=work, args=(shared, 3, queue, ready))
    monkeypatch.setattr(shared_order, "epoch_order", slow)
    shared(0)
    epochs, rows = queue.get(timeout=120)
    worker.join(60)
    assert epochs == []
    np.testing.assert_array_equal(rows[2], plain(1000, 300, 2))
