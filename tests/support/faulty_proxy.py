"""An HTTP proxy in front of a real OpenSearch that injects faults on demand.

Each bulk request takes the next fault of `faults`, each other request the next one of `other_faults`. None means no
fault; after the end of a list there are no more faults. A fault is an HTTP status, returned without contacting the
server, or:

    before the server gets it    "drop" (connection closed), "reset mid-body" (reset while the body is being sent),
                                 "refuse" (and no new connection for a while), "reject first", "reject some" (the
                                 first or some documents get a 429 or 503; the others are forwarded)
    after the server is done     "lost answer" (closed), "reset mid-answer", "truncated" (half of it, closed),
                                 "half json" (half of it, valid HTTP), "garbage" (not JSON)
    timing                       "delay", "late" (forwarded only after the client has waited `patience_s` and sent
                                 it again), "slow" (the response trickles)
    repetition                   "twice" (forwarded twice), "echo" (forwarded again a while after the response)

A bulk request above `max_bytes` has the fault `too_large`. One that contains `poison` is reset, as by a firewall.
"""

from __future__ import annotations

import http.client
import json
import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from threading import Event, Lock, Thread
from typing import Any
from urllib.parse import urlsplit

Fault = int | str | None
ITEM_ERRORS = (
    (429, "rejected_execution_exception", "queue is full"),
    (429, "circuit_breaking_exception", "[parent] Data too large"),
    (503, "unavailable_shards_exception", "primary shard is not active"),
)


