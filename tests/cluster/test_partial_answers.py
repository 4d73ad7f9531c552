"""Partial search responses (a lost shard, a timeout) are an error, or with --allow-partial a warning."""

from __future__ import annotations

import http.client
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from support.forked import command
from support.plans import made_plan
from support.runs import make_run
from support.servers import Running, environment
from support.serving import AnsweringHandler, serving

import sparse_ingest as si
from sparse_ingest.cluster import indexes, postings
from sparse_ingest.cluster.client import Client, Connection, PartialAnswerError, connect
from sparse_ingest.cluster.reading import StoredReader
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.loading.load import load
from sparse_ingest.loading.options import LoadOptions
from sparse_ingest.local_server import process
from sparse_ingest.pipeline import IndexSettings, Pipeline
from sparse_ingest.planning import engines
from sparse_ingest.runs.run import Run

INDEX = "sparse-ingest-test-partial"
# Slow enough for the server, which looks at a clock that ticks every 200 ms. It allocates nothing: with a heap full of
# garbage the server refuses requests (circuit_breaking_exception) until it is collected.
SLOW = "double sum = 0; for (int i = 0; i < 200000; i++) { sum += Math.sin(i) } return sum < 1e9"
Change = Callable[[dict[str, Any]], None]


class Loaded(NamedTuple):
    run: Run
    queries: Path
    qrels: Path
    client: Client

    def commands(self, url: str | None = None) -> dict[str, list[object]]:
        target: list[object] = ["--index", INDEX, "--url", url or self.client.address]
        queries: list[object] = ["--queries", self.queries]
        return {
            "search": ["search", "w1 w2", *target],
            "hybrid": ["search", "w1 w2", "--hybrid", *target],
            "filter": ["search", "w1 w2", "--filter", '{"exists": {"field": "text"}}', *target],
            "many": ["search", *queries, *target],
            "many at once": ["search", *queries, "--concurrency", 4, *target],
            "evaluate": ["evaluate", *queries, "--qrels", self.qrels, *target],
            "plan": ["plan", self.run.path, *queries, "--loss", 0.5, "--sample", 10, *target],
            "verify": ["verify", self.run.path, *target],
            "verify all": ["verify", self.run.path, "--all", *target],
            "show": ["index", "show", *target],
        }


WITH_OPTION = ["search", "hybrid", "filter", "many", "many at once", "evaluate", "plan"]
COMMANDS = [*WITH_OPTION, "verify", "verify all", "show"]


@pytest.fixture(scope="module")
def loaded(local_server: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    """An index of two shards, with its run, queries and qrels."""
    folder = tmp_path_factory.mktemp("partial")
    run, queries, qrels = made_plan(folder, 300)
    (folder / "queries.tsv").write_text("".join(f"{query.id}\t{query.text}\n" for query in queries))
    judged = (f"{query_id}\t{doc_id}\t1\n" for query_id, found in qrels.items() for doc_id in found)
    (folder / "qrels.tsv").write_text("".join(judged))
    with closing(connect(Connection(local_server.url))) as client:
        load(run, index=INDEX, pipeline=two_shards(folder), connection=Connection(client.address), merge=False)
        yield Loaded(run, folder / "queries.tsv", folder / "qrels.tsv", client)
        client.call("DELETE", f"/{INDEX}")


def two_shards(folder: Path) -> Pipeline:
    properties = {"sparse": {"type": "rank_features"}, "title": {"type": "text"}, "text": {"type": "text"}}
    body = {"settings": {"number_of_shards": 2, "number_of_replicas": 0}, "mappings": {"properties": properties}}
    (folder / "body.json").write_text(json.dumps(body))
    return Pipeline(index=IndexSettings(body=str(folder / "body.json")))


@pytest.fixture(scope="module")
def red(loaded: Loaded, local_server: Running) -> Loaded:
    """The same index after the files of one shard were deleted."""
    client, there = loaded.client, indexes.need_index(loaded.client, INDEX, "")
    client.call("POST", f"/{INDEX}/_close")
    [lost] = local_server.data.glob(f"sparse-ingest-opensearch/nodes/0/indices/{there.uuid}/0/index")
    shutil.rmtree(lost)
    client.call("POST", f"/{INDEX}/_open", params={"wait_for_active_shards": "0"})
    while not (states := {row["state"] for row in client.call("GET", f"/_cat/shards/{INDEX}?format=json")}) == {
        "STARTED", "UNASSIGNED"
    }:  # fmt: skip
        assert states <= {"STARTED", "UNASSIGNED", "INITIALIZING"}
        time.sleep(0.1)
    return loaded


# Tests that need both shards come before those with the fixture `red`, which deletes one.


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda part: part.update(timed_out=True), "ended early"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (lambda part: part.update(terminated_early=True), "ended early"),
                (lambda part: part["_shards"].update(successful=1), "1 of 2 shards"),
            )
        ),
        (lambda part: part["_shards"].update(failed=1, failures=[{"reason": {"type": "t", "reason": "r"}}]), "(t: r)"),
    ],
    ids=["timed out", "terminated", "skipped", "failed"],
)
def test_a_response_that_is_marked_partial_is_an_error(loaded: Loaded, name: str, change: Change, message: str) -> None:
    with changing(loaded.client.address, change) as url:
        answer = command(*loaded.commands(url)[name])
    assert answer.code == 1, answer
    assert message in answer.err and "gave a partial answer" in answer.err


