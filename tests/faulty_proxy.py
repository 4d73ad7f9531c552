"""A small HTTP proxy in front of a real OpenSearch that spoils bulk requests on demand.

Each bulk request takes the next fault of the list: a status (answered without asking the server), "drop" (the
connection is cut before the server is asked), "lost answer" (cut after it), "reject first" (the first document of the
request gets a 429, the others are sent), "garbage" (no JSON), "too large" above a size; None passes. Other requests
pass always.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import urlsplit

Fault = int | str | None


class FaultyProxy:
    """Where the proxy listens, the faults still to come, and the bulk requests it saw (bytes each)."""

    def __init__(self, target: str, faults: Sequence[Fault], max_bytes: int | None) -> None:
        self.target = target
        self.faults = list(faults)
        self.max_bytes = max_bytes
        self.bulk_sizes: list[int] = []
        self.lock = Lock()
        self.url = ""

    def next_fault(self, size: int) -> Fault:
        with self.lock:
            self.bulk_sizes.append(size)
            if self.max_bytes is not None and size > self.max_bytes:
                return 413
            return self.faults.pop(0) if self.faults else None


@contextmanager
def faulty_proxy(target: str, faults: Sequence[Fault] = (), *, max_bytes: int | None = None) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target, faults, max_bytes)

    class Handler(_Handler):
        shared = proxy

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    shared: FaultyProxy

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        fault = self.shared.next_fault(len(body)) if "_bulk" in self.path else None
        if isinstance(fault, int):
            self._answer(fault, json.dumps({"error": {"type": "made_up", "reason": "by the proxy"}}).encode())
        elif fault == "drop":
            self.close_connection = True
        elif fault == "garbage":
            self._answer(200, b"<html>hello</html>", "application/json")
        elif fault == "lost answer":
            self._forward(body)
            self.close_connection = True
        elif fault == "reject first":
            self._reject_first(body)
        else:
            self._answer(*self._forward(body))

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def _reject_first(self, body: bytes) -> None:
        operation, _, *rest = body.split(b"\n")
        error = {"type": "rejected_execution_exception", "reason": "queue is full"}
        refused = {"index": {"_id": json.loads(operation)["index"]["_id"], "status": 429, "error": error}}
        answer = {"items": []} if rest == [b""] else json.loads(self._forward(b"\n".join(rest))[1])
        self._answer(200, json.dumps({"items": [refused, *answer["items"]]}).encode())

    def _forward(self, body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(self.shared.target)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _answer(self, status: int, body: bytes, kind: str = "application/json; charset=UTF-8") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
