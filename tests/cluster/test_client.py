"""Connections: each failure is one message, and no message contains a password."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import ThreadingHTTPServer
from socketserver import StreamRequestHandler, ThreadingTCPServer
from threading import Event

import pytest
from support.serving import AnsweringHandler, serving

from sparse_ingest.cluster.client import Connection, ResponseError, UnreachableError, connect
from sparse_ingest.cluster.connection import parse_url
from sparse_ingest.cluster.failures import blocked_message, error_of
from sparse_ingest.errors import ClusterError, MissingExtraError, UsageError


@contextmanager
def answering(status: int, body: object, *, location: str | None = None) -> Iterator[str]:
    """A server with the same response for every path except /never, which gets none."""
    ended = Event()

    class Handler(AnsweringHandler):
        def do_GET(self) -> None:
            if self.path == "/never":
                ended.wait()
            else:
                self.answer(status, body, **({"Location": location} if location else {}))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    with serving(server):
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            ended.set()


def root(number: str, distribution: str | None = "opensearch") -> dict[str, object]:
    return {"cluster_uuid": "C", "version": {"number": number, "distribution": distribution}}


def test_connect_reads_version_and_cluster(opensearch_url: str) -> None:
    with closing(connect(Connection(opensearch_url))) as client:
        assert client.version >= (2, 11)
        assert len(client.cluster_uuid) > 10


@pytest.mark.parametrize(
    ("url", "address", "user", "password"),
    [
        ("http://127.0.0.1:9200", "http://127.0.0.1:9200", None, None),
        ("https://search.example.org", "https://search.example.org:443", None, None),
        ("http://search.example.org/", "http://search.example.org:9200", None, None),
        ("search.example.org:9201", "http://search.example.org:9201", None, None),
        ("https://me:p%40ss@host:1/a/b/", "https://host:1/a/b", "me", "p@ss"),
        ("http://[::1]:9200", "http://[::1]:9200", None, None),
    ],
)
def test_urls_are_split_into_address_user_and_password(
    url: str, address: str, user: str | None, password: str | None
) -> None:
    parts, found_user, found_password = parse_url(url)
    assert (str(parts), found_user, found_password) == (address, user, password)


@pytest.mark.parametrize("url", ["ftp://me:secret@host", "http://", "http://me:secret@host:port", "http://h/?a=secret"])
def test_an_invalid_url_is_not_printed(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        connect(Connection(url))
    assert "secret" not in str(caught.value)


def test_a_refused_connection_names_the_address_without_the_password() -> None:
    with socket.socket() as silent:  # it keeps the port and does not listen
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(UnreachableError) as caught:
            connect(Connection(f"http://me:secret@127.0.0.1:{port}"))
    assert f"Nothing listens at http://127.0.0.1:{port}" in str(caught.value)
    assert "sparse-ingest server start" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert "me:" not in str(caught.value)


def test_an_unknown_host_is_named() -> None:
    with pytest.raises(UnreachableError, match="the host name is unknown"):
        connect(Connection("http://no-such-host.invalid:9200"))


def test_https_to_a_server_without_tls_is_reported(opensearch_url: str) -> None:
    with pytest.raises(UnreachableError, match="does not speak TLS"):
        connect(Connection(opensearch_url.replace("http://", "https://")))


def test_a_server_that_never_answers_times_out() -> None:
    with answering(200, root("3.0.0")) as address, closing(connect(Connection(f"http://{address}"))) as client:
        with pytest.raises(UnreachableError, match=r"did not answer within 0.1 s"):
            client.call("GET", "/never", timeout_s=0.1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (root("2.9.0"), "is OpenSearch 2.9.0; sparse-ingest needs 2.11 or newer"),
        (root("8.15.0", None), "neither OpenSearch nor Elasticsearch .it reports version 8.15.0"),
        ({"hello": "world"}, "it names no version"),
        ([1], "the JSON of OpenSearch"),
        (root("3.6.0") | {"cluster_uuid": "../x"}, "the JSON of OpenSearch"),
    ],
)
def test_other_servers_and_old_versions_are_refused(body: object, message: str) -> None:
    with answering(200, body) as address, pytest.raises(ClusterError, match=message):
        connect(Connection(f"http://{address}"))


@pytest.mark.parametrize("number", ["2.11.0", "2.19.5", "3.6.0", "4.0.0-alpha1"])
def test_versions_from_2_11_are_accepted(number: str) -> None:
    with answering(200, root(number)) as address:
        assert connect(Connection(f"http://{address}")).version >= (2, 11, 0)


def test_unauthorized_and_forbidden_name_the_options_to_pass() -> None:
    with answering(401, {"error": "Unauthorized"}) as address:
        with pytest.raises(ResponseError, match=r"requires authentication \(401\): pass --user and --password"):
            connect(Connection(f"http://{address}"))
        with pytest.raises(ResponseError, match="does not accept user 'me' with this password") as caught:
            connect(Connection(f"http://me:secret@{address}"))
        assert "secret" not in str(caught.value)
    forbidden = {"error": {"type": "security_exception", "reason": "no permissions for [x]"}}
    with answering(403, forbidden) as address, pytest.raises(ResponseError, match=r"user 'me' \(403\).*no permissions"):
        connect(Connection(f"http://{address}", user="me", password="secret"))


def test_aws_without_boto3_names_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(MissingExtraError, match=r'pip install "sparse-ingest\[aws\]"'):
        connect(Connection("https://search.example.org", aws_service="es", aws_region="eu-west-1"))


def test_proxy_variables_are_ignored(opensearch_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    connect(Connection(opensearch_url)).close()


def test_the_password_is_in_no_repr() -> None:
    assert "secret" not in repr(Connection(password="secret"))
    assert repr(Connection("https://me:secret@host")) == "Connection(url='https://host:443', user='me')"
    assert "secret" not in repr(Connection("ftp://me:secret@host"))


def test_an_error_that_is_not_a_json_object_is_reported_without_its_text() -> None:
    with answering(500, "secret") as address, pytest.raises(UnreachableError, match="the JSON of OpenSearch"):
        connect(Connection(f"http://{address}"))


@pytest.mark.parametrize(
    ("page", "title"),
    [
        ("<html>\r\n<head><title>{}</title></head>\r\n<body>{}</body></html>", "503 Service\nUnavailable"),
        ("<!DOCTYPE html>\n<head><meta charset='utf-8'><TITLE lang='en'>{}</TITLE></head>{}", "Gateway time-out"),
        ("\n<Error><Message>{}</Message></Error>{}", "SlowDown"),
        ("<title> </title><style>\na {{}}</style><SCRIPT>let b</SCRIPT><h1>{}</h1>{}", "Bad gateway"),
    ],
)
@pytest.mark.parametrize("status", [403, 503])
def test_an_error_that_is_a_web_page_is_reported_with_its_title(status: int, page: str, title: str) -> None:
    content = page.format(title, "<p>Try later.</p>" * 300).encode()
    with answering(status, content) as address, pytest.raises(ResponseError) as caught:
        connect(Connection(f"http://{address}"))
    assert " ".join(title.split()) in str(caught.value)
    assert not any(part in str(caught.value) for part in ("\n", "()", "{", "let b"))
    assert len(str(caught.value)) < 400
    assert ("grant the right" if status == 403 else "not with JSON. A proxy may have sent it") in str(caught.value)


@pytest.mark.parametrize("page", ["<html></html>", "<title></title><style>" + "a {} " * 5000 + "</style>Try later."])
@pytest.mark.parametrize("status", [403, 503])
def test_a_web_page_without_a_title_at_its_start_is_reported(status: int, page: str) -> None:
    with answering(status, page.encode()) as address, pytest.raises(ResponseError) as caught:
        connect(Connection(f"http://{address}"))
    expected = (
        "answered 503 with a web page, not with JSON" if status == 503 else "grant the right, or pass another --user."
    )
    assert expected in str(caught.value)
    assert "reason" not in str(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    ("location", "target", "base"),
    [
        ("https://me:secret@search.example.org/", "https://search.example.org/", "https://search.example.org"),
        (
            "https://search.example.org:9200/es/",
            "https://search.example.org:9200/es/",
            "https://search.example.org:9200/es",
        ),
        ("/login?token=secret", "http://127.0.0.1:{port}/login", "http://127.0.0.1:{port}/login"),
    ],
)
def test_a_redirect_is_reported_with_its_target(status: int, location: str, target: str, base: str) -> None:
    with answering(status, {}, location=location) as address, pytest.raises(ResponseError) as caught:
        connect(Connection(f"http://{address}"))
    target, base = (text.format(port=address.rpartition(":")[2]) for text in (target, base))
    assert f"redirects to {target} ({status})" in str(caught.value)
    assert f"--url {base}." in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_redirect_without_a_target_is_reported() -> None:
    with answering(302, {}) as address, pytest.raises(ResponseError, match=r"sent a redirect \(302\) without a target"):
        connect(Connection(f"http://{address}"))


def test_a_block_on_new_indexes_is_not_reported_as_a_missing_permission() -> None:
    reason = "blocked by: [FORBIDDEN/10/cluster create-index blocked (api)];"
    for kind in ("index_create_block_exception", "cluster_block_exception"):
        with answering(403, {"error": {"type": kind, "reason": reason}}) as address:
            with pytest.raises(ResponseError) as caught:
                connect(Connection(f"http://{address}"))
        assert "cluster.blocks.create_index" in str(caught.value)
        assert "disk watermark" in str(caught.value)
        assert "grant" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n\xff\xfe",
            "did not answer with the JSON",
        ),
        (
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4\r\n\r\nnull",
            "did not answer with the JSON",
        ),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9000\r\n\r\n{", "broke off its answer"),
        (b"+OK POP3 server ready\r\n", "does not answer in HTTP"),
        (b"", "closed the connection before it answered. If it speaks TLS, write https://"),
    ],
)
def test_a_response_that_is_not_valid_http_or_json_is_reported(answer: bytes, message: str) -> None:
    class Handler(StreamRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.wfile.write(answer)

    server = ThreadingTCPServer(("127.0.0.1", 0), Handler)
    with serving(server), pytest.raises(UnreachableError, match=message):
        connect(Connection(f"http://127.0.0.1:{server.server_address[1]}"))


def test_error_of_gives_the_deepest_cause() -> None:
    answer = {
        "error": {"type": "a", "reason": "outer", "caused_by": {"reason": "middle", "caused_by": {"reason": "in"}}}
    }
    assert error_of(answer) == ("a", "outer: middle: in")
    assert error_of({"error": "plain"}) == ("error", "plain")


def test_a_block_is_reported_with_the_index_of_its_reason_and_not_with_a_path_that_has_none() -> None:
    blocked = "index [b] blocked by: [FORBIDDEN/7/index read (api)];"
    assert 'PUT /b/_settings {"index.blocks.read": null}' in blocked_message("http://c", "/a,b/_search", blocked)
    metadata = blocked.replace("7/index read", "9/index metadata")
    assert 'PUT /b/_settings {"index.blocks.metadata": null}' in blocked_message("http://c", "/a", metadata)
    assert (
        blocked_message("http://c", "/_search", "closed")
        == "http://c: an index is closed (index_closed_exception). Open it."
    )
