"""Storage for tests: moto's S3 over HTTP, a proxy that injects faults, and web servers of a folder."""

from __future__ import annotations

import http.client
import logging
import re
import secrets
import socket
import struct
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from urllib.parse import urlsplit

from sparse_ingest.storage.places import RemotePath
from support.serving import serving

SECRET = "SECRETofTheStore"
Fault = int | str | None


@contextmanager
def moto_store() -> Iterator[str]:
    """Yield the address of an object store."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield "http://{}:{}".format(*server.get_host_and_port())
    finally:
        server.stop()


def environment_of(url: str) -> dict[str, str]:
    """Return the variables through which client libraries find a store."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def make_bucket(url: str) -> str:
    """Create a bucket; return its address s3://..."""
    name = f"bucket-{secrets.token_hex(6)}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open(urllib.request.Request(f"{url}/{name}", method="PUT"), timeout=30).close()
    return f"s3://{name}"


def stored(place: RemotePath) -> dict[str, bytes]:
    """Return every file in a folder of a store by its relative name."""
    found = {}
    for one in place.iterdir():
        if one.is_dir():
            found.update({f"{one.name}/{name}": content for name, content in stored(one).items()})
        else:
            found[one.name] = one.read_bytes()
    return found


def put_folder(folder: Path, place: RemotePath) -> None:
    """Copy a folder into a store."""
    for path in folder.rglob("*"):
        if path.is_file():
            target = place
            for part in path.relative_to(folder).parts:
                target = target / part
            target.write_whole(path.read_bytes())


class FaultyStore:
    """Requests that match a pattern get faults, in order.

    A fault is an HTTP status, "drop" (closed without a response), "lost answer" (closed after the store has handled
    it), "cut" (half of the response, then a reset), or None.
    """

    def __init__(self, target: str) -> None:
        self.target, self.url = target, ""
        self.pattern, self.faults = re.compile(""), [None][:0]
        self.always: Fault = None
        self.seen: list[str] = []
        self.done: list[Fault] = []
        self.sent: list[tuple[str, int]] = []  # each request and the size of its response
        self._lock = Lock()

    def inject(self, pattern: str, *faults: Fault, always: Fault = None) -> None:
        """Inject these faults, and then `always`, into requests that match the pattern (such as `PUT .*done`)."""
        self.pattern, self.faults, self.always = re.compile(pattern), list(faults), always
        self.seen, self.done = [], []

    def sent_of(self, pattern: str) -> int:
        """Return the bytes of responses to requests that match."""
        return sum(size for request, size in self.sent if re.match(pattern, request))

    def next_fault(self, request: str) -> Fault:
        with self._lock:
            self.seen.append(request)
            if not self.pattern.match(request):
                return None
            fault = self.faults.pop(0) if self.faults else self.always
            if fault is not None:
                self.done.append(fault)
            return fault


@contextmanager
def faulty_store(target: str) -> Iterator[FaultyStore]:
    """Yield a proxy in front of a store."""
    proxy = FaultyStore(target)
    with _served(type("Handler", (_Proxy,), {"proxy": proxy})) as proxy.url:
        yield proxy


@contextmanager
def web_server(folder: Path, *, ranges: bool = True, token: str | None = None) -> Iterator[str]:
    """Yield the web address of a folder; with `token`, requests need it in the query, as in a signed link."""
    attributes = {"folder": str(folder), "ranges": ranges, "token": token, "bytes_sent": 0, "asked": []}
    handler = type("Handler", (_Web,), attributes)
    with _served(handler) as url:
        yield url


@contextmanager
def _served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    with serving(server):
        yield f"http://127.0.0.1:{server.server_address[1]}"


class _Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyStore

    def do_GET(self) -> None:
        body = self._body()
        fault = self.proxy.next_fault(f"{self.command} {self.path}")
        if fault == "drop":
            self.close_connection = True
            return
        if isinstance(fault, int):
            code = {503: "ServiceUnavailable", 500: "InternalError", 403: "AccessDenied"}[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>".encode()
            self._answer(fault, {"Content-Type": "application/xml", "Content-Length": str(len(text))}, text)
            return
        parts = urlsplit(self.proxy.target)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        sent = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        connection.request(self.command, self.path, body, {**sent, "Content-Length": str(len(body))})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        self.proxy.sent.append((f"{self.command} {self.path}", len(content)))
        if fault == "lost answer":
            self.close_connection = True
            return
        kept = {name: value for name, value in response.getheaders() if name.lower() != "transfer-encoding"}
        if self.command != "HEAD" and response.status != 204:
            kept["Content-Length"] = str(len(content))
        self._answer(response.status, kept, content[: len(content) // 2] if fault == "cut" else content)
        if fault == "cut":
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            pass  # answered by http.server already
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):
                self.wfile.write(content)
                self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Web(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: str
    ranges: bool
    token: str | None
    bytes_sent: int
    asked: list[tuple[str, str | None]]

    def __init__(self, *args: object) -> None:
        super().__init__(*args, directory=self.folder)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = Path(self.translate_path(urlsplit(self.path).path))
        type(self).asked.append((self.command, self.headers.get("Range")))
        if self.token is not None and self.token not in urlsplit(self.path).query:
            self.send_error(403)
        elif not path.is_file():
            self.send_error(404)
        else:
            self._send(path)

    do_HEAD = do_GET  # noqa: N815

    def _send(self, path: Path) -> None:
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = 0, size
        if asked and self.ranges:
            start, end = int(asked[1]), min(size, int(asked[2]) + 1 if asked[2] else size)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        with path.open("rb") as file, suppress(OSError):
            file.seek(start)
            while start < end:
                block = file.read(min(65536, end - start))
                self.wfile.write(block)
                start += len(block)

    def log_message(self, format: str, *args: object) -> None:
        pass
