"""Requests that the service refuses: one JSON message each, and the right status."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator

import pytest
from support.deadlines import until
from support.runs import make_run
from support.services import Served, served
from support.tables import TOKENS, write_table

DOCUMENTS = {str(place): {"catch": 1.0 + place, "river": 2.0} for place in range(5)}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    run = make_run(folder / "run", DOCUMENTS, model=str(write_table(folder / "model")), vocabulary=TOKENS)
    with served("--run", run.path) as found:
        yield found


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "q is missing"),
        ({"q": ""}, "q is missing"),
        ({"q": "  "}, "The query is empty"),
        ({"q": "catch", "k": "0"}, "from 1 to 1,000"),
        ({"q": "catch", "k": "1001"}, "from 1 to 1,000"),
        ({"q": "catch", "k": "ten"}, "an integer"),
        ({"q": "catch", "k": "1.5"}, "an integer"),
        ({"q": "catch", "size": "1"}, "known here: target, q, engine, k"),
        ({"q": "catch", "engine": "seismic"}, "searched exactly"),
        ({"q": "catch", "filter": '{"term": {"lang": "en"}}'}, "needs a server"),
        ({"q": "catch", "filter": "lang:en"}, "an object"),
        ({"q": "catch", "filter": "{}"}, "one query"),
        ({"q": "catch", "hybrid": "true"}, "needs a server"),
        ({"q": "catch", "hybrid": "yes"}, "true or false"),
        ({"q": "catch", "hybrid_weights": "a,b"}, "a list"),
        ({"q": "catch", "hybrid_combination": "sum"}, "arithmetic_mean"),
        ({"q": "catch", "target": "1"}, "There is no target"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_value_is_400_and_says_what_is_expected(
    service: Served, keys: dict[str, str], words: str
) -> None:
    answer = service.ask("GET", "/search", **keys)
    assert answer.status == 400
    assert words in answer.message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "not JSON"),
        (b'{"q": ', "not JSON"),
        (b"[" * 5000 + b"]" * 5000, "levels deep"),
        (b'["q"]', "expected a JSON object"),
        (b'"q"', "expected a JSON object"),
        (b'{"q": 5}', "a string"),
        (b'{"q": "catch", "k": "10"}', "an integer"),
        (b'{"q": "catch", "k": true}', "an integer"),
        (b'{"q": "catch", "k": NaN}', "an integer"),
        (b'{"q": "catch", "filter": "x"}', "an object"),
        (b'{"q": "catch", "filter": {"a": 1, "b": 2}}', "one query"),
        (b'{"q": "catch", "x": 1}', "Unknown key"),
        (b'{"q": "\\ud800"}', "lone surrogate"),
        (b'{"q": "\xff"}', "not JSON"),
    ],
)
def test_a_wrong_body_is_400_and_says_what_is_expected(service: Served, body: bytes, words: str) -> None:
    answer = service.ask("POST", "/search", body)
    assert answer.status == 400
    assert words in answer.message


def test_a_repeated_key_and_an_address_that_is_not_utf8_are_400(service: Served) -> None:
    assert "repeated" in service.ask("GET", "/search?q=a&q=b").message
    assert "UTF-8" in service.ask("GET", "/search?q=%ff").message


def test_input_above_16_kb_is_refused(service: Served) -> None:
    assert service.ask("POST", "/search", {"q": "catch " * 2700}).status == 200
    assert service.ask("POST", "/search", {"q": "catch " * 2800}).status == 413
    assert service.ask("GET", "/search", q="a" * 17_000).status == 414
    assert service.ask("POST", "/encode", {"texts": ["a" * 200_000], "as": "query"}).status == 200
    assert service.ask("POST", "/encode", {"texts": ["a" * 300_000], "as": "query"}).status == 413


def test_encode_takes_a_limited_number_of_strings(service: Served) -> None:
    assert "a list" in service.ask("POST", "/encode", {"texts": "catch"}).message
    assert "1 to 64" in service.ask("POST", "/encode", {"texts": []}).message
    assert "1 to 64" in service.ask("POST", "/encode", {"texts": ["a"] * 65}).message
    assert "a string" in service.ask("POST", "/encode", {"texts": ["a", 5]}).message
    assert "document or query" in service.ask("POST", "/encode", {"texts": ["a"], "as": "title"}).message


def test_unknown_paths_and_methods_answer_in_json(service: Served) -> None:
    for path in ("/nope", "/search/", "/../etc/passwd", "/%2e%2e/x"):
        assert "/openapi.json" in service.ask("GET", path).message
        assert service.ask("GET", path).status == 404
    for method, path in (("DELETE", "/search"), ("PUT", "/"), ("POST", "/document"), ("OPTIONS", "/search")):
        answer = service.ask(method, path)
        assert answer.status == 405
        assert answer.headers["allow"] in answer.message


def test_a_missing_document_is_404(service: Served) -> None:
    answer = service.ask("GET", "/document", id="nope")
    assert answer.status == 404
    assert "no document 'nope'" in answer.message
    assert service.get("/explain", q="catch", id="nope")["document"]["reason"] == "not found"


def test_without_judgments_their_routes_are_404(service: Served) -> None:
    for path in ("/queries", "/judgments?q=catch"):
        assert "--queries" in service.ask("GET", path).message


def test_head_is_answered_without_a_body(service: Served) -> None:
    for path in ("/", "/search?q=catch", "/healthz", "/metrics"):
        answer = service.ask("HEAD", path)
        assert (answer.status, answer.body) == (200, b"")
        assert int(answer.headers["content-length"]) > 0


def test_every_answer_has_the_headers_that_protect_a_browser(service: Served) -> None:
    for path in ("/", "/search?q=catch", "/search", "/nope", "/metrics"):
        headers = service.ask("GET", path).headers
        assert headers["content-security-policy"].startswith("default-src 'none'")
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["cache-control"] in ("no-store", "no-cache")
        assert "server" not in headers


def test_another_host_name_is_refused_on_loopback_without_a_token(service: Served) -> None:
    answer = service.ask("GET", "/search?q=catch", headers={"Host": "rebound.example:80"})
    assert answer.status == 403
    assert "rebound.example" in answer.message
    for host in ("localhost:1", "127.0.0.1", "[::1]:8080", "LOCALHOST"):
        assert service.ask("GET", "/search?q=catch", headers={"Host": host}).status == 200


def test_broken_http_does_not_disturb_other_requests(service: Served) -> None:
    for content in (b"\x00\xff\x13\n\n", b"GET /search\r\n\r\n", b"POST /search HTTP/1.1\r\nContent-Length: x\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", service.port)) as connection:
            connection.sendall(content)
            assert connection.recv(100).startswith(b"HTTP/1.1 4")
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    assert service.get("/search", q="catch")["hits"]


def test_one_connection_serves_many_requests(service: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    for _ in range(5):
        connection.request("GET", "/search?q=catch")
        assert json.loads(connection.getresponse().read())["hits"]
    connection.close()


def test_the_log_has_a_line_for_each_request_without_its_text(service: Served) -> None:
    assert service.ask("GET", "/search", q="secretword").status == 200
    assert service.ask("POST", "/search", {"q": "secretword"}).status == 200
    assert service.ask("GET", "/a%0Ab?q=secretword").status == 404
    # A line is written after its answer was sent.
    log = until(lambda: " GET /a%0Ab 404 " in (found := service.log()) and found, service.log)
    assert " GET /search 200 " in log
    assert " POST /search 200 " in log
    assert "secretword" not in log


def test_metrics_count_requests_by_route_and_status(service: Served) -> None:
    def count(route: str, status: int) -> float:
        line = f'sparse_ingest_requests_total{{route="{route}",status="{status}"}} '
        text = service.ask("GET", "/metrics").body.decode()
        return float(next((one.rpartition(" ")[2] for one in text.splitlines() if one.startswith(line)), "0"))

    before = [count("/search", 200), count("/search", 400), count("other", 404)]
    service.get("/search", q="catch")
    service.ask("GET", "/search")
    service.ask("GET", "/nope")
    assert [count("/search", 200), count("/search", 400), count("other", 404)] == [one + 1 for one in before]
    answer = service.ask("GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    for name in (
        "sparse_ingest_request_seconds_bucket", "sparse_ingest_requests_in_progress 1.0",
        "sparse_ingest_encode_seconds_count", "sparse_ingest_search_seconds_count",
        "sparse_ingest_encode_batch_size_bucket", "process_resident_memory_bytes",
    ):  # fmt: skip
        assert name in answer.body.decode()
