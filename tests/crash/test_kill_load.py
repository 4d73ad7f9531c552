"""Kill the loader or the server at any instant and start it again: the index has every document once."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.killed_load import KilledLoad
from support.large_vocabularies import USED, ids_of, make_large_run, random_documents
from support.runs import make_run
from support.servers import environment, random_free_port, server_home, start_program

from sparse_ingest.cluster import indexes
from sparse_ingest.cluster.client import Client, Connection, connect
from sparse_ingest.cluster.journal import Journal
from sparse_ingest.cluster.sending import Retries
from sparse_ingest.cluster.token_map import TokenMap
from sparse_ingest.loading.load import LoadReport, load, restore_settings
from sparse_ingest.loading.publish import publish
from sparse_ingest.local_server import process
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.runs.run import Run
from sparse_ingest.verification.verify import verify

pytestmark = pytest.mark.both_products(quick=False)

SHARD_ROWS = 20
DOCUMENTS = {f"d{number}": {"river": 1 + number / 512, "stone": 2 / (number + 1)} for number in range(240)}
FEW = {doc_id: DOCUMENTS[doc_id] for doc_id in list(DOCUMENTS)[: 2 * SHARD_ROWS]}
FAST = Retries(base_s=0.01, cap_s=0.1)


def finish(run: Run, index: str, url: str) -> LoadReport:
    return load(run.path, index=index, pipeline=Pipeline(), connection=Connection(url), retries=FAST)


def check_complete(run: Run, index: str, client: Client, documents: int) -> None:
    """Check that the index has every document once, bit for bit, and nothing that only loads need."""
    report = verify(run.path, index=index, connection=Connection(client.address), sample=None)
    assert report.ok, report
    assert (report.index_documents, report.checked_documents) == (documents, documents)
    there = indexes.find_index(client, index)
    assert there is not None and there.stamp is not None
    assert (there.setting("refresh_interval"), there.setting("number_of_replicas")) == (None, "1")
    assert (there.stamp.settings, there.stamp.load) == ({}, "done")
    assert [alias for alias in there.aliases if alias not in there.serving_aliases] == []


def journal_lines(run: Run) -> list[int]:
    return [len(Journal(path.parent).finished()) for path in run.path.glob("load/*/*/journal.jsonl")]


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 51))])
def test_killed_at_random_requests(client: Client, index_name: str, tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    run = make_run(tmp_path / "run", DOCUMENTS, shard_rows=SHARD_ROWS)
    killed = 0
    for _ in range(2):
        moment = f"during:{chance.randrange(2, 30)}:{chance.uniform(0, 0.004):.6f}"
        code, notes = KilledLoad(moment, tmp_path, run.path, "--index", index_name, "--url", client.address).ended()
        assert code in (-signal.SIGKILL, 0), notes
        killed += code != 0
    assert killed
    report = finish(run, index_name, client.address)
    assert (report.acknowledged, report.refused, report.shards) == (len(DOCUMENTS), 0, 12)
    check_complete(run, index_name, client, len(DOCUMENTS))


# The fast tests kill while settings are half changed; the slow ones after every other change.
@pytest.mark.parametrize("numbers", [(3, 7), pytest.param((1, 2, 4, 5, 6, 8, 9), marks=pytest.mark.slow)])
def test_killed_after_a_change_the_next_load_finishes_and_restores_the_settings(
    client: Client, index_name: str, tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    run = make_run(tmp_path / "undisturbed", FEW, shard_rows=SHARD_ROWS)
    at = ("--url", client.address)
    code, notes = KilledLoad("never", tmp_path, run.path, "--index", f"{index_name}-undisturbed", *at).ended()
    changes = [line for line in notes.splitlines() if line.startswith(("PUT /", "POST /"))]
    assert code == 0
    # Create the index, store the old settings, change them, send two shards, refresh, restore the settings, store that
    # they are restored, remove the alias.
    assert [change.rpartition("/")[2] for change in changes] == [
        f"{index_name}-undisturbed", "_mapping", "_settings", "_bulk", "_bulk", "_refresh",
        "_settings", "_mapping", "_aliases",
    ]  # fmt: skip

    def killed_after(number: int) -> None:
        index = f"{index_name}-{number}"
        mine = make_run(tmp_path / str(number), FEW, shard_rows=SHARD_ROWS)
        code, notes = KilledLoad(f"after:{number}", tmp_path, mine.path, "--index", index, *at).ended()
        assert code == -signal.SIGKILL, (number, notes)
        if number % 2:
            # As from another machine, which has no run and no journal.
            restore_settings(index, connection=Connection(client.address))
            there = indexes.find_index(client, index)
            assert there is not None
            assert (there.setting("refresh_interval"), there.setting("number_of_replicas")) == (None, "1")
        finish(mine, index, client.address)
        check_complete(mine, index, client, len(FEW))

    with ThreadPoolExecutor(3) as several:
        list(several.map(killed_after, numbers))


# The changes after the load: refreshes for verification and counts, records in both indexes, the swap, the deletion.
@pytest.mark.parametrize("numbers", [(14,), pytest.param((8, 9, 10, 11, 12, 13, 15, 16), marks=pytest.mark.slow)])
def test_killed_between_two_steps_of_a_swap_the_alias_serves_one_complete_index(
    client: Client, index_name: str, tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    old, new = (make_run(tmp_path / name, FEW, shard_rows=SHARD_ROWS, model=name) for name in ("old", "new"))
    old_id, new_id = (run.manifest.run_id[:8] for run in (old, new))

    def serve(run: Run, alias: str) -> None:
        publish(run.path, alias=alias, pipeline=Pipeline(), connection=Connection(client.address), drop_old=False)

    def serving(alias: str) -> list[str]:
        return list(client.call("GET", f"/_alias/{alias}"))

    def killed_after(number: int) -> None:
        alias = f"{index_name}-{number}"
        mine = make_run(tmp_path / f"new-{number}", FEW, shard_rows=SHARD_ROWS, model="new")
        previous = make_run(tmp_path / f"old-{number}", FEW, shard_rows=SHARD_ROWS, model="old")
        serve(previous, alias)
        arguments = (mine.path, "--alias", alias, "--drop-old", "--url", client.address)
        code, notes = KilledLoad(f"after:{number}", tmp_path, *arguments).ended()
        assert code == -signal.SIGKILL, notes
        [served] = serving(alias)
        assert served in (f"{alias}-{old_id}", f"{alias}-{new_id}")
        # The served index is complete.
        assert client.call("GET", f"/{alias}/_count")["count"] == len(FEW)
        publish(mine.path, alias=alias, pipeline=Pipeline(), connection=Connection(client.address), drop_old=True)
        assert serving(alias) == [f"{alias}-{new_id}"]
        assert indexes.find_index(client, f"{alias}-{old_id}") is None
        check_complete(mine, f"{alias}-{new_id}", client, len(FEW))

    with ThreadPoolExecutor(3) as several:
        list(several.map(killed_after, numbers))


# After the index is created, or the first documents are sent.
@pytest.mark.opensearch_only
@pytest.mark.parametrize("since", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("number", [4, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 2, 3, 5, 6, 7))])
def test_a_killed_load_that_numbers_tokens_continues_with_the_same_numbers(
    client: Client, index_name: str, tmp_path: Path, number: int, since: bool
) -> None:
    documents = random_documents(40, USED)
    few = dict(list(documents.items())[:3]) if since else documents
    run, old = make_large_run(tmp_path / "run", documents), make_large_run(tmp_path / "old", few)
    how: dict[str, Any] = {"index": index_name, "kind": "sparse_vector", "connection": Connection(client.address)}
    arguments: list[object] = ["--index", index_name, "--kind", "sparse_vector", "--url", client.address]
    if since:
        load(old.path, **how)
        how["since"] = old.path
        arguments += ["--since", old.path]
    code, notes = KilledLoad(f"after:{number}", tmp_path, run.path, *arguments).ended()
    assert code == -signal.SIGKILL, notes
    load(run.path, retries=FAST, **how)
    there = indexes.find_index(client, index_name)
    assert there is not None and there.stamp is not None
    first, more = ids_of(few), set(ids_of(documents)) - set(ids_of(few))
    assert there.stamp.token_map == TokenMap(np.array(first), sorted(more)).as_meta()
    assert bool(more) == since
    check_complete(run, index_name, client, len(documents))


class OwnServer:
    """A server of this test alone, which can be killed and started again on the same data folder."""

    def __init__(self, home: Path) -> None:
        self.home, self.port = home, random_free_port()
        self.folder = home / "chosen"
        self.folder.mkdir()
        self.folder.chmod(0o755)
        self.start()

    def start(self) -> None:
        shown, notes = start_program(self.home, self.port, self.folder).communicate(timeout=150)
        assert shown, notes
        answer = json.loads(shown)
        self.pid, self.url = int(answer["pid"]), str(answer["url"])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        # The sockets of a dead process may stay open for a moment.
        while process.free_port(self.port) != self.port:
            time.sleep(0.01)


@contextmanager
def own_server() -> Iterator[OwnServer]:
    with server_home() as home:
        server = OwnServer(home)
        try:
            yield server
        finally:
            with environment(SPARSE_INGEST_HOME=str(home)):
                process.stop(server.port)


@pytest.fixture(scope="module")
def server() -> Iterator[OwnServer]:
    with own_server() as server:
        yield server


@pytest.mark.slow  # 30 s each
@pytest.mark.parametrize("seed", range(1, 51))
def test_the_server_is_killed_and_started_again(server: OwnServer, tmp_path: Path, seed: int) -> None:
    """In half of the runs the loader is killed too. Shards in the journal must be in the index.

    In a third of the runs the server confirms writes before they are on disk.
    """
    chance = random.Random(seed)
    index = f"sparse-ingest-test-{seed}"
    run = make_run(tmp_path / "run", DOCUMENTS, shard_rows=SHARD_ROWS)
    moment = f"during:{chance.randrange(4, 25)}:0" if chance.random() < 0.5 else "never"
    early = ["--async-translog"] if seed % 3 == 0 else []
    loader = KilledLoad(moment, tmp_path, run.path, "--index", index, "--url", server.url, *early)
    time.sleep(chance.uniform(0, 1))
    server.kill()
    server.start()
    code, notes = loader.ended()
    assert code in (0, 1, -signal.SIGKILL), notes
    assert code != 1 or "Traceback" not in notes, notes
    with closing(connect(Connection(server.url))) as client:
        finish(run, index, server.url)
        check_complete(run, index, client, len(DOCUMENTS))
        assert journal_lines(run) == [12]
        client.call("DELETE", f"/{index}")
