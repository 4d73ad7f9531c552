"""`_search` bodies with words: BM25 on title and text, alone or combined with a learned-sparse search by the server."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from sparse_ingest.cluster.dialects import DIALECTS, MAX_CLAUSES
from sparse_ingest.cluster.limits import FittedWeights, check_hybrid, fit_weights
from sparse_ingest.cluster.search_bodies import (
    Engine,
    QueryClause,
    SearchBody,
    Weights,
    filtered,
    method_parameters,
    request_body,
    sparse_clause,
)
from sparse_ingest.pipeline import HybridSettings, packaged_folder

HYBRID_DEPTH = 100  # documents of each search that a hybrid one combines
SUB_SCORES = ("bm25", "sparse")  # the names of the two scores of a hybrid search, in the order of its queries


def hybrid_body(
    text: str,
    weights: Weights,
    engine: Engine,
    *,
    size: int,
    filter: QueryClause | None = None,
    collapse: str | None = None,
    search_pipeline: str | None = None,
    depth: int | None = HYBRID_DEPTH,
    max_clauses: int = MAX_CLAUSES,
) -> SearchBody:
    """Return the request of a hybrid search: BM25 on title and text, and learned-sparse, combined by the server.

    Args:
        text: The query, for BM25.
        weights: The query weights, for the learned-sparse search.
        engine: The engine of the learned-sparse search, whose `hybrid` has weights and techniques.
        size: Number of hits.
        filter: A query clause that every hit matches.
        collapse: As in `BodyOptions`; OpenSearch before 3.1 ignores it in a hybrid search.
        search_pipeline: Name of an installed pipeline with a normalization or score-ranker processor, whose first
            weight is that of BM25. By default the request contains one, from pipelines/opensearch/search.
        depth: Number of documents of each search that are combined; None for `size`, which servers before 2.19 need.
            A document below that depth in one search counts as not found by it.
        max_clauses: The maximum of clauses that the server accepts.

    Raises:
        UsageError: the weights are invalid (see `fit_weights`), or the engine is two-phase.
    """
    DIALECTS[engine.product].refuse("hybrid")
    settings = engine.hybrid or HybridSettings(hybrid=True)
    check_hybrid(settings, engine.name)
    fitted, depth = fit_weights(weights, max_clauses=max_clauses).weights, max(size, depth) if depth else None
    queries = _hybrid_clauses(text, fitted, engine, depth or size, filter)
    query = {"hybrid": {"queries": queries} | ({"pagination_depth": depth} if depth is not None else {})}
    body = request_body(
        query, field=engine.field, size=size, tokens=len(fitted), collapse=collapse, max_clauses=max_clauses
    )
    return body | {"search_pipeline": search_pipeline or _hybrid_pipeline(settings)}


def sub_scores_body(
    text: str, weights: FittedWeights, engine: Engine, doc_ids: Sequence[str], *, size: int, filter: QueryClause | None
) -> SearchBody:
    """Return the request for both scores of each hit of a hybrid search, under the names in `SUB_SCORES`.

    `explain` of a hybrid query changes scores and mixes documents (3.6). Send with include_named_queries_score=true.
    """
    clauses = _hybrid_clauses(text, weights.weights, engine, max(size, HYBRID_DEPTH), filter)
    named = [{"bool": {"must": [one], "_name": name}} for name, one in zip(SUB_SCORES, clauses, strict=True)]
    query = {"bool": {"filter": [{"ids": {"values": list(doc_ids)}}], "should": named}}
    return {"size": len(doc_ids), "_source": False, "query": query, "explain": True}


def bm25_body(
    text: str, *, field: str, size: int, filter: QueryClause | None = None, collapse: str | None = None
) -> SearchBody:
    """Return the request of a BM25 search on title and text.

    Args:
        text: The query.
        field: Name of the sparse field, which the hits omit.
        size: Number of hits.
        filter: A query clause that every hit matches.
        collapse: As in `BodyOptions`.
    """
    return request_body(_words_clause(text), field=field, size=size, filter=filter, collapse=collapse)


def packaged_search_pipeline(name: str) -> SearchBody:
    """Return a packaged search pipeline in the form that a request can contain."""
    content: SearchBody = json.loads((packaged_folder() / "opensearch" / "search" / f"{name}.json").read_bytes())
    return {key: value for key, value in content.items() if key != "description"}


def _hybrid_clauses(
    text: str, weights: Mapping[str, float], engine: Engine, depth: int, filter: QueryClause | None
) -> list[SearchBody]:
    parameters = method_parameters(depth, engine.seismic, filter) if engine.name == "seismic" else None
    sparse = sparse_clause(weights, engine.field, parameters)
    return [filtered(_words_clause(text), filter), filtered(sparse, filter)]


def _hybrid_pipeline(settings: HybridSettings) -> SearchBody:
    """Return the packaged search pipeline with these settings."""
    pipeline = packaged_search_pipeline("rrf" if settings.hybrid_combination == "rrf" else "hybrid")
    [processor] = pipeline["phase_results_processors"][0].values()
    processor.get("normalization", {})["technique"] = settings.hybrid_normalization or "min_max"
    processor["combination"]["technique"] = settings.hybrid_combination or "arithmetic_mean"
    if settings.hybrid_weights:
        processor["combination"]["parameters"] = {"weights": list(settings.hybrid_weights)}
    return pipeline


def _words_clause(text: str) -> SearchBody:
    return {"multi_match": {"query": text, "fields": ["title", "text"], "type": "most_fields"}}
