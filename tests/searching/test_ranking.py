"""Ranking many queries in an index: order, concurrency, and errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from support.deadlines import HANGING_S, until
from support.indexes import assert_same_hits, filled, random_documents, random_queries
from support.runs import make_run

from sparse_ingest.cluster.client import Client
from sparse_ingest.cluster.dialects import OpenSearchDialect
from sparse_ingest.cluster.engines import engines_of
from sparse_ingest.cluster.search_bodies import Engine
from sparse_ingest.errors import ClusterError, UsageError
from sparse_ingest.records import Query
from sparse_ingest.runs.run import Run
from sparse_ingest.searching.index_search import rank_index, rank_words, search_index, search_words
from sparse_ingest.searching.run_search import search_run

pytestmark = pytest.mark.both_products


@pytest.fixture(scope="module")
def searched(client: Client, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str]]:
    run = make_run(tmp_path_factory.mktemp("made") / "run", random_documents(80), shard_rows=100)
    with filled(client, run) as index:
        yield run, index


@pytest.mark.parametrize("concurrency", [1, 4])
def test_rankings_come_in_the_order_of_the_queries_with_exact_scores(
    client: Client, searched: tuple[Run, str], concurrency: int
) -> None:
    run, index = searched
    queries = [(f"q{place}", weights) for place, weights in enumerate(random_queries(30))]
    ranked = list(rank_index(client, index, iter(queries), Engine(), size=10, concurrency=concurrency))
    assert [one.query_id for one in ranked] == [query_id for query_id, _ in queries]
    for one, (_, weights) in zip(ranked, queries, strict=True):
        exact = [(hit.doc_id, hit.score) for hit in search_run(run, weights, size=10, stored=True)]
        assert_same_hits(list(zip(one.doc_ids, one.scores, strict=True)), exact, 10)
        assert 0 < one.latency_s < 60
        assert one.took_ms is not None and one.took_ms <= one.latency_s * 1000


def test_ranking_scores_match_search_above_64_with_every_engine(client: Client, searched: tuple[Run, str]) -> None:
    weights = {"word1": 300.0, "word2": 2.0}
    for engine in map(Engine, engines_of("rank_features", client.dialect.product)):
        [ranked] = rank_index(client, searched[1], [("a", weights)], engine, size=9)
        hits = search_index(client, searched[1], weights, size=9, engine=engine)
        assert (ranked.doc_ids, ranked.scores) == ([hit.doc_id for hit in hits], [hit.score for hit in hits])


def test_a_filter_applies_to_every_query(client: Client, searched: tuple[Run, str]) -> None:
    everything, nothing = {"match_all": {}}, {"match_none": {}}
    queries = [("a", {"word1": 1.0}), ("b", {"word2": 1.0})]
    assert all(one.doc_ids for one in rank_index(client, searched[1], queries, Engine(), size=5, filter=everything))
    assert not any(one.doc_ids for one in rank_index(client, searched[1], queries, Engine(), size=5, filter=nothing))


def test_bm25_ranking_matches_search(client: Client, searched: tuple[Run, str]) -> None:
    queries = [Query("a", "doc 5"), Query("b", "nowhere")]
    first, second = rank_words(client, searched[1], queries, field="sparse", size=5, concurrency=2)
    assert first.doc_ids == [hit.doc_id for hit in search_words(client, searched[1], "doc 5", size=5)] != []
    assert second.doc_ids == []


def test_tokens_omitted_from_many_queries_are_reported_once(
    client: Client, searched: tuple[Run, str], caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(keys={"one": "word1"})
    queries = [(str(place), {"one": 1.0, f"unknown{place}": 2.0}) for place in range(25)]
    ranked = list(rank_index(client, searched[1], queries, engine, size=5, concurrency=3))
    [alone] = rank_index(client, searched[1], [("a", {"word1": 1.0})], Engine(), size=5)
    assert all(one.scores == alone.scores for one in ranked)
    [said] = [record.getMessage() for record in caplog.records]
    assert "vocabulary of the documents lacks some tokens" in said
    assert "'unknown0'" in said and said.endswith("and 5 more.")


class ManyClauses(Client):
    """A client of a cluster with max_clause_count 4,096; records requests."""

    def __init__(self) -> None:
        self.address, self.dialect = "here", OpenSearchDialect(OpenSearchDialect.newest_tried)
        self.asked: list[Any] = []

    def call(self, method: str, path: str, body: Any = None, **settings: Any) -> Any:
        if path == "/_cluster/settings":
            return {"defaults": {"indices.query.bool.max_clause_count": "4096"}}
        self.asked.append(body)
        return {"took": 1, "hits": {"hits": []}}


def test_max_clause_count_limits_the_queries_of_a_request_including_the_filter() -> None:
    roomy: Any = ManyClauses()
    weights = {str(number): 1.0 for number in range(1000)}
    filter = {"bool": {"should": [{"term": {"tag": str(number)}} for number in range(100)]}}
    engine = Engine(mappings={"properties": {"tag": {"type": "keyword"}}})
    list(rank_index(roomy, "index", [("a", weights)], engine, size=1, filter=filter))
    assert len(roomy.asked) == 1


class Holding(Client):
    """A client that holds requests with the token `held` until `released`; counts all and those in flight."""

    def __init__(self, client: Client) -> None:
        self._client, self.dialect = client, client.dialect
        self._lock, self.released = threading.Lock(), threading.Event()
        self.now = self.most = self.asked = 0
        self.address = client.address

    def call(self, *arguments: Any, **settings: Any) -> Any:
        with self._lock:
            self.asked += 1
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            assert "held" not in str((arguments, settings)) or self.released.wait(HANGING_S)
            return self._client.call(*arguments, **settings)
        finally:
            with self._lock:
                self.now -= 1


def test_concurrency_limits_requests_in_flight_and_few_queries_are_read_ahead(
    client: Client, searched: tuple[Run, str]
) -> None:
    holding: Any = Holding(client)
    before = set(threading.enumerate())
    taken = 0

    def queries() -> Iterator[tuple[str, dict[str, float]]]:
        nonlocal taken
        for number in range(1000):
            taken += 1
            yield str(number), {"word1" if number < 12 else "held": 1.0}

    ranked = rank_index(holding, searched[1], queries(), Engine(), size=1, concurrency=3)
    for _ in range(12):
        next(ranked)
    until(lambda: holding.asked == 15)
    assert holding.most == 3
    assert 15 < taken <= 12 + 2 * 3
    ranked.close()  # type: ignore[attr-defined]
    holding.released.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(HANGING_S)
    assert holding.asked == 15


def test_the_first_refusal_ends_the_ranking_with_its_message(client: Client, searched: tuple[Run, str]) -> None:
    tokens = client.dialect.max_clauses(client.find) + 1
    queries = [("a", {"word1": 1.0}), ("b", {str(number): 1.0 for number in range(tokens)})]
    ranked = rank_index(client, searched[1], queries, Engine(), size=1, concurrency=2)
    with pytest.raises(UsageError, match=f"{tokens} tokens"):
        list(ranked)
    with pytest.raises(ClusterError, match="No index or alias"):
        list(rank_index(client, f"{searched[1]}-gone", queries[:1], Engine(), size=1))
