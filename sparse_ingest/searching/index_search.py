"""Search an index: one query for hits with the server's explanation of each score, or many queries for rankings.

The default search pipeline of the index is bypassed: it could change scores. Without the neural-search plugin,
rank_feature clauses are used, which give the same scores.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from itertools import repeat
from typing import Any, TypeVar, Unpack

from sparse_ingest.cluster.answers import Found
from sparse_ingest.cluster.client import Client, path_of
from sparse_ingest.cluster.dialects import MAX_CLAUSES
from sparse_ingest.cluster.engines import engine_body
from sparse_ingest.cluster.hybrid_bodies import bm25_body, hybrid_body, sub_scores_body
from sparse_ingest.cluster.indexes import find_index
from sparse_ingest.cluster.limits import CLAUSE_SETTING, count_clauses, fit_weights
from sparse_ingest.cluster.query_fields import refuse_unmapped
from sparse_ingest.cluster.reading import explained_terms
from sparse_ingest.cluster.search_bodies import BodyOptions, Engine, SearchBody, rank_feature_body
from sparse_ingest.errors import ClusterError
from sparse_ingest.pipeline import HybridSettings
from sparse_ingest.queries.weight_table import QueryWeights, to_float32
from sparse_ingest.records import Query, TermShare
from sparse_ingest.searching.hits import Hit, Ranked, heaviest_first
from sparse_ingest.searching.pipelines import DEFAULT_FIELD
from sparse_ingest.searching.query import keyed, warn_of_omitted

Q = TypeVar("Q")
Change = Callable[[SearchBody], SearchBody]
_HYBRID_COLLAPSES_SINCE = (3, 1)
# Text in an error of the server, and our message for it.
_UNDERSTOOD = {
    "index_not_found_exception": "No index or alias {index!r} at {address}. Create it with `sparse-ingest load`.",
    **dict.fromkeys(
        ("query only works on [rank_features] fields", "must be type [sparse_vector]"),
        "The searched field of index {index!r} is not a sparse field. Name one with --set index.field=NAME.",
    ),
    "maxClauseCount is set to": (
        "The query, with its filters and words, has more clauses than the cluster allows "
        f"{CLAUSE_SETTING}. Prune it, such as with --set query.top_k=500, or shorten the text of a BM25 search."
    ),
    "Result window is too large": (
        "The requested number of hits is above index.max_result_window of index {index!r} (default 10,000). Request "
        "fewer with -k."
    ),
    "Two phase search processor is not compatible": (
        "Two-phase search needs a rank_features field, but index {index!r} has a sparse_vector field. Omit --engine."
    ),
    "does not implement createWeight": (
        "This filter does not work on the sparse_vector field of index {index!r}: OpenSearch 3.6 fails on ids, prefix, "
        "wildcard, regexp and ranges of keyword fields. Filter by term, terms, match, exists or a range of numbers or "
        "dates, or search a rank_features field."
    ),
    "unknown query [hybrid]": (
        "{address} lacks the neural-search plugin, which a hybrid search needs. Install it, or omit --hybrid."
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
    explain: bool = True,
) -> list[Hit]:
    """Search an index. The terms of each hit come from the server's explanation of its score.

    Args:
        client: A connection.
        index: An index or alias.
        weights: Query weights by token.
        size: Number of hits.
        engine: Engine and field; by default exact search in the rank_features field `sparse`. Hits of a SEISMIC
            search have only the `top_n` heaviest tokens of the query.
        filter: A query clause that every hit matches.
        collapse: Return only the best document for each value of this field, such as `parent` of passages. Documents
            without the field count as sharing one value.
        explain: Whether the server explains each score; without, hits have no terms, and the server does less work.

    Raises:
        UsageError: the index does not map a field of `filter` or `collapse`, or weights do not fit.
        ClusterError: the server cannot answer.
    """
    engine = engine or Engine()
    refuse_unmapped(client, path_of(index), engine.mappings, filter, collapse)
    asker = Asker(client, index, engine)
    answer, scale = asker.ask(weights, size=size, filter=filter, explain=explain, collapse=collapse)
    asker.warn_of_omitted()
    return [
        hit._replace(score=hit.score * scale, terms=asker.shares(found, scale) if explain else [])
        for hit, found in zip(_hits_without_terms(answer), answer["hits"]["hits"], strict=True)
    ]


def search_hybrid(
    client: Client,
    index: str,
    text: str,
    weights: QueryWeights,
    *,
    size: int,
    engine: Engine | None = None,
    filter: Mapping[str, Any] | None = None,
    collapse: str | None = None,
) -> list[Hit]:
    """Search an index with BM25 on title and text, combined with learned-sparse search by the server.

    Arguments are as for `search_index`; `engine.hybrid` has weights and techniques. A second request searches only the
    found documents, and returns both scores of each hit (`sub_scores`) and the terms of the learned-sparse score.
    """
    engine = engine or Engine()
    engine = engine if engine.hybrid else replace(engine, hybrid=HybridSettings(hybrid=True))
    refuse_unmapped(client, path_of(index), engine.mappings, filter, collapse)
    asker = Asker(client, index, engine)
    answer, scale = asker.ask(weights, text, size=size, filter=filter, collapse=collapse)
    asker.warn_of_omitted()
    hits = _hits_without_terms(answer)
    if not hits:
        return []
    fitted = fit_weights(keyed(weights, engine.keys, {}), max_clauses=len(weights))
    body = sub_scores_body(text, fitted, engine, [hit.id for hit in hits], size=size, filter=filter)
    try:
        answer = _send(client, index, body, include_named_queries_score="true")
    except ClusterError as error:
        if "unrecognized parameter" not in str(error):
            raise
        return hits  # an old server
    parts = {one["_id"]: one for one in answer["hits"]["hits"]}
    explained = []
    for hit in hits:
        part = parts.get(hit.id, {})  # a document may have been deleted
        named = part.get("matched_queries", {}).items()
        scores = {name: to_float32(score) * (scale if name == "sparse" else 1) for name, score in named}
        explained.append(hit._replace(sub_scores=scores, terms=asker.shares(part, scale) if part else []))
    return explained


def search_words(
    client: Client,
    index: str,
    text: str,
    *,
    field: str = DEFAULT_FIELD,
    size: int,
    filter: Mapping[str, Any] | None = None,
    collapse: str | None = None,
    known: Mapping[str, Any] | None = None,
) -> list[Hit]:
    """Search an index with BM25 on title and text, for comparison; hits have no terms.

    `field` is the sparse field, `known` the mapping, if it was read; other arguments are as for `search_index`.
    """
    refuse_unmapped(client, path_of(index), known, filter, collapse)
    body = bm25_body(text, field=field, size=size, filter=filter, collapse=collapse)
    return _hits_without_terms(_send(client, index, body))


def _hits_without_terms(answer: Any) -> list[Hit]:
    # JSON has the shortest decimal of a float32; comparisons need the float32 itself.
    return [
        Hit(rank, to_float32(found["_score"]), found["_id"], found.get("_source", {}), [])
        for rank, found in enumerate(answer["hits"]["hits"], start=1)
    ]


def rank_index(
    client: Client,
    index: str,
    queries: Iterable[tuple[str, QueryWeights]],
    engine: Engine,
    *,
    size: int,
    concurrency: int = 1,
    texts: Iterable[str] | None = None,
    **options: Unpack[BodyOptions],
) -> Iterator[Ranked]:
    """Search an index for many queries, without fetching documents; yield a ranking per query, in their order.

    Args:
        client: A connection.
        index: An index or alias.
        queries: Ids and weights of the queries.
        engine: Engine and field.
        size: Number of hits of each query.
        concurrency: Number of requests in flight.
        texts: The text of each query, if the engine is hybrid.
        **options: `filter`, a query clause that every hit matches, and `collapse`, a field whose values replace the
            ids: each is returned once, with the score of its best document.
    """
    collapse = options.get("collapse")
    refuse_unmapped(client, path_of(index), engine.mappings, options.get("filter"), collapse)
    asker = Asker(client, index, engine)
    ask = partial(asker.ask, size=size, change=without_source, **options)
    # zip stops at the end of `queries` without reading another text.
    with_texts = (
        (query_id, (weights, text)) for (query_id, weights), text in zip(queries, texts or repeat(""), strict=False)
    )
    yield from _ranked(lambda query: ask(*query), with_texts, collapse, concurrency)
    asker.warn_of_omitted()


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
    """Rank with BM25 on title and text; `field` is the sparse field, other arguments are as for `rank_index`."""

    def ask(text: str) -> tuple[Any, float]:
        body = bm25_body(text, field=field, size=size, collapse=collapse)
        return _send(client, index, without_source(body)), 1.0

    return _ranked(ask, ((query.id, query.text) for query in queries), collapse, concurrency)


def _ranked(
    ask: Callable[[Q], tuple[Any, float]], queries: Iterable[tuple[str, Q]], collapse: str | None, concurrency: int
) -> Iterator[Ranked]:
    """Search from `concurrency` threads, with at most two queries per thread read ahead."""

    def rank(query: tuple[str, Q]) -> Ranked:
        began = time.perf_counter()
        answer, scale = ask(query[1])
        latency_s = time.perf_counter() - began
        found = answer["hits"]["hits"]
        # Documents without the field keep their ids.
        ids = [hit.get("fields", {}).get(collapse, [hit["_id"]])[0] for hit in found]
        scores = [to_float32(hit["_score"]) * scale for hit in found]
        return Ranked(query[0], ids, scores, latency_s, float(answer["took"]))

    if concurrency == 1:
        yield from map(rank, queries)
        return
    waiting: deque[Future[Ranked]] = deque()
    pool = ThreadPoolExecutor(concurrency)
    try:
        for query in queries:
            waiting.append(pool.submit(rank, query))
            if len(waiting) >= 2 * concurrency:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        # Closing the client ends requests in flight.
        pool.shutdown(wait=False, cancel_futures=True)


def without_source(body: SearchBody) -> SearchBody:
    """Return the request without the fields of hits."""
    return body | {"_source": False}


class Asker:
    """One index and one engine. Safe to use from several threads."""

    def __init__(self, client: Client, index: str, engine: Engine) -> None:
        self._client, self._index, self._engine = client, index, replace(engine, product=client.dialect.product)
        self._without_plugin = self._warned_of_ceiling = False
        self._max_clauses: int | None = None
        self._unknown: dict[str, None] = {}
        self._dotted: dict[str, None] = {}

    def ask(
        self, weights: QueryWeights, text: str = "", *, size: int, change: Change = dict, **options: Unpack[BodyOptions]
    ) -> tuple[Any, float]:
        """Return the response to one search, and the factor for the scores of the engine.

        `text` is for BM25; `change` is applied to the body. Raise `UsageError` if the weights do not fit,
        `ClusterError` if the server cannot answer it.
        """
        options["max_clauses"] = self._limit(weights, text, options.get("filter"))
        weights = keyed(weights, self._engine.keys, self._unknown)
        fitted = fit_weights(weights, max_clauses=options["max_clauses"])
        self._warn_of_ceiling(weights, fitted.scale)
        if self._engine.hybrid:
            self._refuse_collapse(options.get("collapse"))
            names = ("filter", "collapse", "max_clauses")
            how: dict[str, Any] = {name: options.get(name) for name in names}
            body = hybrid_body(text, fitted, self._engine, size=size, **how)
            return self._send(change(body)), fitted.scale
        if not self._without_plugin:
            try:
                body = engine_body(fitted, self._engine, size=size, **options)
                return self._send(change(body)), fitted.scale
            except ClusterError as error:
                # Elasticsearch has no such query, but the caller's filter may contain one.
                if self._engine.product == "elasticsearch" or "unknown query [neural_sparse]" not in str(error):
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
        return _send(self._client, self._index, change(body)), fitted.scale

    def shares(self, found: Any, scale: float) -> list[TermShare]:
        """Return the terms of an explained hit, heaviest first; `scale` is the factor of its score."""
        return heaviest_first(
            TermShare(
                self._tokens.get(term.token, term.token),
                to_float32(term.query_weight) * scale,
                to_float32(term.document_weight),
                to_float32(term.contribution) * scale,
            )
            for term in explained_terms(found["_explanation"], self._engine.field)
        )

    @cached_property
    def _tokens(self) -> dict[str, str]:
        return {key: token for token, key in (self._engine.keys or {}).items() if key is not None}

    def warn_of_omitted(self) -> None:
        """Warn of tokens that were omitted from queries."""
        warn_of_omitted(self._unknown)
        warn_of_omitted(self._dotted, "Without the neural-search plugin, tokens with a dot cannot be searched")

    def _warn_of_ceiling(self, weights: QueryWeights, scale: float) -> None:
        """Warn once that a query weight is clipped."""
        ceiling = self._engine.ceiling
        if ceiling is None or self._warned_of_ceiling or max(weights.values(), default=0) <= ceiling * scale:
            return
        self._warned_of_ceiling = True
        logger.warning(
            "A query weight of %g is clipped to %g, the quantization_ceiling_search of the field. Only a new index can "
            "have another ceiling.",
            max(weights.values()),
            ceiling * scale,
        )

    def _send(self, body: SearchBody) -> Any:
        """Send a request, and refuse the answer of an index whose token map is not the one of the engine."""
        answer, mapped = _send(self._client, self._index, body), self._engine.mapped
        if mapped is None:
            return answer
        names = {str(hit.get("_index")) for hit in answer["hits"]["hits"]}
        if not names and (there := find_index(self._client, self._index)):
            names = {there.name}
        if others := names - {mapped}:
            raise ClusterError(
                f"{self._index!r} was index {mapped!r} when it was opened, and is now {min(others)!r}, whose keys mean "
                "other tokens. Open it again."
            )
        return answer

    def _refuse_collapse(self, collapse: str | None) -> None:
        if collapse and self._client.version < _HYBRID_COLLAPSES_SINCE:
            raise ClusterError(
                f"{self._client.address} is OpenSearch {'.'.join(map(str, self._client.version))}, which does not "
                "collapse the hits of a hybrid search; 3.1 and newer do. Omit --collapse, or --hybrid."
            )

    def _limit(self, weights: QueryWeights, text: str, filter: Mapping[str, Any] | None) -> int:
        """Return how many clauses a query may have; requested only if the query may exceed it."""
        others = count_clauses(filter or {})
        if self._engine.hybrid:  # each word on title and text, the filter twice
            others = 2 * (others + len(text.split()))
        if len(weights) + others <= MAX_CLAUSES:
            return MAX_CLAUSES
        if self._max_clauses is None:
            self._max_clauses = self._client.dialect.max_clauses(self._client.find)
        return self._max_clauses


def _send(client: Client, index: str, body: SearchBody, **params: str) -> Any:
    """Send a `_search` body, or raise `ClusterError` with advice for known refusals."""
    try:
        return client.search(path_of(index), body, expected=Found, **params)
    except ClusterError as error:
        for sign, message in _UNDERSTOOD.items():
            if sign in str(error):
                raise ClusterError(message.format(index=index, address=client.address)) from error
        raise
