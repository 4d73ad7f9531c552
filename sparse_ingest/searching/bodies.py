"""The `_search` body of a query: what `query` prints, and what any client can send."""

from __future__ import annotations

from typing import Any

from sparse_ingest.cluster.engines import engine_body
from sparse_ingest.cluster.hybrid_bodies import hybrid_body
from sparse_ingest.cluster.limits import fit_weights
from sparse_ingest.cluster.search_bodies import Engine, SearchBody, rank_feature_body
from sparse_ingest.errors import UsageError
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.searching.options import SearchOptions
from sparse_ingest.searching.query import keyed


def body_of(
    text: str,
    weights: QueryWeights,
    engine: Engine,
    options: SearchOptions,
    lost: dict[str, None],
    *,
    without_plugin: bool = False,
) -> tuple[SearchBody, float]:
    """Return the body that searches for a text with these weights, and the factor that its scores are divided by.

    Args:
        text: The query, for BM25 if the engine is hybrid.
        weights: The query weights by token.
        engine: The engine and its field.
        options: `k`, `filter` and `collapse`.
        lost: Receives the tokens that the vocabulary of the documents lacks; the body omits them.
        without_plugin: Use rank_feature clauses.

    Raises:
        UsageError: the weights or options do not fit the engine.
    """
    weights = keyed(weights, engine.keys, lost)
    scale = fit_weights(weights).scale
    how: dict[str, Any] = {"size": options.k, "filter": options.filter, "collapse": options.collapse}
    if engine.hybrid:
        return hybrid_body(text, weights, engine, **how), scale
    if without_plugin:
        if engine.name != "exact":
            raise UsageError(f"The engine {engine.name} needs the neural-search plugin. Omit --engine.")
        return rank_feature_body(weights, field=engine.field, **how), scale
    return engine_body(weights, engine, **how), scale
