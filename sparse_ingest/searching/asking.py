"""Asking an index: the request of an engine is sent, and what a server lacks or refuses is understood.

In: query weights, an `Engine`. Out: the server's answer, or one sentence. A search pipeline that the index has by
default is left out: it could change scores unseen. A cluster without the neural-search plugin is asked with
rank_feature clauses, which give the same scores.
Not covered: bodies (cluster/requests.py), what is made of an answer (search.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from sparse_ingest.cluster.limits import MAX_CLAUSES, FittedWeights, count_clauses, fit_weights
from sparse_ingest.cluster.requests import Engine, SearchBody, engine_body, rank_feature_body
from sparse_ingest.errors import ClusterError
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.searching.query import keyed, tell_of_lost

if TYPE_CHECKING:
    from sparse_ingest.cluster.client import Client

NO_PIPELINE = {"search_pipeline": "_none"}
# What stands in an error of the server, and what it means for a search.
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


class Answer(NamedTuple):
    """What the server answered; its scores times `scale` are those of the query."""

    content: Any
    scale: float


class Asker:
    """One index and one engine. Safe to use from several threads."""

    def __init__(self, client: Client, index: str, engine: Engine) -> None:
        self._client = client
        self._index = index
        self._engine = engine
        self._without_plugin = False
        self._max_clauses: int | None = None
        self._told_of_ceiling = False
        self._unknown: dict[str, None] = {}
        self._dotted: dict[str, None] = {}

    def ask(
        self,
        weights: QueryWeights,
        *,
        size: int,
        filter: Mapping[str, Any] | None = None,
        explain: bool = False,
        collapse: str | None = None,
        source: bool = True,
    ) -> Answer:
        """Send one search.

        Raises:
            UsageError: the weights do not fit.
            ClusterError: the server cannot answer it.
        """
        limit = self._limit(weights, filter)
        settings: dict[str, Any] = {"size": size, "filter": filter, "explain": explain, "collapse": collapse}
        settings["max_clauses"] = limit
        if self._engine.keys is not None:
            weights = keyed(weights, self._engine.keys, self._unknown)
        fitted = fit_weights(weights, max_clauses=limit)
        scale = fitted.scale
        self._warn_of_ceiling(weights, scale)
        if not self._without_plugin:
            try:
                return Answer(self._send(engine_body(fitted, self._engine, **settings), source), scale)
            except ClusterError as error:
                if "unknown query [neural_sparse]" not in str(error):
                    raise
                if self._engine.name != "exact":
                    raise ClusterError(
                        f"{self._client.address} lacks the neural-search plugin, which {self._engine.name} search "
                        "needs. Install it, or search a rank_features field with --engine exact."
                    ) from error
                self._without_plugin = True
        body = rank_feature_body(
            FittedWeights(self._undotted(fitted.weights), scale), field=self._engine.field, **settings
        )
        return Answer(self._send(body, source), scale)

    def tell_of_lost(self) -> None:
        """Say which tokens were left out of what was asked."""
        tell_of_lost(self._unknown)
        tell_of_lost(
            self._dotted, "The cluster lacks the neural-search plugin and cannot be asked for tokens with a dot"
        )

    def _undotted(self, weights: QueryWeights) -> QueryWeights:
        self._dotted.update(dict.fromkeys(token for token in weights if "." in token))
        return {token: weight for token, weight in weights.items() if "." not in token}

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

    def _send(self, body: SearchBody, source: bool) -> Any:
        body = body if source else {**body, "_source": False}
        return send(self._client, self._index, body)

    def _limit(self, weights: QueryWeights, filter: Mapping[str, Any] | None) -> int:
        """How many clauses a query may have; a request of its own, so made only when the answer matters."""
        if len(weights) + count_clauses(filter or {}) <= MAX_CLAUSES:
            return MAX_CLAUSES
        if self._max_clauses is None:
            from sparse_ingest.cluster.indexes import max_clauses

            self._max_clauses = max_clauses(self._client)
        return self._max_clauses


def send(client: Client, index: str, body: SearchBody) -> Any:
    """Send a `_search` body as it is.

    Raises:
        ClusterError: the server refuses it, with what to do about it where that is known.
    """
    params = {} if "search_pipeline" in body else NO_PIPELINE
    try:
        return client.call("POST", f"/{quote(index, safe='')}/_search", body, params=params)
    except ClusterError as error:
        for sign, sentence in _UNDERSTOOD.items():
            if sign in str(error):
                raise ClusterError(sentence.format(index=index, address=client.address)) from error
        raise
