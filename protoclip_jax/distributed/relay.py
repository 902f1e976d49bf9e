"""A relay between this process and process 0, which outlives process 0.

JAX's coordination client aborts its whole process, with a dump of C++ frames and exit code 134, as
soon as the connection to process 0 closes. It is connected to this relay instead: when process 0 or
its host goes away, the relay keeps the client's side open, says so in `lost`, and the process can
end in its own words.
"""

import contextlib
import socket
import threading
import time
from collections.abc import Callable

_BLOCK = 65536
# A host that vanished without a word is noticed after about 25 seconds without an answer.
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


class Relay:
    """Forwards connections made to `address` to another host.

    Attributes:
        address: host:port on this machine, for the client.
        lost: Set when a connection to the other side ended or could not be made.
    """

    def __init__(self, target: str):
        """Listens on a free port of the loopback interface.

        Args:
            target: host:port of the other side.
        """
        host, _, port = target.rpartition(":")
        self._target = host.strip("[]"), int(port)
        self.lost = threading.Event()
        self._held: list[socket.socket] = []  # closing one is what must not happen
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def reachable(self) -> bool:
        """Whether the other side takes connections now."""
        try:
            socket.create_connection(self._target, 5).close()
        except OSError:
            return False
        return True

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._held.append(client)
            try:
                server = socket.create_connection(self._target, 10)
            except OSError:
                self.lost.set()
                continue
            server.settimeout(None)
            self._held.append(server)
            _keep_alive(server)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(
                    target=self._pump, args=(source, sink, source is server), daemon=True
                ).start()

    def _pump(self, source: socket.socket, sink: socket.socket, from_server: bool) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK):
                sink.sendall(block)
        if from_server:
            self.lost.set()
        else:  # the client closed this connection, on purpose: so does the other side
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, seconds in _KEEPALIVE.items():
        if hasattr(socket, name):  # not everywhere under this name
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)


def wait_for(relay: Relay, seconds: float, say: Callable[[float], None]) -> bool:
    """Waits until the other side takes connections.

    Args:
        relay: To it.
        seconds: To wait at most.
        say: Called with the seconds waited so far, after 5 seconds and then every 15.

    Returns:
        Whether it does.
    """
    start = time.monotonic()
    told = 0.0
    while not relay.reachable():
        waited = time.monotonic() - start
        if waited >= seconds:
            return False
        if waited - told >= (15 if told else 5):
            told = waited
            say(waited)
        time.sleep(0.5)
    return True
