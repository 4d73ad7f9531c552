"""Query texts to query weights by token: encoded by the model of a pipeline, then pruned by its [query].

A weight table needs no torch. pipelines.py chooses the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

from sparse_ingest.checkpoints.settings import resolve_query_settings
from sparse_ingest.checkpoints.sides import WeightTableSide
from sparse_ingest.errors import UsageError, listed, printable, short_repr
from sparse_ingest.models.query_encoders import build_weight_table, query_checkpoint
from sparse_ingest.pipeline import ModelSettings, Pipeline, pipeline_named
from sparse_ingest.queries.weight_table import QueryWeights, WeightTable, plain_tokenizer, prune_query
from sparse_ingest.records import Query, batched, check_weights
from sparse_ingest.searching.batches import QUERIES_AT_ONCE, BatchedEncoder

NAMED_TOKENS = 20  # tokens that a message names
logger = logging.getLogger(__name__)


def weights_of(query: str | Mapping[str, float], encode: Callable[[str], QueryWeights]) -> QueryWeights:
    """Return the weights of a text, or the given ones if they are valid."""
    if isinstance(query, str):
        return encode(query)
    check_weights(query)
    return dict(query)


class QueryModel:
    """The query side of a pipeline. Thread-safe. Models of the same checkpoint may share an `encoder`."""

    def __init__(self, pipeline: Pipeline, encoder: BatchedEncoder | None = None) -> None:
        self.pipeline = pipeline
        self.encoder = encoder or BatchedEncoder(pipeline.model)
        self._last: tuple[object, QueryWeights] = object(), {}  # equal to no text

    def weights(self, text: str) -> QueryWeights:
        """Return the weights of one query. Raise `UsageError` if there is no text."""
        last, weights = self._last
        if last != text:
            weights = self.encode(text)
            self._last = text, weights
            if not weights:
                logger.warning(self.why_unweighted(text))
        return dict(weights)

    def encode(self, text: str) -> QueryWeights:
        """Return the weights of one query, without a warning if there are none; see `weights`."""
        if not _checked(text).strip():
            raise UsageError("The query is empty. Give some words.")
        return prune_query(self.encoder.encode_one(text), self.pipeline.query)

    def why_unweighted(self, text: str) -> str:
        """Return a message about a text without weights, with its tokens."""
        checkpoint = query_checkpoint(self.pipeline.model)
        settings = resolve_query_settings(self.pipeline.model, checkpoint)
        tokenizer = plain_tokenizer(checkpoint.query.folder, lower_case=bool(settings.lower_case))
        tokens = list(dict.fromkeys(tokenizer.encode(text, add_special_tokens=False).tokens))
        unknown = getattr(tokenizer.model, "unk_token", None)
        why = "the model knows none of its words" if set(tokens) <= {unknown} else "the model drops all of them"
        return f"No token of the query has a weight, so it cannot have hits: {why} (tokens: {named(tokens) or 'none'})."

    def many(self, queries: Iterable[Query], *, batch: int = QUERIES_AT_ONCE) -> Iterator[tuple[str, QueryWeights]]:
        """Yield the ids and weights of many queries, in their order, encoded in batches.

        Queries without any weighted token are yielded too, and reported at the end.
        """
        empty: list[str] = []
        count = 0
        for some in batched(queries, batch):
            count += len(some)
            for query, weights in zip(some, self.encoder.encode(list(map(_text_of, some))), strict=True):
                if not weights:
                    empty.append(query.id)
                yield query.id, prune_query(weights, self.pipeline.query)
        if empty:
            logger.warning(
                "%d of %d queries have no token with a weight, such as %r: they cannot have hits.",
                len(empty), count, empty[0],
            )  # fmt: skip


def _text_of(query: Query) -> str:
    if not isinstance(query, Query):
        raise UsageError(f"One of the queries is {short_repr(query)}; expected Query(id, text).")
    return _checked(query.text)


def _checked(text: str) -> str:
    if not isinstance(text, str) or printable(text) != text:
        raise UsageError(f"The text of a query is {short_repr(text)}; expected a string of Unicode text.")
    return text


def query_weights(text: str, pipeline: str | Path | ModelSettings | Pipeline) -> QueryWeights:
    """Return the weights of a query by token, pruned by [query].

    Args:
        text: The query.
        pipeline: Names the model and the [query] settings, as `model` of `SparseEncoder` does.

    Returns:
        A dictionary from token to weight, heaviest first.

    Raises:
        UsageError: there is no text.
        CheckpointError: the model cannot be found or built.
        MissingExtraError: the model computes weights with torch, which is not installed.
    """
    return QueryModel(pipeline_named(pipeline)).weights(text)


def many_query_weights(
    queries: Iterable[Query], pipeline: str | Path | ModelSettings | Pipeline, *, batch: int = QUERIES_AT_ONCE
) -> Iterator[tuple[str, QueryWeights]]:
    """Yield the ids and weights of many queries; see `QueryModel.many`.

    Args:
        queries: The queries, read as they are needed.
        pipeline: As for `query_weights`.
        batch: Number of queries that are encoded together.

    Raises:
        UsageError: one of the queries is not a `Query` with a text.
        CheckpointError, MissingExtraError: as for `query_weights`.
    """
    return QueryModel(pipeline_named(pipeline)).many(queries, batch=batch)


def query_table(model: ModelSettings) -> WeightTable:
    """Return the weight table of a model's queries.

    Raise `UsageError` if no model is named, or a model computes the weights.
    """
    checkpoint = query_checkpoint(model)
    if not isinstance(checkpoint.query, WeightTableSide):
        raise UsageError(
            f"The queries of {model.query or model.document} are encoded by {checkpoint.query.described}, which has no "
            "weight table. A service must run the model."
        )
    return build_weight_table(checkpoint, resolve_query_settings(model, checkpoint))


def keyed(weights: QueryWeights, keys: Mapping[str, str | None] | None, lost: dict[str, None]) -> QueryWeights:
    """Return weights by the keys of an `Engine`; add tokens that are not in the vocabulary to `lost`.

    Tokens that no document has are omitted: they would add nothing to a score.
    """
    if keys is None:
        return weights
    lost.update(dict.fromkeys(token for token in weights if token not in keys))
    return {key: weight for token, weight in weights.items() if (key := keys.get(token)) is not None}


def warn_of_omitted(lost: Collection[str], why: str = "The vocabulary of the documents lacks some tokens") -> None:
    """Warn of tokens that were omitted from queries."""
    if lost:
        logger.warning("%s; omitted from the query: %s.", why, named(lost))


def not_in_vocabulary(tokens: Collection[str], of: str) -> str:
    """Return a message about tokens of a query that a vocabulary lacks."""
    return f"The vocabulary {of} lacks tokens of the query: {named(tokens)}. Another model encoded the documents."


def named(tokens: Collection[str]) -> str:
    """Return the first tokens for a message."""
    return listed(list(map(repr, tokens)), NAMED_TOKENS)
