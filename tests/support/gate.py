"""A gate in front of a real OpenSearch: requests pass, wait, or find nothing that listens."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import ThreadingHTTPServer
from threading import Event, Semaphore
from urllib.parse import urlsplit

from support.deadlines import HANGING_S
from support.serving import AnsweringHandler, serving


class Gate(ThreadingHTTPServer):
    """`open` is set while searches pass; `waiting` counts those that have arrived while it was not.

    While `is_down`, each connection is closed without an answer.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.target = urlsplit(target)
        self.open, self.waiting = Event(), Semaphore(0)
        self.open.set()
        self.is_down = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def gate(target: str) -> Iterator[Gate]:
    server = Gate(target)
    with serving(server):
        try:
            yield server
        finally:
            server.open.set()


class _Handler(AnsweringHandler):
    protocol_version = "HTTP/1.1"
    server: Gate

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        if self.server.is_down:
            self.close_connection = True
            return
        if self.path.partition("?")[0].endswith("/_search") and not self.server.open.is_set():
            self.server.waiting.release()
            self.server.open.wait(HANGING_S)
        target = self.server.target
        with closing(http.client.HTTPConnection(str(target.hostname), target.port, timeout=HANGING_S)) as connection:
            connection.request(self.command, self.path, body or None, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.getheader("content-type") or "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET  # noqa: N815
