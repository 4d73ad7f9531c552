"""Start, find and stop a real local OpenSearch, without touching other processes.

Uses the server of the session and restarts it once to see that its data stays. Where only the record and the process
count, a sleeping Python with the token on its command line replaces the server.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from support.deadlines import until
from support.json_page import check
from support.servers import Running, environment, random_free_port, server_home, start_program

from sparse_ingest.cli.server import server
from sparse_ingest.errors import LocalServerError, UsageError
from sparse_ingest.local_server import process
from sparse_ingest.local_server.download import OPENSEARCH_VERSION
from sparse_ingest.local_server.folders import make_folder, server_account, state_home
from sparse_ingest.local_server.launch import TOKEN
from sparse_ingest.local_server.process import Instance


@pytest.fixture
def running(local_server: Running) -> Iterator[Running]:
    """The server of the session, with its state folder in the environment."""
    with environment(SPARSE_INGEST_HOME=str(local_server.home)):
        yield local_server


@pytest.fixture
def home() -> Iterator[Path]:
    """An empty state folder, set in the environment."""
    with server_home() as home, environment(SPARSE_INGEST_HOME=str(home)):
        yield home


def record_of(port: int) -> Path:
    """Return the file that records the server on a port."""
    return state_home() / "instances" / str(port) / "state.json"


def write_record(instance: Instance) -> None:
    content = {**asdict(instance), "data": str(instance.data), "log": str(instance.log)}
    record_of(instance.port).write_text(json.dumps(content))


@pytest.fixture
def stand_in(home: Path) -> Iterator[Callable[[int], Instance]]:
    """Return a function that records an instance with a sleeping process, with the token on its command line."""
    children: list[subprocess.Popen[bytes]] = []

    def begin(port: int) -> Instance:
        token = secrets.token_hex(16)
        command = [sys.executable, "-c", "import time; time.sleep(600)", TOKEN + token]
        children.append(subprocess.Popen(command))
        # A process that has just started has no command line for a moment.
        until(lambda: command[-1] in psutil.Process(children[-1].pid).cmdline())
        log = record_of(port).parent / "logs" / "server.log"
        instance = Instance(
            f"http://127.0.0.1:{port}", port, children[-1].pid, home / "data", "1g", log, OPENSEARCH_VERSION, "", token
        )
        make_folder(log.parent)
        write_record(instance)
        return instance

    yield begin
    for child in children:
        child.kill()
        child.wait()


def request(url: str, body: object = None, method: str | None = None) -> dict:
    sent = urllib.request.Request(
        url, None if body is None else json.dumps(body).encode(), {"Content-Type": "application/json"}, method=method
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sent, timeout=30) as answer:
        return json.load(answer)


def test_a_server_starts_without_java_or_any_other_program_on_path(running: Running) -> None:
    assert request(f"{running.url}/_cluster/health")["status"] in ("green", "yellow")
    java = psutil.Process(running.pid)
    account = server_account()
    assert java.uids().effective == (account.pw_uid if account else os.geteuid()) != 0
    assert [line.laddr.ip.removeprefix("::ffff:") for line in java.net_connections() if line.status == "LISTEN"] == [
        "127.0.0.1",
        "127.0.0.1",
    ]


def test_only_the_server_part_of_the_data_folder_changes_owner(running: Running) -> None:
    ours = running.data / "sparse-ingest-opensearch"
    assert running.data.stat().st_uid == os.geteuid()
    assert ours.stat().st_uid == psutil.Process(running.pid).uids().effective
    assert [path.name for path in running.data.iterdir()] == [ours.name]


def test_the_server_answers_neural_sparse_queries_on_rank_features(running: Running) -> None:
    mapping = {"mappings": {"properties": {"sparse": {"type": "rank_features"}}}}
    request(f"{running.url}/neural", mapping, "PUT")
    request(f"{running.url}/neural/_doc/a?refresh=true", {"sparse": {"hello": 2.0, "world": 1.0}}, "PUT")
    query = {"query": {"neural_sparse": {"sparse": {"query_tokens": {"hello": 1.5}}}}}
    hits = request(f"{running.url}/neural/_search", query)["hits"]["hits"]
    assert [(hit["_id"], hit["_score"]) for hit in hits] == [("a", 3.0)]
    request(f"{running.url}/neural", method="DELETE")


@pytest.mark.parametrize("origin", ["http://evil.example", "https://evil.example:9200", "null", "http://localhost"])
def test_requests_of_a_web_page_are_refused(running: Running, origin: str) -> None:
    request(f"{running.url}/visited/_doc/1?refresh=true", {"a": 1}, "PUT")
    # What a browser sends without a preflight request: a POST of a form, of plain text, of nothing.
    for target, kind, body in (
        ("_delete_by_query?q=*", "text/plain", b""),
        ("_delete_by_query?q=*", "application/x-www-form-urlencoded", b""),
        ("_delete_by_query", "text/plain", b'{"query":{"match_all":{}}}'),
        ("_delete_by_query?source_content_type=application/json&source=%7B%22query%22%3A%7B%22match_all%22%3A%7B%7D%7D%7D",
         "text/plain", b""),
        ("_close", "text/plain", b""),
        ("_search?q=*", "text/plain", b""),
    ):  # fmt: skip
        headers = {"Origin": origin, "Content-Type": kind, "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
        sent = urllib.request.Request(f"{running.url}/visited/{target}", body, headers, method="POST")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sent, timeout=30)
        assert refused.value.code == 403
    asked = {"Origin": origin, "Access-Control-Request-Method": "DELETE"}
    sent = urllib.request.Request(f"{running.url}/visited", headers=asked, method="OPTIONS")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(sent, timeout=30)
    assert request(f"{running.url}/visited/_count")["count"] == 1
    request(f"{running.url}/visited", method="DELETE")


def test_starting_again_succeeds_and_leaves_the_server_unchanged(running: Running) -> None:
    for data in (None, running.data):
        again = process.start(running.port, data=data)
        assert (again.pid, again.url, again.already_running) == (running.pid, running.url, True)
    shown = CliRunner().invoke(server, ["start", "--port", str(running.port)])
    assert (shown.exit_code, shown.stdout) == (0, f"{running.url}\n")
    check(
        "server start", json.loads(CliRunner().invoke(server, ["start", "--port", str(running.port), "--json"]).stdout)
    )


def test_start_with_another_data_folder_is_refused(running: Running, tmp_path: Path) -> None:
    with pytest.raises(LocalServerError, match=f"runs with the data folder {running.data}.*, not {tmp_path}"):
        process.start(running.port, data=tmp_path)


def test_starting_with_the_plugin_is_refused_if_a_server_runs_without_it(running: Running) -> None:
    with pytest.raises(LocalServerError, match=f"{running.port} runs without the machine-learning plugin. Stop it"):
        process.start(running.port, with_ml=True)
    shown = json.loads(CliRunner().invoke(server, ["status", "--json"]).stdout)
    assert [one["with_ml"] for one in shown] == [False]


def test_a_record_of_an_older_release_means_no_plugin(stand_in: Callable[[int], Instance]) -> None:
    instance = stand_in(9_201)
    record = json.loads(record_of(9_201).read_text())
    del record["with_ml"]
    record_of(9_201).write_text(json.dumps(record))
    assert process.instances() == [instance]
    assert instance.with_ml is False


def test_two_servers_never_share_a_data_folder(running: Running) -> None:
    with pytest.raises(LocalServerError, match=f"in use by the local server on port {running.port}"):
        process.start(random_free_port(), data=running.data)


def test_status_shows_the_running_server(running: Running) -> None:
    shown = json.loads(CliRunner().invoke(server, ["status", "--json"]).stdout)
    assert [(one["url"], one["pid"], one["heap"], one["health"]) for one in shown] == [
        (running.url, running.pid, "512m", process.health(process.instances()[0]))
    ]
    check("server status", *shown)
    assert shown[0]["health"] in ("green", "yellow")
    line = CliRunner().invoke(server, ["status"]).stdout
    assert running.url in line and shown[0]["health"] in line and f"documents {shown[0]['documents']}" in line


@pytest.mark.slow  # two starts, one of which waits for a red index
def test_restart_keeps_data_replaces_a_stale_record_and_concurrent_starts_give_one_server(running: Running) -> None:
    request(f"{running.url}/kept/_doc/a?refresh=true", {"text": "still here"}, "PUT")
    # The server starts even if an index stays red.
    nowhere = {"settings": {"index.routing.allocation.require.box": "none"}}
    request(f"{running.url}/broken?wait_for_active_shards=0", nowhere, "PUT")
    record = record_of(running.port).read_text()
    stopped = process.stop()
    assert stopped is not None and stopped.pid == running.pid
    assert not psutil.pid_exists(running.pid)
    assert process.stop() is None

    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        # The pid in the record belongs to another process now.
        record_of(running.port).write_text(json.dumps({**json.loads(record), "pid": stranger.pid}))
        programs = [start_program(running.home, running.port, running.data) for _ in range(2)]
        answers = [program.communicate(timeout=150) for program in programs]
        assert stranger.poll() is None
        stranger.kill()
    assert "no longer runs; starting a new one" in answers[0][1] + answers[1][1]
    shown = [json.loads(out) for out, _ in answers]
    assert shown[0]["pid"] == shown[1]["pid"]
    assert sorted(one["already_running"] for one in shown) == [False, True]
    assert request(f"{running.url}/kept/_doc/a")["_source"] == {"text": "still here"}
    for _, notes in answers:
        assert "shards of 1 of its indexes are missing (red): broken." in notes
        assert f"`sparse-ingest index drop --index broken --force --url {running.url}`" in notes
    request(f"{running.url}/broken", method="DELETE")


def test_a_port_in_use_is_refused_with_the_next_free_port(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = foreign.getsockname()[1]
        with pytest.raises(LocalServerError, match=f"Port {port} is in use .*Port \\d+ is free: pass it with --port"):
            process.start(port)
        assert process.stop(port) is None
        assert not process.is_running(port)
        foreign.settimeout(0.2)
        with pytest.raises(TimeoutError):
            # There was not even a connection.
            foreign.accept()


def test_the_record_of_an_ended_process_is_ignored(stand_in: Callable[[int], Instance]) -> None:
    instance = stand_in(9_201)
    assert process.is_running(9_201)
    ended = psutil.Process(instance.pid)
    ended.kill()
    ended.wait()
    assert not process.is_running(9_201)
    assert process.instances() == []


@pytest.mark.parametrize("record", ["", "{}", "[]", '{"pid": 1}', "\0", "[" * 200_000])
def test_a_damaged_record_is_ignored(stand_in: Callable[[int], Instance], record: str) -> None:
    stand_in(9_201)
    record_of(9_201).write_text(record)
    assert process.instances() == []


@pytest.mark.parametrize(
    "changes",
    [{"pid": value} for value in ("1", None, -1, 0, 1 << 70, 1.5)]
    + [{"port": "9201"}, {"port": 9_202}, {"data": 5}, {"log": None}, {"token": 7}, {"url": []}, {"heap": {}}],
    ids=str,
)
def test_a_record_with_a_value_of_the_wrong_type_is_ignored(
    stand_in: Callable[[int], Instance], changes: dict[str, object]
) -> None:
    stand_in(9_201)
    content = json.loads(record_of(9_201).read_text())
    assert process.instances() != []
    record_of(9_201).write_text(json.dumps({**content, **changes}))
    assert process.instances() == []
    shown = CliRunner().invoke(server, ["status"])
    assert (shown.exit_code, shown.stdout) == (0, "No local server is running\n")


def test_stop_never_ends_a_process_that_reused_the_pid(stand_in: Callable[[int], Instance]) -> None:
    instance = stand_in(9_201)
    write_record(replace(instance, token="another"))
    assert process.stop(9_201) is None
    assert psutil.Process(instance.pid).is_running()


def test_stop_without_a_port_needs_exactly_one_server(stand_in: Callable[[int], Instance]) -> None:
    first, second = stand_in(9_201), stand_in(9_202)
    with pytest.raises(LocalServerError, match="2 local servers are running, on ports 9201, 9202"):
        process.stop()
    assert process.stop(9_202) == second
    assert process.instances() == [first]
    shown = json.loads(CliRunner().invoke(server, ["stop", "--json"]).stdout)
    assert shown["stopped"]["port"] == 9_201
    check("server stop", shown)
    assert CliRunner().invoke(server, ["stop"]).stdout == "No local server is running\n"


def test_a_start_that_fails_shows_the_last_log_lines_and_leaves_nothing(home: Path) -> None:
    port = random_free_port()
    with pytest.raises(LocalServerError, match=r"(?s)ended with exit code 1\. The last lines.*Too small") as error:
        process.start(port, heap="1k")
    assert str(record_of(port).parent / "logs" / "server.log") in str(error.value)
    assert not record_of(port).exists()


def test_a_server_that_is_not_healthy_in_time_is_stopped(home: Path) -> None:
    port = random_free_port()
    with pytest.raises(LocalServerError, match="not healthy after 1 s"):
        process.start(port, heap="512m", timeout_s=1)
    # Processes of other users and ended processes have no command line.
    lines = [" ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if f"{home}/instances/{port}" in line]
    assert process.instances() == []


@pytest.mark.parametrize("heap", ["", "lots", "1", "1.5g", "1gb", "-1g"])
def test_an_invalid_heap_size_is_a_usage_error(home: Path, heap: str) -> None:
    with pytest.raises(UsageError, match="not a heap size: expected .* 512m or 2g"):
        process.start(random_free_port(), heap=heap)


def test_a_data_folder_that_is_a_symbolic_link_is_refused(home: Path) -> None:
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    (home / "sparse-ingest-opensearch").symlink_to(elsewhere)
    with pytest.raises(LocalServerError, match="is a symbolic link"):
        process.start(random_free_port(), data=home)
    assert elsewhere.stat().st_uid == os.geteuid()