def test_a_partial_count_is_an_error_of_load(loaded: Loaded, index_name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with changing(loaded.client.address, lambda part: part.update(timed_out=True)) as url:
        with pytest.raises(PartialAnswerError, match="ended early"):
            load(run, index=INDEX + "-count", connection=Connection(url), options=LoadOptions(merge=False))
    loaded.client.call("DELETE", f"/{INDEX}-count")


def test_a_search_that_hits_the_server_timeout_is_partial(loaded: Loaded) -> None:
    client, setting = loaded.client, "search.default_search_timeout"
    slow = {"script": {"script": SLOW}}
    client.call("PUT", "/_cluster/settings", {"transient": {setting: "1ms"}})
    try:
        found = command(*loaded.commands()["search"], "--filter", json.dumps(slow))
        assert found.code == 1 and "ended early, by a timeout" in found.err
        allowed = command(*loaded.commands()["search"], "--filter", json.dumps(slow), "--allow-partial")
        assert allowed.code == 0 and allowed.err.count("The results are incomplete") == 1
        # `_count` does not report a timeout.
        with pytest.raises(PartialAnswerError):
            indexes.count_matching(client, f"/{INDEX}", slow)
    finally:
        client.call("PUT", "/_cluster/settings", {"transient": {setting: None}})


@pytest.mark.parametrize("name", COMMANDS)
def test_a_lost_shard_is_an_error(red: Loaded, name: str) -> None:
    answer = command(*red.commands()[name])
    assert (answer.code, answer.out) == (1, "")
    assert f"1 of 2 shards of {INDEX!r} failed (no node has started them). Wait until" in answer.err
    assert ("or pass --allow-partial" in answer.err) == (name in WITH_OPTION)
    assert "missing:" not in answer.err


@pytest.mark.parametrize("name", WITH_OPTION)
def test_with_allow_partial_a_lost_shard_is_one_warning(
    red: Loaded, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_setting = {name: {key: values[:1] for key, values in tried.items()} for name, tried in engines._TRIED.items()}
    monkeypatch.setattr(engines, "_TRIED", one_setting)
    answer = command(*red.commands()[name], "--allow-partial")
    assert answer.code in (0, 1) and answer.out, answer
    assert answer.err.count("The results are incomplete: 1 of 2 shards") == 1


def test_allow_partial_overrides_the_cluster_default(red: Loaded) -> None:
    setting = "search.default_allow_partial_results"
    red.client.call("PUT", "/_cluster/settings", {"transient": {setting: "false"}})
    try:
        refused = command(*red.commands()["evaluate"])
        assert refused.code == 1 and "missing shards" in refused.err
        assert command(*red.commands()["evaluate"], "--allow-partial").code == 0
    finally:
        red.client.call("PUT", "/_cluster/settings", {"transient": {setting: None}})


def test_the_python_api_has_allow_partial(red: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    with si.open_index(INDEX, url=red.client.address) as index:
        with pytest.raises(ClusterError, match="1 of 2 shards"):
            index.search("w1")
        with pytest.raises(ClusterError, match="1 of 2 shards"):
            list(index.rank([si.Query("q", "w1")]))
        caplog.set_level(logging.WARNING, "sparse_ingest")
        assert index.search("w1", allow_partial=True)
        assert sum("incomplete" in record.getMessage() for record in caplog.records) == 1
    with pytest.raises(UsageError, match="allow_partial needs a server"):
        si.open_run(red.run.path).search("w1", allow_partial=True)


def test_readers_of_weights_and_counts_refuse_partial_responses(red: Loaded) -> None:
    client, there = red.client, indexes.need_index(red.client, INDEX, "")
    reader = StoredReader(client, INDEX, "sparse", 1024)
    for ask in (
        lambda: reader.weights({"d1": ["w1"]}),
        lambda: reader.sums(["d1"], ["w1"]),
        # A search in a point in time that lacks a shard reports that all shards answered.
        lambda: postings.scan(client, there).__enter__(),
        lambda: postings.count_known(client, INDEX, ["d1"]),
        lambda: postings.document_frequencies(client, INDEX, "sparse", ["w1"]),
        lambda: indexes.count_documents(client, there),
    ):
        with pytest.raises(PartialAnswerError, match="1 of 2 shards"):
            ask()  # type: ignore[no-untyped-call]


def test_the_status_of_a_local_server_omits_a_partial_count(red: Loaded, local_server: Running) -> None:
    with environment(SPARSE_INGEST_HOME=str(local_server.home)):
        [instance] = (one for one in process.instances() if one.port == local_server.port)
        assert (process.health(instance), process.document_count(instance)) == ("red", None)


@contextmanager
def changing(target: str, change: Change) -> Iterator[str]:
    """Yield the address of a proxy that changes the responses to searches and counts."""

    class Handler(AnsweringHandler):
        def do_GET(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with closing(http.client.HTTPConnection(urlsplit(target).netloc, timeout=60)) as server:
                kept = {name: value for name, value in self.headers.items() if name.lower() == "content-type"}
                server.request(self.command, self.path, sent, kept)
                answer = server.getresponse()
                found = json.loads(answer.read() or b"{}")
            if self.path.partition("?")[0].endswith(("/_search", "/_msearch", "/_count")):
                for part in found.get("responses", [found]):
                    if "_shards" in part:
                        change(part)
            self.answer(answer.status, found)

        do_POST = do_PUT = do_DELETE = do_GET

    with serving(server := ThreadingHTTPServer(("127.0.0.1", 0), Handler)):
        yield f"http://127.0.0.1:{server.server_address[1]}"
