"""A storage server on loopback, as a process of its own: the emulator's, with faults on demand.

  python tests/storage/emulator.py PORT BUCKET

What is put under /_faults as JSON, a list of rules, is done to later requests:
  method, contains: which requests; the latter is searched in the path, decoded
  count: how many of them; none = all
  status: what they are answered; none = nothing at all for as long as the rule stands
GET /_requests gives the requests so far, a line each.
"""

import contextlib
import json
import logging
import re
import sys
import threading
import time
from functools import partial, partialmethod
from http.server import ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


class Server(ThreadingHTTPServer):
    """The emulator's own takes one request at a time, and few in waiting."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, port: int, bucket: str):
        self.storage = Storage(use_memory_fs=True)
        buckets.create_bucket(bucket, self.storage)
        self.lock, self.rules, self.requests = threading.Lock(), [], []
        super().__init__(("127.0.0.1", port), partial(Handler, self.storage))

    def handle_error(self, request, client_address):
        """Clients that were killed, or have read enough, are no errors."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def fault(self, method: str, path: str) -> dict | None:
        """The rule that a request meets, if any."""
        with self.lock:
            for rule in self.rules:
                if method == rule.get("method", method) and rule["contains"] in path:
                    if rule.get("count") is None:
                        return rule
                    if rule["count"] > 0:
                        rule["count"] -= 1
                        return rule
        return None


class Handler(RequestHandler):
    """The emulator's answers, but for faults and for what it lacks."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def answer(self, method: str) -> None:
        path, self._generation = unquote(self.path), "0"
        if path.startswith("/_"):
            self._control(method)
            return
        self.server.requests.append(f"{method} {path}")
        rule = self.server.fault(method, path)
        if rule is not None and rule.get("status") is None:
            while rule in self.server.rules:
                time.sleep(0.02)
        if rule is not None:
            self._plain(rule.get("status") or 503)
        elif "/moveTo/" in path:  # not known: clients copy and delete instead
            self._plain(400)
        else:
            with self.server.lock:
                refusal = self._refusal(path)
                if refusal is None:
                    getattr(RequestHandler, f"do_{method}")(self)
                else:
                    self._plain(refusal)

    def _control(self, method: str) -> None:
        if method == "PUT":
            length = int(self.headers["Content-Length"])
            self.server.rules = json.loads(self.rfile.read(length))
            self._plain(200)
        else:
            self._plain(200, "\n".join(self.server.requests).encode())

    def _plain(self, status: int, body: bytes = b"") -> None:
        self.close_connection = True  # what was sent along may be unread
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _refusal(self, path: str) -> int | None:
        """The status for a precondition or a range that does not hold."""
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        place = re.search(r"/b/([^/]+)/o(?:/([^?]+))?", unquote(url.path))
        self._generation, size = "0", 0
        if place is None or not (name := place[2] or query.get("name")):
            return None
        with contextlib.suppress(NotFound):
            found = self.server.storage.get_file_obj(place[1], name)
            self._generation, size = found["generation"], int(found["size"])
        if query.get("ifGenerationMatch", self._generation) != self._generation:
            return 412
        if query.get("ifGenerationNotMatch") == self._generation:
            return 304
        return self._range_refusal(size) if self._generation != "0" else None

    def _range_refusal(self, size: int) -> int | None:
        """Writes a range from the end on as one from the start, which the emulator knows."""
        asked = _RANGE.fullmatch(self.headers.get("Range") or "")
        if asked is None:
            return None
        start, end = asked.groups()
        if not start:
            start, end = max(0, size - int(end)), size - 1
        self.headers.replace_header("Range", f"bytes={start}-{end}")
        return None if int(start) < size else 416

    def end_headers(self):
        if self.command == "GET" and self._generation != "0":
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    do_GET = partialmethod(answer, "GET")
    do_POST = partialmethod(answer, "POST")
    do_PUT = partialmethod(answer, "PUT")
    do_DELETE = partialmethod(answer, "DELETE")
    do_PATCH = partialmethod(answer, "PATCH")


if __name__ == "__main__":
    logging.disable()  # a missing object is nothing to tell
    Server(int(sys.argv[1]), sys.argv[2]).serve_forever()
