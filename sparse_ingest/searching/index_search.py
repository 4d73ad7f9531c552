"""Ask an index: one query for explained hits, or many queries for rankings.

In: query weights, an `Engine`. Out: hits with the server's own explanation of each score, or rankings without the
documents; what a server lacks or refuses becomes one message. A search pipeline that the index has by default is
skipped: it could change scores unseen. A cluster without the neural-search plugin is asked with rank_feature clauses,
which give the same scores.
Not covered: bodies (cluster/search_bodies.py), text to query weights (query.py).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

from sparse_ingest.cluster.client import Client, path_of
from sparse_ingest.cluster.indexes import max_clauses
from sparse_ingest.cluster.limits import MAX_CLAUSES, count_clauses, fit_weights
from sparse_ingest.cluster.query_fields import refuse_unmapped
from sparse_ingest.cluster.reading import explained_terms
from sparse_ingest.cluster.search_bodies import (
    BodyOptions,
    Engine,
    SearchBody,
    bm25_body,
    engine_body,
    hybrid_body,
    rank_feature_body,
)
from sparse_ingest.errors import ClusterError
from sparse_ingest.queries.weight_table import QueryWeights, to_float32
from sparse_ingest.records import Query, TermShare
from sparse_ingest.searching.hits import Hit, Ranked, heaviest_first
from sparse_ingest.searching.pipelines import DEFAULT_FIELD
from sparse_ingest.searching.query import keyed, tell_of_lost

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client
    from sparse_ingest.records import Query

Q = TypeVar("Q")
_NO_PIPELINE = {"search_pipeline": "_none"}
# Text in an error of the server, and what it means for a search.
_UNDERSTOOD = {
    "index_not_found_exception": "No index or alias {index!r} at {address}. Make it with `sparse-ingest load`.",
    "query only works on [rank_features] fields": (
        "The field that was asked is no sparse field of index {index!r}. Name one with --set index.field=NAME."
    ),
    "maxClauseCount is set to": (
        "The query has more clauses than the cluster allows (indices.query.bool.max_clause_count), its filters and its "
        "words included. Prune it, such as --set query.top_k=500."
    ),
    "Result window is too large": (
        "Index {index!r} gives fewer hits in one request than were asked for (index.max_result_window, 10,000 unless "
        "it says otherwise). Ask for fewer with -k."
    ),
    "Two phase search processor is not compatible": (
        "Two-phase search needs a rank_features field, and that of index {index!r} is a sparse_vector. "
        "Leave out --engine."
    ),
    "does not implement createWeight": (
        "The clusters of index {index!r} cannot be filtered by this: OpenSearch 3.6 fails on ids, prefix, wildcard, "
        "regexp and ranges of keyword fields there. Filter by term, terms, match, exists or a range of numbers or "
        "dates, or search a rank_features field."
    ),
    "unknown query [hybrid]": (
        "{address} lacks the neural-search plugin, which a hybrid search needs. Install it, or leave out --hybrid."
    ),
}
logger = logging.getLogger(__name__)


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
    """Search an index. The terms of each hit come from the server's own explanation of its score.

    Args:
        client: A connection.
        index: An index or alias.
        weights: Query weights by token.
        size: Number of hits.
        engine: How to search, and the field; by default exactly, in the rank_features field `sparse`. The hits of a
            SEISMIC search have only the `top_n` heaviest tokens of the query.
        filter: A query clause that every hit matches.
        collapse: A field: of the documents that share its value, as passages share their `parent`, only the best is a
            hit. Documents without the field count as sharing one.

    Raises:
        UsageError: the index does not map a field of `filter` or `collapse`, or weights do not fit.
        ClusterError: the server cannot answer.
    """
    engine = engine or Engine()
    refuse_unmapped(client, path_of(index), engine.mappings, filter, collapse)
    asker = _Asker(client, index, engine)
    answer, scale = asker.ask(weights, size=size, filter=filter, explain=True, collapse=collapse)
    asker.tell_of_lost()
    tokens = {key: token for token, key in engine.keys.items()} if engine.keys else {}
    hits = []
    for rank, found in enumerate(answer["hits"]["hits"], start=1):
        shares = (
            TermShare(
                tokens.get(term.token, term.token),
                to_float32(term.query_weight) * scale,
                to_float32(term.document_weight),
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
    refuse_unmapped(client, path_of(index), engine.mappings, filter, None)
    lost: dict[str, None] = {}
    weights = keyed(weights, engine.keys, lost)
    tell_of_lost(lost)
    return _hits_without_terms(_send(client, index, hybrid_body(text, weights, engine, size=size, filter=filter)))


def search_words(client: Client, index: str, text: str, *, field: str = DEFAULT_FIELD, size: int) -> list[Hit]:
    """Ask an index with BM25 on title and text, which learned-sparse search is compared with; hits have no terms."""
    return _hits_without_terms(_send(client, index, bm25_body(text, field=field, size=size)))


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
    """Search an index for many queries, without fetching documents; yield a ranking per query, in their order.

    Args:
        client: A connection.
        index: An index or alias.
        queries: Ids and weights of the queries.
        engine: How to search, and the field.
        size: Number of hits of each query.
        filter: A query clause that every hit matches.
        collapse: A field whose values replace the ids: each comes once, with the score of its best document.
        concurrency: Number of requests in flight.
    """
    refuse_unmapped(client, path_of(index), engine.mappings, filter, collapse)
    asker = _Asker(client, index, engine)
    ask = partial(asker.ask, size=size, filter=filter, collapse=collapse, source=False)
    yield from _ranked(ask, queries, collapse, concurrency)
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

    def ask(text: str) -> tuple[Any, float]:
        return _send(client, index, {**bm25_body(text, field=field, size=size), **also}), 1.0

    return _ranked(ask, ((query.id, query.text) for query in queries), collapse, concurrency)


def _ranked(
    ask: Callable[[Q], tuple[Any, float]], queries: Iterable[tuple[str, Q]], collapse: str | None, concurrency: int
) -> Iterator[Ranked]:
    """Ask from `concurrency` threads; few queries are taken ahead, however many there are."""

    def rank(query: tuple[str, Q]) -> Ranked:
        began = time.perf_counter()
        answer, scale = ask(query[1])
        latency_s = time.perf_counter() - began
        found = answer["hits"]["hits"]
        # Documents without the field count as sharing one; they keep their ids.
        ids = [hit.get("fields", {}).get(collapse, [hit["_id"]])[0] for hit in found]
        scores = [to_float32(hit["_score"]) * scale for hit in found]
        return Ranked(query[0], ids, scores, latency_s, float(answer["took"]))

    if concurrency == 1:
        yield from map(rank, queries)
        return
    waiting: deque[Future[Ranked]] = deque()
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            for query in queries:
                waiting.append(pool.submit(rank, query))
                if len(waiting) >= 2 * concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class _Asker:
    """One index and one engine. Safe to use from several threads."""

    def __init__(self, client: Client, index: str, engine: Engine) -> None:
        self._client, self._index, self._engine = client, index, engine
        self._without_plugin = self._told_of_ceiling = False
        self._max_clauses: int | None = None
        self._unknown: dict[str, None] = {}
        self._dotted: dict[str, None] = {}

    def ask(
        self, weights: QueryWeights, *, size: int, source: bool = True, **options: Unpack[BodyOptions]
    ) -> tuple[Any, float]:
        """Return the answer to one search, and by what its scores must be multiplied to be those of the query.

        Raises:
            UsageError: the weights do not fit.
            ClusterError: the server cannot answer it.
        """
        options["max_clauses"] = self._limit(weights, options.get("filter"))
        weights = keyed(weights, self._engine.keys, self._unknown)
        fitted = fit_weights(weights, max_clauses=options["max_clauses"])
        self._warn_of_ceiling(weights, fitted.scale)
        also = {} if source else {"_source": False}
        if not self._without_plugin:
            try:
                body = engine_body(fitted, self._engine, size=size, **options)
                return _send(self._client, self._index, body | also), fitted.scale
            except ClusterError as error:
                if "unknown query [neural_sparse]" not in str(error):
                    raise
                if self._engine.name != "exact":
                    raise ClusterError(
                        f"{self._client.address} lacks the neural-search plugin, which {self._engine.name} search "
                        "needs. Install it, or search a rank_features field with --engine exact."
                    ) from error
                self._without_plugin = True
        self._dotted.update(dict.fromkeys(token for token in fitted.weights if "." in token))
        undotted = {token: weight for token, weight in fitted.weights.items() if "." not in token}
        fitted = fitted._replace(weights=undotted)
        body = rank_feature_body(fitted, field=self._engine.field, size=size, **options)
        return _send(self._client, self._index, body | also), fitted.scale

    def tell_of_lost(self) -> None:
        """Say which tokens were left out of what was asked."""
        tell_of_lost(self._unknown)
        tell_of_lost(
            self._dotted, "The cluster lacks the neural-search plugin and cannot be asked for tokens with a dot"
        )

    def _warn_of_ceiling(self, weights: QueryWeights, scale: float) -> None:
        """Say, once, that clusters take a query weight for a smaller one."""
        ceiling = self._engine.ceiling
        if ceiling is None or self._told_of_ceiling or max(weights.values(), default=0) <= ceiling * scale:
            return
        self._told_of_ceiling = True
        logger.warning(
            "A query weight of %g is above %g, the quantization_ceiling_search of the field: clusters clip it there. "
            "Only a new index can have another ceiling.",
            max(weights.values()),
            ceiling * scale,
        )

    def _limit(self, weights: QueryWeights, filter: Mapping[str, Any] | None) -> int:
        """How many clauses a query may have; a request of its own, so made only when the answer matters."""
        if len(weights) + count_clauses(filter or {}) <= MAX_CLAUSES:
            return MAX_CLAUSES
        if self._max_clauses is None:
            self._max_clauses = max_clauses(self._client)
        return self._max_clauses


def _send(client: Client, index: str, body: SearchBody) -> Any:
    """Send a `_search` body as it is.

    Raises:
        ClusterError: the server refuses it, with what to do about it where that is known.
    """
    params = {} if "search_pipeline" in body else _NO_PIPELINE
    try:
        return client.call("POST", f"{path_of(index)}/_search", body, params=params)
    except ClusterError as error:
        for sign, sentence in _UNDERSTOOD.items():
            if sign in str(error):
                raise ClusterError(sentence.format(index=index, address=client.address)) from error
        raise
