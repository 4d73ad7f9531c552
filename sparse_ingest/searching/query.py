"""Query texts to query weights: encoded by the model that a pipeline names, then pruned as [query] has it.

In: texts, a pipeline. Out: weights by token string, and for sparse_vector fields by the keys that stand for tokens
there. A weight table needs no torch.
Not covered: which model that is (pipelines.py), the request (cluster/search_bodies.py), what is found (search.py).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import islice
from threading import Lock
from typing import TYPE_CHECKING

from sparse_ingest.checkpoints.layouts import WeightTableSide
from sparse_ingest.checkpoints.settings import resolve_query_settings
from sparse_ingest.errors import UsageError, listed
from sparse_ingest.models.query_encoders import QueryEncoder, build_weight_table, query_checkpoint, query_encoder
from sparse_ingest.pipeline import ModelSettings, Pipeline
from sparse_ingest.queries.weight_table import QueryWeights, WeightTable, prune_query

if TYPE_CHECKING:
    from sparse_ingest.records import Query

QUERIES_AT_ONCE = 32  # texts that a model reads together
NAMED_TOKENS = 20  # of those that are omitted from queries
logger = logging.getLogger(__name__)


class QueryModel:
    """The query side of a pipeline. The model is built once, when the first text comes. Safe to use from threads."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._encoder: QueryEncoder | None = None
        self._lock = Lock()  # of the encoder: a masked LM takes one batch at a time

    def weights(self, text: str) -> QueryWeights:
        """Return the weights of one query.

        Raises:
            UsageError: there is no text.
        """
        if not text.strip():
            raise UsageError("The query is empty. Ask for some words.")
        weights = prune_query(self._encode([text])[0], self._pipeline.query)
        if not weights:
            logger.warning(
                "No token of the query has a weight, so nothing can be found: the model knows none of its words."
            )
        return weights

    def many(self, queries: Iterable[Query], *, batch: int = QUERIES_AT_ONCE) -> Iterator[tuple[str, QueryWeights]]:
        """Yield the ids and weights of many queries, in their order; the model reads `batch` texts at a time.

        Queries without any weighted token are yielded, too, and reported at the end: they find nothing.
        """
        empty: list[str] = []
        count, stream = 0, iter(queries)
        while some := list(islice(stream, batch)):
            count += len(some)
            for query, weights in zip(some, self._encode([query.text for query in some]), strict=True):
                if not weights:
                    empty.append(query.id)
                yield query.id, prune_query(weights, self._pipeline.query)
        if empty:
            logger.warning(
                "%d of %d queries have no token with a weight, such as %r: they find nothing.",
                len(empty), count, empty[0],
            )  # fmt: skip

    def _encode(self, texts: list[str]) -> list[QueryWeights]:
        with self._lock:
            if self._encoder is None:
                self._encoder = query_encoder(self._pipeline.model)
            return self._encoder.encode(texts)


def query_weights(text: str, pipeline: Pipeline) -> QueryWeights:
    """Return the weights of a query by token: encoded, then pruned by the rules of [query].

    Args:
        text: The query.
        pipeline: Names the model and the [query] settings.

    Raises:
        UsageError: there is no text.
    """
    return QueryModel(pipeline).weights(text)


def many_query_weights(
    queries: Iterable[Query], pipeline: Pipeline, *, batch: int = QUERIES_AT_ONCE
) -> Iterator[tuple[str, QueryWeights]]:
    """Yield the ids and weights of many queries; see `QueryModel.many`.

    Args:
        queries: The queries, read as they are needed.
        pipeline: Names the model and the [query] settings.
        batch: Number of queries that are encoded together.
    """
    return QueryModel(pipeline).many(queries, batch=batch)


def query_table(model: ModelSettings) -> WeightTable:
    """Return the weight table that a model's queries are looked up in.

    Raises:
        UsageError: no model is named, or a masked LM makes the weights.
    """
    checkpoint = query_checkpoint(model)
    if not isinstance(checkpoint.query, WeightTableSide):
        raise UsageError(
            f"The queries of {model.query or model.document} are made by a masked LM, which has no table. A service "
            "must run the model, or ask one that does."
        )
    return build_weight_table(checkpoint, resolve_query_settings(model, checkpoint))


def keyed(weights: QueryWeights, keys: Mapping[str, str] | None, lost: dict[str, None]) -> QueryWeights:
    """Return weights by the keys of an `Engine`; tokens that the documents' vocabulary lacks go into `lost`."""
    if keys is None:
        return weights
    lost.update(dict.fromkeys(token for token in weights if token not in keys))
    return {keys[token]: weight for token, weight in weights.items() if token in keys}


def tell_of_lost(lost: Collection[str], why: str = "The vocabulary of the documents lacks some tokens") -> None:
    """Say once, of however many queries, which tokens were left out of them."""
    if lost:
        logger.warning("%s; left out of the query: %s.", why, listed(list(map(repr, lost)), NAMED_TOKENS))
