"""`_search` bodies from query weights: plain dicts, ready to be sent by any client or printed as JSON.

On a field of kind rank_features the score is the sum of query weight times stored weight. Bodies contain the search
pipelines that they need. `body["query"]` can be part of a larger query; the two-phase processor finds it alone or in
`bool.should` only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as made_of
from typing import Any, TypedDict, Unpack

from sparse_ingest.cluster.dialects import DIALECTS, MAX_CLAUSES, ElasticsearchDialect, OpenSearchDialect, Product
from sparse_ingest.cluster.limits import (
    FittedWeights,
    check_clauses,
    check_pruned,
    check_seismic,
    check_two_phase,
    count_clauses,
    fit_weights,
    leaves_nothing,
)
from sparse_ingest.errors import UsageError
from sparse_ingest.pipeline import EngineName, HybridSettings

SearchBody = dict[str, Any]
QueryClause = Mapping[str, Any]
Weights = Mapping[str, float] | FittedWeights  # by token, or by its key in the field
_LEAST_SCORE = 1e-45  # below every score above zero; hits without any token of the query have 0


@dataclass(frozen=True)
class Engine:
    """An engine, its field and its settings, for a product.

    `keys` maps tokens to keys of the field, and tokens that no document has to None; `keys` is None if tokens are the
    keys. If they come from the token map of an index, `mapped` is its name. `two_phase`, `seismic` and `pruned` are the
    tables of [query]. Clusters of a sparse_vector field clip query weights at `ceiling`, None if unknown. `mappings`
    are those of the index, if they were read. With `hybrid`, BM25 on title and text is combined with the engine.
    """

    name: EngineName = "exact"
    field: str = "sparse"
    kind: str = "rank_features"
    keys: Mapping[str, str | None] | None = None
    two_phase: Mapping[str, Any] = made_of(default_factory=dict)
    seismic: Mapping[str, Any] = made_of(default_factory=dict)
    pruned: Mapping[str, Any] = made_of(default_factory=dict)
    ceiling: float | None = None
    product: Product = "opensearch"
    mappings: Mapping[str, Any] | None = made_of(default=None, repr=False, compare=False)
    hybrid: HybridSettings | None = None
    mapped: str | None = None


class BodyOptions(TypedDict, total=False):
    """Options of every search with weights."""

    filter: QueryClause | None  # a query that hits must match
    explain: bool  # return the explanation of each hit
    collapse: str | None  # a single-valued field: of documents with the same value, only the best is a hit
    max_clauses: int  # how many clauses the cluster allows, MAX_CLAUSES by default


def neural_sparse_body(weights: Weights, *, field: str, size: int, **options: Unpack[BodyOptions]) -> SearchBody:
    """Return the request of a learned-sparse search of OpenSearch. Without weights it is valid and finds nothing.

    Args:
        weights: Query weights by token.
        field: Name of the sparse field.
        size: Number of hits.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights are invalid, see `fit_weights`.
    """
    fitted = _fitted(weights, options).weights
    return request_body(sparse_clause(fitted, field), field=field, size=size, tokens=len(fitted), **options)


def sparse_vector_body(
    weights: Weights,
    *,
    field: str,
    size: int,
    settings: Mapping[str, Any] | None = None,
    **options: Unpack[BodyOptions],
) -> SearchBody:
    """Return the request of a learned-sparse search of Elasticsearch. Without weights it is valid and finds nothing.

    Args:
        weights: Query weights by token.
        field: Name of the sparse field.
        size: Number of hits.
        settings: `tokens_freq_ratio_threshold` (default of the server: 5) and `tokens_weight_threshold` (0.4) of its
            pruning, which loses hits. None: no pruning, so that scores are exact.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights (see `fit_weights`) or the settings (see `check_pruned`) are invalid.
    """
    check_pruned(settings or {})
    fitted = _fitted(weights, options).weights
    clause = ElasticsearchDialect.tokens_clause(field, fitted, prune=settings is not None)
    if settings:
        clause["sparse_vector"]["pruning_config"] = dict(settings)
    return request_body(clause, field=field, size=size, tokens=len(fitted), **options)


def two_phase_body(
    weights: Weights,
    *,
    field: str,
    size: int,
    settings: Mapping[str, Any] | None = None,
    **options: Unpack[BodyOptions],
) -> SearchBody:
    """Return the request of a two-phase search: heavy tokens find documents, light ones add to the best scores.

    Documents with only light tokens are not found, and those outside the window keep the score of the first phase.

    Args:
        weights: Query weights by token.
        field: Name of the sparse field.
        size: Number of hits.
        settings: `prune_type`, `prune_ratio`, `expansion_rate` and `max_window_size` of the processor.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights (see `fit_weights`) or the settings (see `check_two_phase`) are invalid, the settings
            leave no token to the first phase, or `collapse` is given.
    """
    if options.get("collapse") is not None:
        raise UsageError("OpenSearch cannot collapse two-phase hits. Omit --collapse, or use --engine exact.")
    full = check_two_phase(settings or {}, size=size)
    fitted, ratio = _fitted(weights, options), full["prune_ratio"]
    if full["prune_type"] == "abs_value":
        full["prune_ratio"] = ratio / fitted.scale  # as the weights
    if fitted.weights and leaves_nothing(fitted.weights, full):
        raise UsageError(
            f"prune_type {full['prune_type']} with prune_ratio {ratio:g} leaves no token of the query to the first "
            "phase, so nothing can be found. Change [query] two_phase."
        )
    body = neural_sparse_body(fitted, field=field, size=size, **options)
    return body | {"search_pipeline": _two_phase_pipeline(full)}


def seismic_body(
    weights: Weights,
    *,
    field: str,
    size: int,
    settings: Mapping[str, Any] | None = None,
    **options: Unpack[BodyOptions],
) -> SearchBody:
    """Return the request of a SEISMIC search of a sparse_vector field.

    The filter is in the search of the clusters, because a bool filter alone would remove hits from those k, and around
    it, because segments without a match of the filter are searched without it (3.6.0).

    Args:
        weights: Query weights by token id.
        field: Name of the sparse_vector field.
        size: Number of hits.
        settings: `top_n` (default of the server: 10), `heap_factor` (1.0), and `k`, the maximum of hits per segment,
            at least `size`.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights (see `fit_weights`) or the settings (see `check_seismic`) are invalid.
    """
    settings = settings or {}
    check_seismic(settings)
    fitted, filter = _fitted(weights, options).weights, options.get("filter")
    clause = sparse_clause(fitted, field, method_parameters(size, settings, filter))
    body = request_body(clause, field=field, size=size, tokens=len(fitted), **options)
    # Otherwise documents that match the filter and no token fill up the k hits (3.6.0).
    return body | {"min_score": _LEAST_SCORE} if filter else body


def rank_feature_body(weights: Weights, *, field: str, size: int, **options: Unpack[BodyOptions]) -> SearchBody:
    """Return the request of a learned-sparse search for a cluster without the neural-search plugin.

    Args:
        weights: Query weights by token.
        field: Name of the sparse field.
        size: Number of hits.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights are invalid (see `fit_weights`), or a token contains a dot, so `rank_feature` cannot
            find it: it splits field and feature at the last dot (3.6.0).
    """
    fitted = _fitted(weights, options).weights
    if dotted := [token for token in fitted if "." in token]:
        raise UsageError(
            f"The token {dotted[0]!r} contains a dot, so a rank_feature query cannot find it. "
            "Omit it, or use a cluster with the neural-search plugin."
        )
    clauses = [
        {"rank_feature": {"field": f"{field}.{token}", "linear": {}, "boost": weight}}
        for token, weight in fitted.items()
    ]
    # An empty bool matches every document.
    query = {"bool": {"should": clauses}} if clauses else {"match_none": {}}
    return request_body(query, field=field, size=size, tokens=len(fitted), **options)


def server_side_body(
    text: str,
    engine: Engine,
    *,
    size: int,
    model_id: str | None = None,
    analyzer: str | None = None,
    filter: QueryClause | None = None,
    explain: bool = False,
) -> SearchBody:
    """Return the request of a search whose text the server encodes, with a deployed model or an analyzer.

    Args:
        text: The query.
        engine: The engine, its field and its settings.
        size: Number of hits.
        model_id: A deployed model. Either this or `analyzer` is required.
        analyzer: An analyzer. With neither, OpenSearch since 3.1 would use bert-uncased without a warning: wrong for
            every other vocabulary.
        filter: A query clause that every hit matches.
        explain: The server explains each score.

    Raises:
        UsageError: neither or both of `model_id` and `analyzer` are given, or the text is empty.
    """
    DIALECTS[engine.product].refuse("model")
    if (model_id is None) == (analyzer is None):
        raise UsageError("The server encodes the query: pass either a model_id or an analyzer.")
    if not text.strip():
        raise UsageError("The query is empty, which OpenSearch refuses as query_text. Pass some words.")
    content: SearchBody = {"query_text": text}
    content |= {"model_id": model_id} if model_id is not None else {"analyzer": analyzer}
    if engine.name == "seismic":
        content["method_parameters"] = method_parameters(size, engine.seismic, filter)
    query = {"neural_sparse": {engine.field: content}}
    body = request_body(query, field=engine.field, size=size, filter=filter, explain=explain)
    if engine.name == "seismic" and filter:
        body["min_score"] = _LEAST_SCORE
    if engine.name == "two-phase":
        body["search_pipeline"] = _two_phase_pipeline(check_two_phase(engine.two_phase, size=size))
    return body


def msearch_lines(bodies: Iterable[SearchBody], index: str | None = None) -> Iterator[SearchBody]:
    """Yield the lines of an `_msearch` request, as opensearch-py takes them: a header before each body.

    Args:
        bodies: The search requests.
        index: The index of all; by default the URL names it: `/INDEX/_msearch`.
    """
    for body in bodies:
        yield {"index": index} if index else {}
        yield body


def msearch_bytes(bodies: Iterable[SearchBody], index: str | None = None) -> bytes:
    """Return the body of an `_msearch` request: one JSON object per line (application/x-ndjson).

    Args:
        bodies: The search requests.
        index: The index of all; by default the URL names it: `/INDEX/_msearch`.
    """
    lines = (json.dumps(line, ensure_ascii=False, separators=(",", ":")) for line in msearch_lines(bodies, index))
    return "".join(f"{line}\n" for line in lines).encode()


def sparse_clause(fitted: Mapping[str, float], field: str, parameters: SearchBody | None = None) -> SearchBody:
    """Return OpenSearch's query for weighted tokens, which matches nothing without any."""
    if not fitted:
        return {"match_none": {}}
    clause = OpenSearchDialect.tokens_clause(field, fitted)
    if parameters:
        clause["neural_sparse"][field]["method_parameters"] = parameters
    return clause


