"""A reverse proxy on loopback that adds the features of a secured cluster to a real OpenSearch.

TLS with a given certificate, client certificates, basic authentication, any other check of a request (`check`), a role
without cluster-level rights (`cluster_rights=False`). Accepted requests and their responses are forwarded unchanged,
unless `change` replaces the response. Every request is recorded with method and path.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from support.certificates import Pair
from support.serving import serving

# Path -> its cluster-level action in OpenSearch's security plugin.
CLUSTER_ACTIONS = {
    r"/": "cluster:monitor/main",
    r"/_cluster/settings": "cluster:monitor/state",
    r"/_cluster/health.*": "cluster:monitor/health",
    r"/_cluster/.*": "cluster:monitor/state",
    r"/_cat/.*": "cluster:monitor/state",
    r"/_nodes.*": "cluster:monitor/nodes/info",
    r"/_tasks.*": "cluster:monitor/tasks/lists",
    r"/_plugins/_neural/warmup/.*": "cluster:admin/neural_sparse_warmup_action",
}


def cluster_action(path: str) -> str | None:
    """Return the cluster-level right that a request to `path` needs, or None if index rights suffice."""
    return next((action for pattern, action in CLUSTER_ACTIONS.items() if re.fullmatch(pattern, path)), None)


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


Refusal = tuple[int, object]


@dataclass
class SecureProxy:
    """Settings, address and recorded requests of a proxy."""

    target: str
    users: Mapping[str, str] | None = None
    check: Callable[[Request], Refusal | None] | None = None
    change: Callable[[Request, bytes], bytes] = lambda request, answer: answer
    cluster_rights: bool = True
    url: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)

    def refusal(self, request: Request) -> Refusal | None:
        """Return status and body for a refused request, or None."""
        if self.users is not None and not self._known(request.headers.get("authorization", "")):
            return 401, "Unauthorized"
        if self.check and (refusal := self.check(request)):
            return refusal
        if self.cluster_rights:
            return None
        action = cluster_action(urlsplit(request.path).path)
        if action is None:
            return None
        reason = f"no permissions for [{action}] and User [name=loader, backend_roles=[]]"
        return 403, {"error": {"type": "security_exception", "reason": reason}, "status": 403}

    def _known(self, header: str) -> bool:
        scheme, _, encoded = header.partition(" ")
        if scheme != "Basic":
            return False
        user, _, password = b64decode(encoded).decode().partition(":")
        return self.users is not None and self.users.get(user) == password


@contextmanager
def secure_proxy(
    target: str, *, certificate: Pair | None = None, client_ca: Path | None = None, **behavior: Any
) -> Iterator[SecureProxy]:
    """Start a TLS proxy with `certificate` that requires client certificates signed by `client_ca`."""
    proxy = SecureProxy(target, **behavior)

    class Handler(_Handler):
        shared = proxy

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if certificate:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_ca)
        context.load_cert_chain(*certificate)
        if client_ca:
            context.verify_mode = ssl.CERT_REQUIRED
        # Handshake in the handler's thread, so that a client that never completes it blocks no others.
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    proxy.url = f"{'https' if certificate else 'http'}://localhost:{server.server_address[1]}"
    with serving(server):
        yield proxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 300  # an idle connection is not closed while a slow client may use it again
    shared: SecureProxy

    def setup(self) -> None:
        parts = urlsplit(self.shared.target)
        self._connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        super().setup()

    def handle(self) -> None:
        try:
            if isinstance(self.request, ssl.SSLSocket):
                self.request.do_handshake()
            super().handle()
        except ssl.SSLError:
            # Closing immediately would send a reset, which could arrive before the TLS alert.
            with suppress(OSError):
                socket.socket.shutdown(self.request, socket.SHUT_WR)
                while socket.socket.recv(self.request, 65536):
                    pass
        except ConnectionError:
            pass

    def finish(self) -> None:
        self._connection.close()
        super().finish()

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        asked = (self.command, urlsplit(self.path).path)
        self.shared.asked.append(asked)
        if refusal := self.shared.refusal(request):
            self.shared.refused.append(asked)
            status, content = refusal
            if isinstance(content, str):
                self._answer(status, content.encode(), "text/plain; charset=UTF-8")
            else:
                self._answer(status, json.dumps(content).encode(), "application/json; charset=UTF-8")
            return
        kind = {"Content-Type": headers["content-type"]} if "content-type" in headers else {}
        self._connection.request(self.command, self.path, body or None, kind)
        response = self._connection.getresponse()
        answer = self.shared.change(request, response.read())
        self._answer(response.status, answer, response.headers.get("content-type", ""))

    do_POST = do_PUT = do_DELETE = do_HEAD = do_GET  # noqa: N815

    def _answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass
