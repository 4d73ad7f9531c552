"""Responses are bounded in size and time: endless, compressed, slow and missing ones; long waits are reported."""

from __future__ import annotations

import gzip
import json
import logging
import re
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event

import pytest
from support.deadlines import until
from support.serving import serving

from sparse_ingest.cluster import waiting
from sparse_ingest.cluster.client import Connection, TimedOutError, connect
from sparse_ingest.errors import ClusterError, UsageError

ROOT = json.dumps({"cluster_uuid": "C", "version": {"number": "3.6.0", "distribution": "opensearch"}}).encode()
# 160 MB of spaces, 160 KB compressed.
BOMB = gzip.compress(bytes(160 << 20).replace(b"\0", b" "))
Body = Callable[[BaseHTTPRequestHandler], None]


def compression_bomb(handler: BaseHTTPRequestHandler) -> None:
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(BOMB)))
    handler.end_headers()
    handler.wfile.write(BOMB)


def endless(handler: BaseHTTPRequestHandler) -> None:
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    piece = b"%x\r\n%b\r\n" % (1 << 20, b" " * (1 << 20))
    while True:
        handler.wfile.write(piece)


def trickle(handler: BaseHTTPRequestHandler) -> None:
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def compressed(handler: BaseHTTPRequestHandler) -> None:
    content = gzip.compress(b'{"a": [1, 2]}')
    handler.send_header("Content-Encoding", "gzip")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


@contextmanager
def answering(body: Body | None) -> Iterator[str]:
    """A server that identifies as OpenSearch at /, and sends `body` for any other path (None: no response)."""
    ended = Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length") or 0))
            if self.path != "/" and body is None:
                ended.wait(300)
                self.close_connection = True
                return
            self.send_response(200)
            # A client must not send another request over a connection that this server is closing.
            self.send_header("Connection", "close")
            self.send_header("Content-Type", "application/json")
            try:
                if self.path == "/" or body is None:
                    self.send_header("Content-Length", str(len(ROOT)))
                    self.end_headers()
                    self.wfile.write(ROOT)
                else:
                    body(self)
            except OSError:  # the client closed the connection
                pass

        do_POST = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    with serving(server):
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            ended.set()


@pytest.mark.parametrize("body", [compression_bomb, endless])
def test_a_response_above_the_limit_is_an_error_with_the_limit_and_the_address(body: Body) -> None:
    with answering(body) as url, connect(Connection(url)) as client:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(ClusterError) as caught:
            client.call("GET", "/index/_mapping")
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    assert str(caught.value).startswith(f"{url} sent an answer of more than 64 MiB to GET /index/_mapping, the limit")
    assert grown < 200


def test_the_size_limit_of_searches_is_higher_than_that_of_other_requests() -> None:
    content = b'{"a": "%b"}' % (b"x" * (80 << 20))

    def large(handler: BaseHTTPRequestHandler) -> None:
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content)

    with answering(large) as url, connect(Connection(url)) as client:
        assert len(client.call("POST", "/index/_search", {})["a"]) == 80 << 20
        with pytest.raises(ClusterError, match="more than 64 MiB to POST /research"):
            client.call("POST", "/research", {})


def test_a_small_compressed_response_is_read() -> None:
    with answering(compressed) as url, connect(Connection(url)) as client:
        assert client.call("GET", "/index") == {"a": [1, 2]}


@pytest.mark.parametrize("body", [trickle, None])
def test_the_timeout_ends_a_response_that_trickles_and_one_that_never_starts(body: Body | None) -> None:
    with answering(body) as url, connect(Connection(url)) as client:
        with pytest.raises(TimedOutError, match="within 1 s"):
            client.call("GET", "/index", timeout_s=1)


def test_without_a_reporter_the_wait_for_a_response_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert waiting.SAY_S == 10
    monkeypatch.setattr(waiting, "SAY_S", 0.1)

    def notes() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "sparse_ingest.cluster.waiting"]

    def after_two_notes(handler: BaseHTTPRequestHandler) -> None:
        until(lambda: len(notes()) >= 2)
        compressed(handler)

    with answering(after_two_notes) as url, connect(Connection(url)) as client, caplog.at_level(logging.WARNING):
        client.call("GET", "/index")
    for note in notes():
        assert re.fullmatch(rf"{url} has not answered GET /index for \d+ s; waiting up to 60 s\.", note)


def test_the_timeout_variable_must_be_positive_seconds(monkeypatch: pytest.MonkeyPatch, opensearch_url: str) -> None:
    monkeypatch.setenv("SPARSE_INGEST_URL", opensearch_url)
    monkeypatch.setenv("SPARSE_INGEST_TIMEOUT", "7.5")
    with connect() as client:
        assert client.waiting.patience_s == 7.5
    for wrong in ("soon", "0", "-1"):
        monkeypatch.setenv("SPARSE_INGEST_TIMEOUT", wrong)
        with pytest.raises(UsageError, match="expected seconds above zero, such as 600"):
            connect()
