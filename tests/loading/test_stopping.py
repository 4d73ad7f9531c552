"""A load that waits says for what, and SIGTERM and Ctrl-C end it: exit code 130, journal and settings are right."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import pytest
from support.loads import MANY, ids_in, into, settings_of, stamped
from support.runs import make_run
from support.secure_proxy import Request, secure_proxy

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.journal import open_journal
from sparse_ingest.runs.run import Run

# A shell lets what it runs in the background ignore SIGINT.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from sparse_ingest.cli.main import main; main()"
)
SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return make_run(tmp_path / "run", MANY, shard_rows=20)


@contextmanager
def loading(run: Run, index: str, url: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, "load", str(run.path), "--index", index, "--url", url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def stopped(process: subprocess.Popen[str], number: signal.Signals, within_s: float) -> str:
    """What a load prints after a signal; its exit code is checked."""
    started = time.monotonic()
    process.send_signal(number)
    _, printed = process.communicate(timeout=30)
    assert time.monotonic() - started < within_s
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    return printed


def until(there: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_primary_that_no_node_takes_is_said_and_the_wait_ends_on_a_signal(
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
        stopped(process, number, within_s=5)
    assert not (run.path / "load").exists()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_request_without_an_answer_ends_on_a_signal_and_settings_are_put_back(
    client: Client, index_name: str, run: Run, number: signal.Signals
) -> None:
    ended, asked = Event(), []

    def hang(request: Request) -> None:
        if "/_bulk" in request.path:
            asked.append(request.path)
            if len(asked) > 1:
                ended.wait(60)

    with secure_proxy(client.address, check=hang) as proxy, loading(run, index_name, proxy.url) as process:
        until(lambda: list((run.path / "load").glob("*/*/journal.jsonl")) and len(asked) > 1)
        assert settings_of(client, index_name)[0] == "-1"
        printed = stopped(process, number, within_s=10)
        ended.set()
    if number == signal.SIGTERM:
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
