"""Shards made by tasks of a real Ray: errors, deaths, stop requests, frozen nodes; stubs stand for models."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from support import stub_shards
from support.checkpoints import make_masked_lm
from support.loads import MANY, broken_titles, ids_in, into, run_with_bad_titles
from support.reporters import Recorder
from support.run_contents import contents, lasting, write
from support.runs import DOCUMENTS, make_run
from support.stub_shards import ROWS, Stub, is_complete

from sparse_ingest.cluster.client import Client, Connection
from sparse_ingest.cluster.journal import open_journal
from sparse_ingest.encoding import duplicates
from sparse_ingest.encoding.encode import encode
from sparse_ingest.errors import CorpusError, Interrupted, MissingExtraError, RunError
from sparse_ingest.executors.options import RayOptions
from sparse_ingest.executors.tasks import tasks_of_ray
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.runs.ids import hash_id
from sparse_ingest.runs.run import Run
from sparse_ingest.verification.verify import verify

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
from support.ray_nodes import IMPORTS, Cluster, two_nodes  # noqa: E402

from sparse_ingest.executors import ray as executor  # noqa: E402
from sparse_ingest.executors.ray_cluster import connected  # noqa: E402

KEPT = "the folder keeps what is finished. Run the same command again to continue."
LASTING = ("manifest.json", "vocab.json", "complete.json", "shards/", "skipped/")


@pytest.fixture(scope="module")
def connection() -> Iterator[None]:
    """A Ray of this machine, as commands start it, that all tests share."""
    with connected(RayOptions(), Recorder()):
        yield


def made(folder: Path, shards: int, reporter: Recorder | None = None, **stub: Any) -> list[object]:
    """Make stub shards with two workers, and return the results."""
    results: list[object] = []
    groups = [range(first, min(first + 2, shards)) for first in range(0, shards, 2)]
    with tasks_of_ray(RayOptions(workers=2), does="makes", kept=KEPT, reporter=reporter or Recorder()) as run_on:
        run_on(stub_shards.build, (Stub(folder, **stub),), lambda: groups, done=results.append)
    return results


def built(folder: Path) -> list[str]:
    return (folder / "built").read_text().splitlines()


def test_each_group_is_made_once_by_a_process_that_keeps_its_maker(connection: None, tmp_path: Path) -> None:
    reporter = Recorder()
    results = made(tmp_path, 21, reporter, seconds=0.05)
    assert is_complete(tmp_path, 21)
    assert sorted(results) == [[first, min(first + 2, 21)] for first in range(0, 21, 2)]
    assert reporter.done == 21 * ROWS
    assert reporter.notes == ["Building a stub."]  # not one for each process
    processes = [line.split()[0] for line in built(tmp_path)]
    assert len(processes) == len(set(processes)) <= 2


@pytest.mark.parametrize("behavior, kind, message", [
    ("raise", CorpusError, "corpus.jsonl:3: bad."),
    ("extra", MissingExtraError, 'This needs the extra "fast"'),
    ("bug", RunError, r"ZeroDivisionError: a bug\); 2 shards from number 0 failed 2 times"),
])  # fmt: skip
def test_an_error_ends_the_run_with_its_message(
    connection: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behavior: str,
    kind: type[Exception],
    message: str,
) -> None:
    monkeypatch.setattr(executor, "MOST_FAILURES", 2)
    with pytest.raises(kind, match=message) as caught:
        made(tmp_path, 4, behavior=behavior, shard=1)
    assert type(caught.value) is kind


@pytest.mark.parametrize("behavior, note", [("store", None), ("kill_once", "A worker died. Another worker makes")])
def test_a_failed_store_and_a_killed_worker_are_tried_again(
    connection: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behavior: str, note: str | None
) -> None:
    monkeypatch.setattr(executor, "WAIT_S", 0.1)
    reporter = Recorder()
    results = made(tmp_path, 6, reporter, behavior=behavior, shard=1)
    assert is_complete(tmp_path, 6)
    assert len(results) == 3
    assert reporter.done == 6 * ROWS  # what was made again is not counted again
    assert any((note or "Building") in each for each in reporter.notes)


def test_a_stop_request_ends_tasks_after_a_window(connection: None, tmp_path: Path) -> None:
    reporter = Recorder(stop_at=ROWS)
    with pytest.raises(
        Interrupted, match="Stopped on request; the folder keeps what is finished. Run the same command"
    ):
        made(tmp_path, 1000, reporter, seconds=0.2)
    assert len(list(tmp_path.glob("shard-*"))) < 100


def test_encode_gives_the_same_bytes_as_one_process(
    connection: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "TASK_ROWS", 20)
    rows = [{"_id": str(row % 38), "text": f"the river stone {row} " * (row % 7)} for row in range(40)]
    corpus = write(tmp_path / "corpus.jsonl", rows)  # the last two ids are duplicates
    settings = {"model": str(make_masked_lm(tmp_path / "model")), "shard_rows": 10, "dtype": "float32", "device": "cpu"}
    settings["on_bad_document"] = "skip"
    alone = encode(corpus, tmp_path / "alone", **settings)
    run = encode(corpus, tmp_path / "ray", executor="ray", workers=1, **settings)
    assert run.report.skipped == 2
    assert lasting_bytes(run) == lasting_bytes(alone)
    assert lasting(run) == lasting(alone)
    corpus.write_text(corpus.read_text().replace("stone 27", "stone 72"))
    with pytest.raises(RunError, match="The corpus changed: rows 20 to 29 differ"):
        encode(corpus, tmp_path / "ray", executor="ray", workers=1, **settings)


def lasting_bytes(run: Run) -> dict[str, bytes]:
    """Return the files that have the same bytes on every machine."""
    return {name: content for name, content in contents(run.path).items() if name.startswith(LASTING)}


def test_tasks_hash_the_ids_of_all_shards(connection: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "TASK_ROWS", 8)
    run = make_run(tmp_path, MANY, shard_rows=3)
    with tasks_of_ray(RayOptions(workers=2), does="makes", kept=KEPT, reporter=Recorder()) as run_on:
        hashes = duplicates.hash_in_tasks(run_on, run)
    assert hashes is not None
    assert sorted(np.concatenate(list(hashes.ranges()))[:, 0].tolist()) == sorted(map(hash_id, MANY))


def test_a_load_in_tasks_journals_every_shard_and_every_refusal(
    connection: None, client: Client, index_name: str, tmp_path: Path
) -> None:
    run = run_with_bad_titles(tmp_path / "run", ("words",))
    reporter = Recorder()
    settings = {"pipeline": broken_titles(tmp_path, client), "executor": "ray", "workers": 2, "max_rate": 1e6}
    report = into(client, index_name, run, progress=reporter, **settings)
    assert (report.documents, report.acknowledged, report.refused, report.loaded_shards) == (5, 4, 1, 3)
    assert reporter.done == 5
    assert ids_in(client, index_name) == set(DOCUMENTS) - {"words"}
    journal = open_journal(run, client.cluster_uuid, report.uuid)
    assert [letter.doc_id for letter in journal.dead()] == ["words"]
    again = into(client, index_name, run, **settings)
    assert (again.loaded_shards, again.documents) == (0, 5)


@pytest.mark.parametrize("kind, sample", [
    ("sparse_vector", None), pytest.param("rank_features", None, marks=pytest.mark.slow),
    pytest.param("rank_features", 4, marks=pytest.mark.slow),
])  # fmt: skip
def test_verify_in_tasks_gives_the_report_of_one_process(
    connection: None, client: Client, index_name: str, tmp_path: Path, kind: str, sample: int | None
) -> None:
    run = make_run(tmp_path / "run", MANY, shard_rows=7)
    into(client, index_name, run, kind=kind, pipeline=Pipeline())
    at = Connection(client.address)
    for number in range(3, 60, 2):
        client.call("PUT", f"/{index_name}/_doc/d{number}", {})
    for number in range(0, 60, 20):
        client.call("DELETE", f"/{index_name}/_doc/d{number}")
    client.call("PUT", f"/{index_name}/_doc/stranger", {})
    alone = verify(run, index=index_name, connection=at, sample=sample)
    report = verify(run, index=index_name, connection=at, sample=sample, executor="ray", workers=2)
    assert replace(report, seconds=0) == replace(alone, seconds=0)
    assert (report.missing, report.extra) == (3, 1)
    assert sample or report.differing == 58  # two weights of each changed document


def test_a_stopped_verification_keeps_nothing(
    connection: None, client: Client, index_name: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run")
    into(client, index_name, run)
    how = {"index": index_name, "connection": Connection(client.address), "executor": "ray"}
    with pytest.raises(Interrupted, match="Stopped on request; what was compared is not kept. Run the same command"):
        verify(run, **how, progress=Recorder(stop_at=0))


@pytest.mark.slow
def test_a_killed_worker_of_a_load_doubles_and_loses_nothing(
    connection: None, client: Client, index_name: str, tmp_path: Path
) -> None:
    run, killed = make_run(tmp_path / "run", MANY), []

    def kill(done: int) -> None:
        if done > 10 and not killed:
            tree = psutil.Process().children(recursive=True)
            killed.append(next(one for one in tree if "make_group" in one.name()))
            killed[0].kill()

    reporter = Recorder(kill)
    report = into(client, index_name, run, progress=reporter, executor="ray", workers=2, max_rate=20)
    assert killed and "A worker died. Another worker sends its shards." in reporter.notes
    assert (report.documents, report.acknowledged, report.loaded_shards) == (60, 60, 20)
    assert verify(run, index=index_name, connection=Connection(client.address)).ok


def test_a_local_ray_listens_on_loopback_only(connection: None) -> None:
    addresses = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # an idle worker has ended
            found = process.net_connections("inet")
            addresses |= {(process.name(), at.laddr.ip) for at in found if at.status == psutil.CONN_LISTEN}
    assert {"gcs_server", "raylet"} <= {name for name, _ in addresses}
    assert {ip for _, ip in addresses} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.slow
def test_a_local_ray_ends_with_the_run_and_prints_nothing(tmp_path: Path) -> None:
    driver = drive(tmp_path, 40, 0.1)
    wait_for(lambda: list(tmp_path.glob("shard-*")), driver)
    processes = psutil.Process(driver.pid).children(recursive=True)
    output, notes = driver.communicate(timeout=60)
    assert (driver.returncode, output) == (0, ""), notes
    assert is_complete(tmp_path, 40)
    psutil.wait_procs(processes, timeout=10)
    assert not any(process.is_running() for process in processes)


@pytest.mark.slow
def test_a_group_that_always_kills_its_worker_ends_the_run(connection: None, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="A worker died; 2 shards from number 0 failed 5 times"):
        made(tmp_path, 4, behavior="kill", shard=1)


@pytest.mark.slow
def test_a_frozen_worker_gets_a_second_copy(connection: None, tmp_path: Path) -> None:
    began = time.monotonic()
    made(tmp_path, 8, behavior="freeze_once", shard=1)
    assert is_complete(tmp_path, 8)
    assert time.monotonic() - began < 90


@pytest.mark.slow
def test_fifteen_thousand_shards_take_a_minute_and_little_memory(tmp_path: Path) -> None:
    driver = drive(tmp_path, 15_259, 0)
    _, usage = os.wait4(driver.pid, 0)[1:]
    assert is_complete(tmp_path, 15_259)
    assert usage.ru_maxrss < 400_000  # KB


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    if ray.is_initialized():
        ray.shutdown()
    with two_nodes() as cluster:
        yield cluster


@pytest.mark.slow
def test_a_killed_node_loses_nothing(cluster: Cluster, tmp_path: Path) -> None:
    driver = started(tmp_path, 30, 0.5, cluster)
    cluster.process("raylet", cluster.nodes[1]).kill()
    _, notes = driver.communicate(timeout=90)
    assert driver.returncode == 0, notes
    assert is_complete(tmp_path, 30)


@pytest.mark.slow
def test_a_frozen_node_costs_less_than_90_s(cluster: Cluster, tmp_path: Path) -> None:
    driver = started(tmp_path, 30, 0.5, cluster)
    with frozen(cluster.process("raylet", cluster.nodes[1])):
        _, notes = driver.communicate(timeout=90)
    assert driver.returncode == 0, notes
    assert is_complete(tmp_path, 30)


@pytest.mark.slow
def test_a_killed_driver_ends_its_tasks_and_the_same_command_continues(cluster: Cluster, tmp_path: Path) -> None:
    driver = started(tmp_path, 30, 0.5, cluster)
    driver.kill()
    driver.communicate()
    time.sleep(3)
    before = len(list(tmp_path.glob("shard-*")))
    time.sleep(2)
    assert len(list(tmp_path.glob("shard-*"))) == before < 30
    driver = drive(tmp_path, 30, 0, cluster.address)
    assert driver.wait(60) == 0
    assert is_complete(tmp_path, 30)


@pytest.mark.slow
def test_a_killed_control_service_ends_the_run_with_a_message(cluster: Cluster, tmp_path: Path) -> None:
    driver = started(tmp_path, 1000, 0.5, cluster)
    cluster.process("gcs_server").kill()
    _, notes = driver.communicate(timeout=90)
    assert driver.returncode == 1
    assert "The control service of Ray (GCS) has not answered for 30 s." in notes


def drive(folder: Path, shards: int, seconds: float, address: str = "") -> subprocess.Popen[str]:
    """Start a driver; without an address, on a local Ray."""
    command = [sys.executable, "-m", "support.ray_driver", str(folder), str(shards), str(seconds)]
    return subprocess.Popen(
        [*command, *filter(None, [address])],
        env={**os.environ, **IMPORTS},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def started(folder: Path, shards: int, seconds: float, cluster: Cluster) -> subprocess.Popen[str]:
    """Start a driver on a cluster, and wait until both workers have made shards."""
    driver = drive(folder, shards, seconds, cluster.address)
    wait_for(lambda: len(list(folder.glob("shard-*"))) > 5 and len(built(folder)) == 2, driver)
    return driver


def wait_for(happened: Any, driver: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not happened():
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < until
        time.sleep(0.1)


@contextmanager
def frozen(process: psutil.Process) -> Iterator[None]:
    """Stop a process and its children in the block."""
    tree = [process, *process.children(recursive=True)]
    for one in tree:
        one.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for one in tree:
            with suppress(psutil.Error):
                one.send_signal(signal.SIGCONT)
