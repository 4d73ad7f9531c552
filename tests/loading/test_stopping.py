"""A waiting load reports why; signals end it with exit code 130, a correct journal and restored settings."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Event

import pytest
from support.deadlines import HANGING_S, until
from support.loads import MANY, ids_in, into, settings_of, stamped
from support.runs import make_run
from support.secure_proxy import Request, secure_proxy
from support.tables import write_table

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.journal import open_journal
from sparse_ingest.runs.run import Run

# A shell ignores SIGINT for background jobs, and a child inherits that.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from sparse_ingest.cli.main import main; main()"
)
SIGNALS = [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGINT, signal.SIGHUP))]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", MANY, shard_rows=20)


@contextmanager
def running(*arguments: object, program: str = PROGRAM) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def loading(run: Run, index: str, url: str, program: str = PROGRAM) -> AbstractContextManager[subprocess.Popen[str]]:
    return running("load", run.path, "--index", index, "--url", url, program=program)


def stopped(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal to a load, check its exit code, and return what it prints."""
    process.send_signal(number)
    _, printed = process.communicate(timeout=HANGING_S)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    return printed


@pytest.mark.parametrize("number", SIGNALS)
def test_waiting_for_an_unassigned_primary_is_reported_and_ends_on_a_signal(
    client: Client, index_name: str, run: Run, number: signal.Signals
) -> None:
    body = {
        "settings": {"index.routing.allocation.require.box": "hot"},
        "mappings": {"properties": {"sparse": {"type": "rank_features"}}},
    }
    client.call("PUT", f"/{index_name}", body, params={"wait_for_active_shards": "0"})
    with loading(run, index_name, client.address) as process:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "not allocated" in line)
        assert 'filters [box:"hot"]' in line
        stopped(process, number)
    assert not (run.path / "load").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_hanging_request_and_settings_are_restored(
    client: Client, index_name: str, run: Run, number: signal.Signals
) -> None:
    ended, asked = Event(), []

    def hang(request: Request) -> None:
        if "/_bulk" in request.path and b'"_id":"d0"' not in request.body:
            asked.append(request.path)
            ended.wait(3 * HANGING_S)

    # A stop request ends a request that takes longer than this.
    impatient = f"from sparse_ingest.cluster import waiting; waiting._SLOW_S = 0.5; {PROGRAM}"
    with secure_proxy(client.address, check=hang) as proxy, loading(run, index_name, proxy.url, impatient) as process:
        until(lambda: list((run.path / "load").glob("*/*/journal.jsonl")) and asked)
        assert settings_of(client, index_name)[0] == "-1"
        printed = stopped(process, number)
        ended.set()
    if number != signal.SIGINT:
        assert "has not answered POST" in printed
    there = indexes.find_index(client, index_name)
    assert there is not None
    assert settings_of(client, index_name)[0] is None
    assert stamped(client, index_name).load == "loading"
    assert there.aliases == {}
    assert list(open_journal(run, client.cluster_uuid, there.uuid).finished()) == [0]
    report = into(client, index_name, run)
    assert (report.loaded_shards, report.acknowledged) == (2, 60)
    assert ids_in(client, index_name) == set(MANY)


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("search", signal.SIGTERM),
        ("queries", signal.SIGINT),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("search", signal.SIGINT),
                ("queries", signal.SIGTERM),
                ("verify", signal.SIGTERM),
                ("verify", signal.SIGINT),
            )
        ),
    ],
)
def test_a_signal_ends_a_command_whose_requests_hang(
    command: str, client: Client, index_name: str, tmp_path: Path, number: signal.Signals
) -> None:
    documents = {name: {"catch": weights["river"]} for name, weights in MANY.items()}
    run = make_run(tmp_path / "run", documents, model=str(write_table(tmp_path / "model")))
    into(client, index_name, run)
    queries = tmp_path / "queries.tsv"
    queries.write_text("".join(f"q{number}\tcatch\n" for number in range(20)))
    how = {
        "search": ("search", "catch"),
        "queries": ("search", "--queries", queries, "--concurrency", 4),
        "verify": ("verify", run.path),
    }
    ended, asked = Event(), Event()

    def hang(request: Request) -> None:
        if "search" in request.path:
            asked.set()
            ended.wait(3 * HANGING_S)

    with secure_proxy(client.address, check=hang) as proxy:
        with running(*how[command], "--index", index_name, "--url", proxy.url) as process:
            assert asked.wait(HANGING_S)
            stopped(process, number)
        ended.set()


def test_a_load_under_nohup_survives_the_end_of_its_terminal(client: Client, index_name: str, run: Run) -> None:
    asked, sent = Event(), Event()

    def note(request: Request) -> None:
        if "/_bulk" in request.path:
            asked.set()
            sent.wait(HANGING_S)

    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); {PROGRAM}"
    with secure_proxy(client.address, check=note) as proxy:
        with loading(run, index_name, proxy.url, program=ignoring) as process:
            assert asked.wait(HANGING_S)
            process.send_signal(signal.SIGHUP)
            sent.set()
            _, printed = process.communicate(timeout=HANGING_S)
    assert process.returncode == 0, printed
    assert ids_in(client, index_name) == set(MANY)


@pytest.mark.parametrize(
    "streams",
    [
        "<&- | true", ">/dev/full 2>/dev/full",
        *(pytest.param(some, marks=pytest.mark.slow) for some in (
            "<&- >&- 2>&-", "2>&-", ">&-", "<&-", ">&- 2>&-", "2>/dev/full"
        )),
    ],
)  # fmt: skip
def test_a_load_with_closed_or_full_streams_finishes(streams: str, client: Client, index_name: str, run: Run) -> None:
    command = f'{sys.executable} -c "$0" load {run.path} --index {index_name} --url {client.address}'
    shell = ["bash", "-c", f"{command} {streams}; exit ${{PIPESTATUS[0]}}", PROGRAM]
    ended = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert (ended.returncode, "Traceback" in ended.stderr) == (0, False), ended.stderr
    assert ids_in(client, index_name) == set(MANY)
