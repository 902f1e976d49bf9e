"""The watch and the relay, with a store of this process and without JAX's runtime."""

import contextlib
import json
import socket
import threading
import time

import pytest

from protoclip_jax.distributed import relay as relays
from protoclip_jax.distributed import watch as watches
from protoclip_jax.distributed.watch import LOST, Watch


class Store:
    """JAX's coordination client, as far as the watch uses it."""

    def __init__(self):
        self.values: dict[str, str] = {}
        self.answers = True

    def key_value_set(self, key, value, allow_overwrite=False):
        self._answer()
        if key in self.values and not allow_overwrite:
            raise RuntimeError(f"ALREADY_EXISTS: {key}")
        self.values[key] = value

    def key_value_try_get(self, key):
        self._answer()
        if key not in self.values:
            raise RuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]

    def key_value_dir_get(self, key):
        self._answer()
        return [(name, value) for name, value in self.values.items() if name.startswith(key)]

    def _answer(self):
        if not self.answers:
            raise RuntimeError("DEADLINE_EXCEEDED")


class Left(Exception):
    """Stands for the end of the process."""


@pytest.fixture
def quick(monkeypatch):
    """Seconds become hundredths; an end is noted and not carried out."""
    for name, value in (("BEAT", 0.02), ("SILENT", 0.4), ("FIRST", 0.8)):
        monkeypatch.setattr(watches, name, value)
    codes = {}

    def leave(self, code):
        codes.setdefault(self._index, code)
        raise Left

    made, init = [], Watch.__init__

    def remembered(self, *arguments):
        made.append(self)
        init(self, *arguments)

    monkeypatch.setattr(Watch, "__init__", remembered)
    monkeypatch.setattr(Watch, "_exit", leave)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    yield codes
    for watch in made:  # nothing of a test runs on in the next one
        watch._over.set()
        for thread in watch._threads:
            thread.join(5)


def wait(condition, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_processes_that_live_leave_each_other_alone_and_end_in_any_order(quick):
    store = Store()
    watch = [Watch(store, index, ["a", "b", "c"]) for index in range(3)]
    time.sleep(0.6)
    watch[1].close()
    time.sleep(0.6)  # longer than silence: it said that it was done
    assert quick == {}
    watch[0].close()
    watch[2].close()


def test_a_silent_process_ends_all_with_one_line_each(quick, capsys):
    store = Store()
    watch = [Watch(store, index, ["a", "b", "c"]) for index in range(3)]
    time.sleep(0.1)
    watch[1]._over.set()  # killed: it beats no more
    wait(lambda: len(quick) == 2)
    assert quick == {0: LOST, 2: LOST}
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 2
    for line in lines:
        assert "process 1 on b was lost" in line
        assert "the same command goes on" in line


def test_a_process_that_never_shows_is_lost(quick, capsys):
    watch = Watch(Store(), 0, ["a", "b"])
    time.sleep(0.5)
    assert quick == {}
    wait(lambda: quick == {0: LOST})
    assert "process 1 on b was lost" in capsys.readouterr().err
    watch.close()


@pytest.mark.parametrize("code", [1, 2, 130])
def test_a_failure_ends_all_with_its_own_code_and_words(quick, capsys, code):
    store = Store()
    watch = [Watch(store, index, ["a", "b"]) for index in range(2)]
    with pytest.raises(Left):
        watch[1].fail("the disk is gone", code)
    wait(lambda: len(quick) == 2)
    assert quick == {0: code, 1: code}
    assert "process 1 on b: the disk is gone; this process ends too" in capsys.readouterr().err


def test_the_first_failure_counts(quick):
    store = Store()
    watch = [Watch(store, index, ["a", "b", "c"]) for index in range(3)]
    for thread in (thread for one in watch for thread in one._threads):
        assert thread.is_alive()
    with pytest.raises(Left):
        watch[1].fail("first", 2)
    with contextlib.suppress(Left):
        watch[2].fail("second", 1)
    assert json.loads(store.values[watches._FAILURE])["text"] == "first"


def test_a_process_without_an_answer_takes_process_0_for_lost(quick, capsys):
    """The network is gone, or process 0 was stopped."""
    store = Store()
    Watch(store, 1, ["a", "b"])
    time.sleep(0.1)
    store.answers = False
    wait(lambda: quick == {1: LOST})
    assert "process 0 on a was lost (no answer for" in capsys.readouterr().err


def test_a_process_that_was_stopped_for_long_learns_that_the_others_left(quick, capsys):
    store = Store()
    message = {"process": 1, "text": "process 1 on b was lost", "code": LOST}
    store.values[watches._FAILURE] = json.dumps(message)
    Watch(store, 1, ["a", "b"])
    wait(lambda: quick == {1: LOST})
    assert "took this one for lost" in capsys.readouterr().err


def test_an_error_that_follows_from_a_loss_stays_untold(quick):
    """The main thread meets an error of the network first, and waits for the watch to end it."""
    store = Store()
    watch = [Watch(store, index, ["a", "b"]) for index in range(2)]
    time.sleep(0.1)
    watch[1]._over.set()  # killed
    waited = threading.Thread(target=watch[0].wait_for_cause)
    waited.start()
    wait(lambda: quick == {0: LOST})
    assert waited.is_alive()  # still after the verdict, until the process is gone
    waited.join(5)


def test_done_is_not_lost(quick):
    store = Store()
    watch = Watch(store, 0, ["a", "b"])
    store.values[watches._BEATS + "1"] = watches._DONE
    time.sleep(1.0)
    assert quick == {}
    watch.close()


class Echo:
    """A server that answers each block; `drop` closes everything."""

    def __init__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.server.getsockname()[1]}"
        self.taken: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.server.accept()
                self.taken.append(client)
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client):
        with contextlib.suppress(OSError):
            while block := client.recv(1000):
                client.sendall(block.upper())

    def drop(self):
        self.server.close()
        for client in self.taken:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()


def connected(relay: relays.Relay) -> socket.socket:
    host, _, port = relay.address.rpartition(":")
    client = socket.create_connection((host, int(port)), 5)
    client.settimeout(5)
    return client


def test_relay_forwards_and_outlives_the_other_side(quick, capsys):
    echo = Echo()
    relay = relays.Relay(echo.address)
    assert relay.reachable()
    client = connected(relay)
    client.sendall(b"hello")
    assert client.recv(100) == b"HELLO"
    assert not relay.lost.is_set()
    store = Store()
    store.values[watches._BEATS + "0"] = "1"
    Watch(store, 1, ["a", "b"], relay)
    echo.drop()
    assert relay.lost.wait(5)
    # What JAX's client would abort at: it sees an open connection that says nothing.
    client.settimeout(0.5)
    with pytest.raises(TimeoutError):
        client.recv(100)
    wait(lambda: quick == {1: LOST})
    assert "process 0 on a was lost (the connection to it was closed)" in capsys.readouterr().err


def test_relay_waits_for_a_side_that_is_not_there_yet():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    relay = relays.Relay(f"127.0.0.1:{port}")
    assert not relay.reachable()
    assert not relays.wait_for(relay, 1.0, lambda seconds: None)
    assert not relay.lost.is_set()
    with socket.create_server(("127.0.0.1", port)):
        assert relays.wait_for(relay, 5.0, lambda seconds: None)
