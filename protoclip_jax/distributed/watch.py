"""Signs of life: when one process of a run ends or falls silent, all end, in one line each."""

import contextlib
import json
import os
import sys
import threading
import time

from protoclip_jax.distributed.relay import Relay

# Exit code of a process whose run lost another process: start the same command again.
LOST = 76

BEAT = 2.0  # seconds between two signs of life
SILENT = 25.0  # seconds without one after which a process is taken for dead
FIRST = 60.0  # seconds that a process may take to its first sign of life

_FAILURE = "protoclip_jax/failure"
_BEATS = "protoclip_jax/beats/"
_DONE = "done"
_AGAIN = "this process ends too; the same command goes on from the last checkpoint"


class Watch:
    """This process's signs of life, and its eye on the others'.

    Every process writes a counter to the coordination service; process 0 reads them all, the
    others read that of process 0. What ends the run is written there too, so that all say the same
    and leave with the same exit code.
    """

    def __init__(self, client, index: int, hosts: list[str], relay: Relay | None = None):
        """Args:
        client: JAX's coordination client.
        index: number of this process.
        hosts: name of every process's host.
        relay: this process's way to process 0; none on process 0.
        """
        self._client, self._index, self._hosts, self._relay = client, index, hosts, relay
        now = time.monotonic()
        self._seen: dict[int, tuple[str, float]] = dict.fromkeys(range(len(hosts)), ("", now))
        self._answered = now  # when the service last answered
        self._over = threading.Event()
        self._ending = threading.Lock()
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for name, target in (("signs of life", self._beat), ("watch", self._judge))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Says that this process is done; nothing ends it from here on."""
        if self._over.is_set():
            return
        self._over.set()
        with contextlib.suppress(Exception):
            self._client.key_value_set(_BEATS + str(self._index), _DONE, allow_overwrite=True)
        for thread in self._threads:
            thread.join(2 * BEAT)

    def fail(self, text: str, code: int) -> None:
        """Tells the others that this process cannot go on, and ends it.

        Args:
            text: what they say too.
            code: exit code of all.
        """
        with self._ending:
            self._over.set()
            self._publish(self._index, text, code)
            self._exit(code)

    def wait_for_cause(self) -> None:
        """After an error of the runtime: gives the watch time to find a process that was lost."""
        if self._over.wait(SILENT + 4 * BEAT):
            time.sleep(10 * BEAT)  # the watch is about to end this process, in its own words

    def _publish(self, process: int, text: str, code: int) -> None:
        message = json.dumps({"process": process, "text": text, "code": code})
        with contextlib.suppress(Exception):  # the first failure counts, others follow from it
            self._client.key_value_set(_FAILURE, message)

    def _beat(self) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            try:
                self._client.key_value_set(
                    _BEATS + str(self._index), str(number), allow_overwrite=True
                )
                self._look()
                self._answered = time.monotonic()
            except Exception as error:
                if "NOT_FOUND" in str(error):  # nothing there yet: the service answers
                    self._answered = time.monotonic()
            self._over.wait(BEAT)

    def _look(self) -> None:
        """Reads what the others wrote."""
        failure = self._get(_FAILURE)
        if failure is not None:
            self._follow(json.loads(failure))
        if self._index == 0:
            found = dict(self._client.key_value_dir_get(_BEATS))
            beats = {int(key.rpartition("/")[2]): value for key, value in found.items()}
        else:
            beats = {0: self._get(_BEATS + "0")}
        now = time.monotonic()
        for process, value in beats.items():
            if value is not None and value != self._seen[process][0]:
                self._seen[process] = value, now

    def _get(self, key: str) -> str | None:
        try:
            return self._client.key_value_try_get(key)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def _judge(self) -> None:
        while not self._over.wait(BEAT / 4):
            if self._relay is not None and self._relay.lost.is_set():
                self._lose(0, "the connection to it was closed")
            now = time.monotonic()
            if now - self._answered > SILENT:
                self._lose(0, f"no answer for {SILENT:.0f} s")
            for process in self._others():
                value, when = self._seen[process]
                if value != _DONE and now - when > (SILENT if value else FIRST):
                    self._lose(process, f"no sign of life for {now - when:.0f} s")

    def _others(self) -> list[int]:
        return [0] if self._index else list(range(1, len(self._hosts)))

    def _lose(self, process: int, why: str) -> None:
        """Ends this process because another one is gone."""
        text = f"process {process} on {self._hosts[process]} was lost ({why})"
        if self._index == 0:
            self._publish(process, text, LOST)
        self._end(f"{text}: {_AGAIN}", LOST)

    def _follow(self, failure: dict) -> None:
        """Ends as the process did that failed first."""
        process, code, text = failure["process"], failure["code"], failure["text"]
        if code == LOST:
            if process == self._index:  # silent for so long that the others left
                text = "the other processes took this one for lost"
            self._end(f"{text}: {_AGAIN}", LOST)
        elif process != self._index:
            where = f"process {process} on {self._hosts[process]}"
            self._end(f"{where}: {text}; this process ends too", code)

    def _end(self, text: str, code: int) -> None:
        with self._ending:
            if self._over.is_set():
                return
            self._over.set()
            print(f"\nprotoclip_jax: {text}", file=sys.stderr, flush=True)
            self._exit(code)

    def _exit(self, code: int) -> None:
        """Ends at once: the main thread may hang in a collective operation."""
        # Process 0 keeps the service: the others must have read why before it goes.
        time.sleep(3 * BEAT if self._index == 0 else BEAT / 2)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)
