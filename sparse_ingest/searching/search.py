"""The verb `search`: query weights to explained hits, or many queries to rankings.

Two things can be searched: an index, which is asked with the request that `query` prints, and a run folder, which is
searched exactly and needs no server. Both give the same `Hit`s; on the weights that an index keeps
(`search_run(..., stored=True)`) also the same scores, bit for bit. Not covered: text to query weights (query.py),
measures (evaluate.py).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sparse_ingest.cluster.limits import check_seismic
from sparse_ingest.cluster.requests import Engine, bm25_body, hybrid_body
from sparse_ingest.cluster.two_phase import check_two_phase
from sparse_ingest.errors import PipelineError
from sparse_ingest.pipeline import Pipeline
from sparse_ingest.queries.protocol import QueryWeights, to_float32
from sparse_ingest.searching.asking import Asker, send
from sparse_ingest.searching.hits import Hit, Ranked, TermShare, heaviest_first, snippet
from sparse_ingest.searching.query import DEFAULT_FIELD, keyed, tell_of_lost, token_keys
from sparse_ingest.searching.run_search import rank_run, search_run

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client
    from sparse_ingest.cluster.indexes import Index
    from sparse_ingest.records import Query

__all__ = [
    "Engine",
    "Hit",
    "Ranked",
    "TermShare",
    "engine_of",
    "rank_index",
    "rank_run",
    "rank_words",
    "search_hybrid",
    "search_index",
    "search_run",
    "search_words",
    "snippet",
]

# By kind of field; the first is its own, which is taken when nobody names one. The two-phase processor refuses
# sparse_vector fields, and their clusters never answer exactly.
ENGINES_OF: dict[str, tuple[Literal["exact", "two-phase", "seismic"], ...]] = {
    "rank_features": ("exact", "two-phase"),
    "sparse_vector": ("seismic",),
}
Asked = TypeVar("Asked")


def engine_of(pipeline: Pipeline, client: Client | None = None, index: str | None = None) -> Engine:
    """The engine that [query] and [index] of a pipeline name; with an index, its keys are checked against its stamp.

    Raises:
        PipelineError: the kind of field does not have the engine, or a setting of it is unknown.
        ClusterError: the index was loaded with another vocabulary.
    """
    settings, kind = pipeline.query, pipeline.index.kind
    check_two_phase(settings.two_phase)
    check_seismic(settings.seismic)
    engines = ENGINES_OF[kind]
    name = settings.engine or engines[0]
    if name not in engines:
        raise PipelineError(
            f"The engine {name} cannot search a {kind} field; {' and '.join(engines)} can. "
            "Leave out --engine (or engine in [query]), or load into a field of the other kind with load --kind."
        )
    found = None
    if client and index and kind == "sparse_vector":
        from sparse_ingest.cluster.indexes import find_index

        found = find_index(client, index)
    keys = token_keys(pipeline, found)
    ceiling = _ceiling(found, pipeline.index.field) if found else None
    return Engine(name, pipeline.index.field, kind, keys, settings.two_phase, settings.seismic, ceiling)


def _ceiling(index: Index, field: str) -> float | None:
    from sparse_ingest.cluster.mappings import field_mapping
    from sparse_ingest.cluster.seismic import parameters_of

    mapped = field_mapping(index.mappings, field)
    return float(parameters_of(mapped)["quantization_ceiling_search"]) if mapped else None


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
    from sparse_ingest.cluster.reading import explained_terms  # imports opensearchpy, which `search_run` does not need

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


def _in_order(ask: Callable[[Asked], Ranked], queries: Iterable[Asked], concurrency: int) -> Iterator[Ranked]:
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
