"""Ask an index: one query for explained hits, or many queries for rankings.

In: query weights, an `Engine`. Out: hits with the server's own explanation of each score, or rankings without the
documents. Not covered: sending the request (asking.py), text to query weights (query.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from sparse_ingest.cluster.reading import explained_terms
from sparse_ingest.cluster.requests import Engine, bm25_body, hybrid_body
from sparse_ingest.queries.weight_table import QueryWeights, to_float32
from sparse_ingest.searching.asking import Asker, send
from sparse_ingest.searching.hits import Hit, Ranked, TermShare, heaviest_first
from sparse_ingest.searching.pipelines import DEFAULT_FIELD
from sparse_ingest.searching.query import keyed, tell_of_lost

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client
    from sparse_ingest.records import Query

Q = TypeVar("Q")


def search_index(
    client: Client,
    index: str,
    weights: QueryWeights,
    *,
    size: int,
    engine: Engine | None = None,
    filter: Mapping[str, Any] | None = None,
    collapse: str | None = None,
) -> list[Hit]:
    """Ask an index; the terms of each hit come from the server's own explanation of its score.

    Without an `engine` it is the exact search of the rank_features field `sparse`. A hit of the clusters of a
    sparse_vector field names the `top_n` heaviest tokens of the query only.
    `filter` is any query: documents that it does not match are no hits. `collapse` names a field: of the documents
    that share its value, as passages share their `parent`, only the best is a hit. Documents without the field count
    as sharing one.
    """
    engine = engine or Engine()
    asker = Asker(client, index, engine)
    answer, scale = asker.ask(weights, size=size, filter=filter, explain=True, collapse=collapse)
    asker.tell_of_lost()
    tokens = {key: token for token, key in engine.keys.items()} if engine.keys else {}
    hits = []
    for rank, found in enumerate(answer["hits"]["hits"], start=1):
        shares = (
            TermShare(
                tokens.get(term.token, term.token),
                to_float32(term.query_weight) * scale,
                to_float32(term.stored_weight),
                to_float32(term.contribution) * scale,
            )
            for term in explained_terms(found["_explanation"], engine.field)
        )
        # JSON prints the shortest decimal of a float32; the value behind it is what two scores are compared by.
        score = to_float32(found["_score"]) * scale
        hits.append(Hit(rank, score, found["_id"], found.get("_source", {}), heaviest_first(shares)))
    return hits


def search_hybrid(
    client: Client,
    index: str,
    text: str,
    weights: QueryWeights,
    *,
    size: int,
    engine: Engine | None = None,
    filter: Mapping[str, Any] | None = None,
) -> list[Hit]:
    """Ask an index with BM25 on title and text beside learned-sparse search.

    A score is what the packaged pipeline makes of both; hits have no terms.
    """
    engine = engine or Engine()
    if engine.keys is not None:
        lost: dict[str, None] = {}
        weights = keyed(weights, engine.keys, lost)
        tell_of_lost(lost)
    return _hits_without_terms(send(client, index, hybrid_body(text, weights, engine, size=size, filter=filter)))


def search_words(client: Client, index: str, text: str, *, field: str = DEFAULT_FIELD, size: int) -> list[Hit]:
    """Ask an index with BM25 on title and text, which learned-sparse search is compared with; hits have no terms."""
    return _hits_without_terms(send(client, index, bm25_body(text, field=field, size=size)))


def _hits_without_terms(answer: Any) -> list[Hit]:
    return [
        Hit(rank, found["_score"], found["_id"], found.get("_source", {}), [])
        for rank, found in enumerate(answer["hits"]["hits"], start=1)
    ]


def rank_index(
    client: Client,
    index: str,
    queries: Iterable[tuple[str, QueryWeights]],
    engine: Engine,
    *,
    size: int,
    filter: Mapping[str, Any] | None = None,
    collapse: str | None = None,
    concurrency: int = 1,
) -> Iterator[Ranked]:
    """Ask an index many queries, given with their ids; rankings come in the order of the queries.

    Neither documents nor explanations are fetched. `concurrency` requests are on their way at once. With `collapse`,
    the values of that field stand for the ids: each comes once, with its best document.
    """
    asker = Asker(client, index, engine)

    def ask(query: tuple[str, QueryWeights]) -> Ranked:
        began = time.perf_counter()
        answer, scale = asker.ask(query[1], size=size, filter=filter, collapse=collapse, source=False)
        return _ranked(query[0], answer, scale, time.perf_counter() - began, collapse)

    yield from _in_order(ask, queries, concurrency)
    asker.tell_of_lost()


def rank_words(
    client: Client,
    index: str,
    queries: Iterable[Query],
    *,
    field: str,
    size: int,
    collapse: str | None = None,
    concurrency: int = 1,
) -> Iterator[Ranked]:
    """Ask an index many queries with BM25 on title and text; `field` is its sparse field, the rest as `rank_index`."""
    also = {"_source": False} | ({"collapse": {"field": collapse}} if collapse else {})

    def ask(query: Query) -> Ranked:
        began = time.perf_counter()
        answer = send(client, index, {**bm25_body(query.text, field=field, size=size), **also})
        return _ranked(query.id, answer, 1.0, time.perf_counter() - began, collapse)

    return _in_order(ask, queries, concurrency)


def _ranked(query_id: str, answer: Any, scale: float, latency_s: float, collapse: str | None) -> Ranked:
    found = answer["hits"]["hits"]
    # Documents without the field count as sharing one; they keep their ids.
    ids = [hit.get("fields", {}).get(collapse, [hit["_id"]])[0] for hit in found]
    scores = [to_float32(hit["_score"]) * scale for hit in found]
    return Ranked(query_id, ids, scores, latency_s, float(answer["took"]))


def _in_order(ask: Callable[[Q], Ranked], queries: Iterable[Q], concurrency: int) -> Iterator[Ranked]:
    """Ask from `concurrency` threads; few queries are taken ahead, however many there are."""
    if concurrency == 1:
        yield from map(ask, queries)
        return
    waiting: deque[Future[Ranked]] = deque()
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for query in queries:
                waiting.append(pool.submit(ask, query))
                if len(waiting) >= 2 * concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