def method_parameters(size: int, settings: Mapping[str, Any], filter: QueryClause | None) -> SearchBody:
    """Return the parameters of a SEISMIC search."""
    parameters = {**settings, "k": max(size, settings.get("k", 0))}
    return parameters | {"filter": _single_terms(dict(filter))} if filter else parameters


def _single_terms(query: Any) -> Any:
    """Replace each `terms` of a query by one `term` per value: the filter of clusters fails on `terms` (3.6.0)."""
    match query:
        case list():
            return [_single_terms(one) for one in query]
        case {"bool": dict(parts), **others} if not others:
            return {"bool": {part: _single_terms(inner) for part, inner in parts.items()}}
        case {"terms": dict(content), **others} if not others and len(content) == 1:
            [(field, values)] = content.items()
            if isinstance(values, list):
                # An empty bool matches every document.
                any_of = [{"term": {field: value}} for value in values] or [{"match_none": {}}]
                return {"bool": {"should": any_of}}
    return query


def _two_phase_pipeline(settings: Mapping[str, Any]) -> SearchBody:
    processor = {"neural_sparse_two_phase_processor": {"enabled": True, "two_phase_parameter": dict(settings)}}
    return {"request_processors": [processor]}


def filtered(query: SearchBody, filter: QueryClause | None) -> SearchBody:
    """Restrict a query to documents that match `filter`.

    The query is in `should`, because the two-phase processor looks only there. Without `minimum_should_match`,
    documents without any of its tokens would be hits with score 0.
    """
    if not filter:
        return query
    return {"bool": {"should": [query], "minimum_should_match": 1, "filter": [dict(filter)]}}


def _fitted(weights: Weights, options: BodyOptions) -> FittedWeights:
    return fit_weights(weights, max_clauses=options.get("max_clauses", MAX_CLAUSES))


def request_body(
    query: SearchBody,
    *,
    field: str,
    size: int,
    tokens: int | None = None,
    filter: QueryClause | None = None,
    explain: bool = False,
    collapse: str | None = None,
    max_clauses: int = MAX_CLAUSES,
) -> SearchBody:
    """Return the request of a query. Given the number of its sparse `tokens`, check the number of its clauses."""
    query = filtered(query, filter)
    if tokens is not None:
        check_clauses(tokens, count_clauses(query) - tokens, max_clauses=max_clauses)
    body: SearchBody = {"size": size, "_source": {"excludes": [field]}, "query": query}
    if collapse is not None:
        body["collapse"] = {"field": collapse}
    return body | {"explain": True} if explain else body