class FaultyProxy:
    """Proxy address, remaining faults, counts of injected faults, and the size of each bulk request."""

    def __init__(self, target: str, faults: Sequence[Fault], max_bytes: int | None) -> None:
        self.target = target
        self.faults = list(faults)
        self.other_faults: list[Fault] = []
        self.max_bytes = max_bytes
        self.too_large: Fault = 413
        self.poison: bytes | None = None
        self.patience_s = 1.0
        self.random = random.Random(0)
        self.bulk_sizes: list[int] = []
        self.done: Counter[Fault] = Counter()
        self.lock = Lock()
        self.url = ""
        self.refusing_s = 0.0
        self.ended = Event()
        self.threads: list[Thread] = []

    def next_fault(self, size: int, is_bulk: bool = True) -> Fault:
        with self.lock:
            if is_bulk:
                self.bulk_sizes.append(size)
            if is_bulk and self.max_bytes is not None and size > self.max_bytes:
                return self.too_large
            faults = self.faults if is_bulk else self.other_faults
            fault = faults.pop(0) if faults else None
            self.done[fault] += 1
            return fault

    def draw_s(self, least: float, most: float) -> float:
        with self.lock:
            return self.random.uniform(least, most)

    def in_background(self, work: Any, *arguments: Any) -> None:
        thread = Thread(target=work, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def listen(self) -> None:
        """Accept connections. While connections are refused, no socket is listening."""
        # Keeps the port while no socket is listening.
        kept = socket.socket()
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        port = kept.getsockname()[1]
        listener = socket.create_server(("127.0.0.1", port), backlog=64)
        self.url = f"http://127.0.0.1:{port}"

        def accept(listener: socket.socket) -> None:
            while not self.ended.is_set():
                if self.refusing_s:
                    listener.close()
                    self.ended.wait(self.refusing_s)
                    self.refusing_s = 0.0
                    listener = socket.create_server(("127.0.0.1", port), backlog=64)
                listener.settimeout(0.02)
                with suppress(TimeoutError):
                    connection, client = listener.accept()
                    connection.settimeout(60)
                    Thread(target=_serve, args=(connection, client, self), daemon=True).start()
            listener.close()
            kept.close()

        self.in_background(accept, listener)


@contextmanager
def faulty_proxy(target: str, faults: Sequence[Fault] = (), *, max_bytes: int | None = None) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(target, faults, max_bytes)
    proxy.listen()
    try:
        yield proxy
    finally:
        proxy.ended.set()
        # Forward everything outstanding before the test looks at the index.
        for thread in proxy.threads:
            thread.join()


def _serve(connection: socket.socket, client: Any, proxy: FaultyProxy) -> None:
    with connection, suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        type("Handler", (_Handler,), {"proxy": proxy})(connection, client, None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def do_GET(self) -> None:
        size = int(self.headers.get("content-length") or 0)
        fault = self.proxy.next_fault(size, urlsplit(self.path).path.endswith("/_bulk"))
        if fault == "reset mid-body":
            self.rfile.read(size // 2)
            self._reset()
            return
        body = self.rfile.read(size)
        if self.proxy.poison and self.proxy.poison in body:
            self._reset()
        elif isinstance(fault, int):
            self._answer(fault, json.dumps({"error": {"type": "made_up", "reason": "by the proxy"}}).encode())
        elif fault in ("drop", "refuse"):
            self.proxy.refusing_s = self.proxy.draw_s(0.05, 0.3) if fault == "refuse" else 0.0
            self.close_connection = True
        elif fault in ("reject first", "reject some"):
            self._reject(body, first_only=fault == "reject first")
        elif fault in ("delay", "slow"):
            self.proxy.ended.wait(self.proxy.draw_s(0.01, 0.15))
            self._answer(*self._forward(body), drip=fault == "slow")
        elif fault == "late":
            # The client has disconnected, as intended: nothing reads the response.
            self.proxy.in_background(self._forward_after, self.proxy.patience_s * self.proxy.draw_s(1, 1.5), body)
            self.proxy.ended.wait(self.proxy.patience_s * 1.1)
            self.close_connection = True
        else:
            self._answer_spoiled(fault, body)

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def _answer_spoiled(self, fault: Fault, body: bytes) -> None:
        status, answer = self._forward(body)
        if fault == "twice":
            status, answer = self._forward(body)
        elif fault == "echo":
            self.proxy.in_background(self._forward_after, self.proxy.draw_s(0.05, 0.5), body)
        if fault == "lost answer":
            self.close_connection = True
        elif fault == "garbage":
            self._answer(200, b"<html>hello</html>", "application/json")
        elif fault == "half json":
            self._answer(status, answer[: len(answer) // 2])
        elif fault in ("truncated", "reset mid-answer"):
            self._answer(status, answer, keep=len(answer) // 2)
            self.close_connection = True
            if fault == "reset mid-answer":
                self._reset()
        else:
            assert fault in (None, "twice", "echo"), fault
            self._answer(status, answer)

    def _reject(self, body: bytes, *, first_only: bool) -> None:
        """Refuse some documents of a bulk request, and forward the rest to the server."""
        operations = list(_operations(body))
        if not operations:  # the load checks whether a tiny request is answered
            self._answer(*self._forward(body))
            return
        with self.proxy.lock:
            chosen = (
                {0} if first_only else set(self.proxy.random.sample(range(len(operations)), k=-(-len(operations) // 3)))
            )
            status, kind, reason = ITEM_ERRORS[0] if first_only else self.proxy.random.choice(ITEM_ERRORS)
        passed = b"".join(operation for place, operation in enumerate(operations) if place not in chosen)
        answer = json.loads(self._forward(passed)[1]) if passed else {"items": []}
        items = iter(answer["items"])
        merged = []
        for place, operation in enumerate(operations):
            if place not in chosen:
                merged.append(next(items))
                continue
            ((action, line),) = json.loads(operation.partition(b"\n")[0]).items()
            merged.append({action: {"_id": line["_id"], "status": status, "error": {"type": kind, "reason": reason}}})
        self._answer(200, json.dumps({**answer, "errors": True, "items": merged}).encode())

    def _forward(self, body: bytes) -> tuple[int, bytes]:
        parts = urlsplit(self.proxy.target)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        try:
            connection.request(self.command, self.path, body or None, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _forward_after(self, pause_s: float, body: bytes) -> None:
        self.proxy.ended.wait(pause_s)
        self._forward(body)

    def _reset(self) -> None:
        """Close with a TCP reset (SO_LINGER 0)."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _answer(
        self,
        status: int,
        body: bytes,
        kind: str = "application/json; charset=UTF-8",
        *,
        keep: int | None = None,
        drip: bool = False,
    ) -> None:
        """Send a response; `keep` truncates it, `drip` sends it in small pieces."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        step = max(1, len(body) // 10) if drip else max(1, len(body))
        for start in range(0, len(body[:keep]), step):
            self.wfile.write(body[:keep][start : start + step])
            if drip:
                self.proxy.ended.wait(0.02)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _operations(body: bytes) -> Iterator[bytes]:
    """Return the operations of a bulk request with their lines: one line for a delete, otherwise two."""
    lines = iter(body.splitlines(keepends=True))
    for line in lines:
        if not line.strip():
            continue
        yield line if "delete" in json.loads(line) else line + next(lines)
