"""Starting, access, limits and stopping of the service."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.deadlines import HANGING_S, until
from support.forked import command
from support.gate import Gate, gate
from support.indexes import filled
from support.runs import make_run
from support.secure_proxy import SecureProxy, secure_proxy
from support.services import Served, served
from support.tables import TOKENS, write_table

from sparse_ingest.cluster.client import Client
from sparse_ingest.runs.run import Run

TOKEN = "s3cret-token"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("served")
    documents = {str(place): {"catch": 1.0 + place, "river": 2.0} for place in range(5)}
    return make_run(folder / "run", documents, model=str(write_table(folder / "model")), vocabulary=TOKENS)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_token_is_needed_except_for_the_page_and_the_health(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    with served("--run", run.path, "--token-file", file, "--host", "0.0.0.0") as service:
        assert service.ask("GET", "/").status == service.ask("GET", "/healthz").status == 200
        for path in ("/search?q=catch", "/metrics", "/openapi.json", "/nope", "/targets"):
            for headers in ({}, bearer("wrong"), bearer(""), {"Authorization": TOKEN}, {"Authorization": "Bearer é"}):
                answer = service.ask("GET", path, headers=headers)
                assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
                assert "Authorization" in answer.message
        for headers in (bearer(TOKEN), {"authorization": f"bearer  {TOKEN}", "Host": "search.example"}):
            assert service.ask("GET", "/search?q=catch", headers=headers).status == 200
        log = service.log()
    assert TOKEN not in log
    assert "without a token" not in log


def test_the_token_may_be_in_a_variable(run: Run) -> None:
    with served("--run", run.path, SPARSE_INGEST_SERVE_TOKEN=TOKEN) as service:
        assert service.ask("GET", "/targets").status == 401
        assert service.ask("GET", "/targets", headers=bearer(TOKEN)).status == 200


def test_an_open_address_without_a_token_is_warned_about(run: Run) -> None:
    with served("--run", run.path, "--host", "0.0.0.0") as service:
        assert "without a token" in service.log()
        assert service.ask("GET", "/search?q=catch", headers={"Host": "any.example"}).status == 200


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--run", "{run}", "--host", "192.0.2.1"), 2, "Cannot listen on 192.0.2.1 port"),
        (("--run", "{run}", "--host", "no such host"), 2, "Cannot listen on no such host"),
        (("--run", "{run}", "--token-file", "{empty}"), 2, "has no token"),
        (("--run", "{run}", "--compare", "bm25"), 2, "an engine of an index"),
        (("--run", "{run}", "--compare", "{run}"), 2, "compared with itself"),
        (("--run", "{run}", "--quoting", "none"), 2, "quoting is for queries"),
        (("--run", "{run}", "--queries", "{empty}"), 2, "Give --queries F and --qrels F"),
        (("--run", "{run}", "--url", "http://127.0.0.1:1"), 2, "--url"),
        (("--index", "x", "--run", "{run}"), 2, "either --index NAME or --run RUN"),
        ((), 2, "either --index NAME or --run RUN"),
        (("--index", "x", "--url", "http://127.0.0.1:1"), 1, "Nothing listens"),
    ],
)
def test_what_cannot_be_served_is_refused_at_the_start(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    (tmp_path / "empty").touch()
    given = [one.format(run=run.path, empty=tmp_path / "empty") for one in arguments]
    answer = command("serve", *given, "--port", "0")
    assert (answer.code, answer.out) == (code, "")
    assert words in answer.err


def test_a_port_in_use_is_refused(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        answer = command("serve", "--run", run.path, "--port", other.getsockname()[1])
    assert answer.code == 2
    assert "Pass another --host or --port" in answer.err


def test_ctrl_c_ends_the_service_with_0_and_closes_idle_connections(run: Run) -> None:
    with served("--run", run.path) as service:
        idle = http.client.HTTPConnection("127.0.0.1", service.port, timeout=HANGING_S)
        idle.request("GET", "/healthz")
        assert idle.getresponse().read()
        assert service.stop(signal.SIGINT) == 0
        assert "Traceback" not in service.log()


def test_sigterm_finishes_a_request_whose_body_is_still_arriving(run: Run) -> None:
    body = json.dumps({"q": "catch", "k": 1}).encode()
    with served("--run", run.path) as service:
        with socket.create_connection(("127.0.0.1", service.port), HANGING_S) as connection:
            head = f"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            connection.sendall(head + body[:5])
            until(lambda: b"in_progress 2.0" in service.ask("GET", "/metrics").body)
            service.send_signal(signal.SIGTERM)
            until(lambda: not listens(service))
            connection.sendall(body[5:])
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"\r\nconnection: close\r\n" in answer  # so that a client does not use the connection again
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["hits"][0]["id"] == "4"
        assert service.wait() == 0


def listens(service: Served) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", service.port), HANGING_S):
        return True
    return False


@pytest.fixture(scope="module")
def behind_gate(run: Run, client: Client) -> Iterator[tuple[Served, Gate]]:
    """A service with low limits, whose cluster is behind a gate."""
    model = run.manifest.model["document"]
    with filled(client, run) as index, gate(client.address) as cluster:
        of = ("--index", index, "--url", cluster.url, "--model", model, "--time-limit", 2, "--max-requests", 4)
        with served(*of) as service:
            yield service, cluster


def test_a_slow_cluster_meets_the_limits_and_stops_nothing_else(behind_gate: tuple[Served, Gate]) -> None:
    service, cluster = behind_gate
    cluster.open.clear()
    with ThreadPoolExecutor(4) as clients:
        slow = [clients.submit(service.ask, "GET", "/search", q="catch") for _ in range(4)]
        for _ in slow:
            assert cluster.waiting.acquire(timeout=HANGING_S)
        refused = service.ask("GET", "/search", q="catch")
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert "4 requests are in progress" in refused.message
        assert service.get("/healthz") == {"status": "ok"}
        assert {one.result().status for one in slow} == {504}
        assert "--time-limit" in slow[0].result().message
    cluster.open.set()
    # The threads are free when their requests to the cluster have ended.
    assert until(lambda: service.ask("GET", "/search", q="catch").status == 200)


def test_a_cluster_that_is_down_is_503_until_it_is_back(behind_gate: tuple[Served, Gate]) -> None:
    service, cluster = behind_gate
    cluster.is_down = True
    answer = service.ask("GET", "/search", q="catch")
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.message == "The cluster gave no usable answer. See the service log."
    assert f"{cluster.url} closed the connection" in service.log()
    assert service.get("/openapi.json")["paths"]["/search"]
    cluster.is_down = False
    assert until(lambda: service.ask("GET", "/search", q="catch").status == 200)


@pytest.fixture(scope="module")
def behind_proxy(run: Run, client: Client) -> Iterator[tuple[Served, SecureProxy]]:
    with filled(client, run) as index, secure_proxy(client.address) as proxy:
        with served("--index", index, "--url", proxy.url, "--model", run.manifest.model["document"]) as service:
            yield service, proxy


@pytest.fixture
def checked(behind_proxy: tuple[Served, SecureProxy]) -> Iterator[tuple[Served, SecureProxy]]:
    """The service with a cluster that answers; the test may replace the answers."""
    service, proxy = behind_proxy
    assert until(lambda: service.ask("GET", "/search", q="catch").status == 200)
    yield service, proxy
    proxy.check = None


@pytest.mark.parametrize("status", [302, 400, 401, 403, 429, 500, 503])
def test_only_the_log_has_the_reason_of_a_cluster_that_refuses(
    checked: tuple[Served, SecureProxy], status: int
) -> None:
    service, proxy = checked
    reason = "action [search] is unauthorized for user [secret-user] at secret-host:9300"
    proxy.check = lambda _: (status, {"error": {"type": "security_exception", "reason": reason}})
    before = len(service.log())
    for path in ("/search?q=catch", "/document?id=4", "/explain?q=catch&id=4", "/targets"):
        answer = service.ask("GET", path)
        assert answer.status == (503 if status in (429, 503) else 502)
        assert answer.message == f"The cluster answered with status {status}. See the service log."
    assert f"{proxy.url} " in service.log()[before:]


def test_a_partial_answer_is_503_without_its_reason(checked: tuple[Served, SecureProxy]) -> None:
    service, proxy = checked
    failure = {"reason": {"type": "node_not_connected_exception", "reason": "[secret-host] Node not connected"}}
    shards = {"total": 2, "successful": 1, "failed": 1, "failures": [failure]}
    partial = {"took": 1, "_shards": shards, "hits": {"hits": []}}
    proxy.check = lambda request: (200, partial) if "/_search" in request.path else None
    answer = service.ask("GET", "/search", q="catch")
    assert (answer.status, "partial" in answer.message, "secret" in answer.message) == (503, True, False)
    assert "[secret-host] Node not connected" in service.log()


def test_sigterm_waits_for_a_search_that_the_cluster_is_answering(run: Run, client: Client) -> None:
    model = run.manifest.model["document"]
    with filled(client, run) as index, gate(client.address) as cluster:
        with served("--index", index, "--url", cluster.url, "--model", model) as service, ThreadPoolExecutor(1) as one:
            cluster.open.clear()
            asked = one.submit(service.ask, "GET", "/search", q="catch", k=1)
            assert cluster.waiting.acquire(timeout=HANGING_S)
            service.send_signal(signal.SIGTERM)
            until(lambda: not listens(service))
            cluster.open.set()
            assert asked.result().body["hits"][0]["id"] == "4"
            assert service.wait() == 0
