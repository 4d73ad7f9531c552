"""Web redirects: the addresses a server may redirect to, checked by the connected address; and endless responses."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
from support import redirects
from support.certificates import Authority
from support.redirects import METADATA, OTHER_PUBLIC, PRIVATE, PUBLIC
from support.serving import AnsweringHandler, serving

from sparse_ingest.errors import StorageError
from sparse_ingest.storage.places import RemotePath
from sparse_ingest.storage.web import network_of

NAMESPACE = ["unshare", "--map-root-user", "--net"]
# The address given, the redirects, and a word of the refusal; "" if the content is read.
REDIRECTS = [
    ((PUBLIC, OTHER_PUBLIC), ""),
    ((PUBLIC, "127.0.0.1"), "private"),
    ((PUBLIC, "localhost"), "private"),  # a host name, because it may resolve to another address each time
    ((PUBLIC, "0.0.0.0"), "private"),
    ((PUBLIC, "[::ffff:127.0.0.1]"), "private"),
    ((PUBLIC, "[::1]"), "private"),
    ((PUBLIC, PRIVATE), "private"),
    ((PUBLIC, METADATA), "link-local"),
    ((PUBLIC, OTHER_PUBLIC, "127.0.0.1"), "private"),
    (("127.0.0.1",), ""),
    (("[::1]",), ""),
    ((METADATA,), ""),
    (("127.0.0.1", PRIVATE), ""),
    ((PRIVATE, "localhost"), ""),
    ((PRIVATE, PUBLIC), ""),
    ((PRIVATE, PUBLIC, PRIVATE), "private"),
    (("127.0.0.1", METADATA), "link-local"),
]


@pytest.mark.skipif(
    subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode != 0, reason="no namespaces"
)
def test_a_redirect_cannot_reach_a_more_private_network_than_its_origin() -> None:
    addresses = ["".join(f"http://{one}:8080/to/" for one in hops).removesuffix("to/") for hops, _ in REDIRECTS]
    ran = subprocess.run(
        [*NAMESPACE, sys.executable, redirects.__file__, *addresses],
        capture_output=True, text=True, timeout=100, check=True, env={"PYTHONPATH": ":".join(sys.path)},
    )  # fmt: skip
    for (hops, refused), line in zip(REDIRECTS, ran.stdout.splitlines(), strict=True):
        found, asked = json.loads(line)
        if refused:
            assert f"is refused: it leads to a {refused} address" in found, hops
            assert asked == list(hops[:-1]), hops  # no request was sent, and none repeated
        else:
            assert found == "content" and len(asked) == len(hops), hops


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"),
        ("::ffff:8.8.8.8", "public"),
        ("64:ff9b::808:808", "public"),
        ("169.254.169.254", "link-local"),
        ("::ffff:169.254.169.254", "link-local"),
        ("64:ff9b::a9fe:a9fe", "link-local"),
        ("fe80::1%eth0", "link-local"),
        *((one, "private") for one in ("127.0.0.1", "10.0.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1")),
        *((one, "private") for one in ("::", "::1", "fd00::1", "fec0::1", "ff02::1", "::ffff:10.0.0.1", "::7f00:1")),
        ("2002:7f00:1::", "private"),
    ],
)
def test_an_address_that_embeds_another_has_its_kind(address: str, kind: str) -> None:
    assert network_of(address) == kind


class Handler(AnsweringHandler):
    target = ""

    def do_GET(self) -> None:
        self.answer(302, b"", Location=self.target)


@contextmanager
def redirecting(target: str, context: ssl.SSLContext | None = None) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("To", (Handler,), {"target": target}))
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    with serving(server):
        yield server.server_address[1]


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "ws://127.0.0.1/x"])
def test_a_redirect_to_another_scheme_is_refused(target: str) -> None:
    with redirecting(target) as port, pytest.raises(StorageError, match="is refused: it leads from http to"):
        RemotePath.at(f"http://127.0.0.1:{port}/x").read_bytes()


def test_a_redirect_from_https_to_http_is_refused(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    pair = authority.sign("server")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    program = "import sys; from sparse_ingest.storage.places import place_of; print(place_of(sys.argv[1]).read_bytes())"
    with redirecting("http://127.0.0.1:9/x", context) as port:
        ran = subprocess.run(
            [sys.executable, "-c", program, f"https://127.0.0.1:{port}/x"], capture_output=True, text=True, check=False,
            timeout=60, env={"PYTHONPATH": ":".join(sys.path), "SSL_CERT_FILE": str(authority.pair.cert)},
        )  # fmt: skip
    assert "A redirect to http://127.0.0.1:9 is refused: it leads from https to http." in ran.stderr


class Endless(AnsweringHandler):
    """Claims 1,000 bytes and sends endlessly, also for ranges; `/gzip` is compressed."""

    sent = 0

    def do_GET(self) -> None:
        is_head = self.command == "HEAD"
        self.send_response(206 if self.headers.get("Range") else 200)
        if is_head:
            self.send_header("Content-Length", "1000")
        self.end_headers()
        while not is_head:
            try:
                type(self).sent += self.wfile.write(bytes(1 << 16))
            except OSError:
                return

    do_HEAD = do_GET


def test_an_endless_response_is_cut_off() -> None:
    handler: type[Endless] = type("Sends", (Endless,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    with serving(server):
        place = RemotePath.at(f"http://127.0.0.1:{server.server_address[1]}/x")
        with pytest.raises(StorageError, match=r"sent more than the expected 67,108,864 bytes"):
            place.read_bytes()
        with place.open_ranges() as file, pytest.raises(StorageError, match="sent more than the expected 10 bytes"):
            file.read(10)
    assert handler.sent < 100 << 20
