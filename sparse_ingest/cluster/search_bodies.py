"""Query weights to `_search` bodies: plain dicts, ready to be sent by any client or printed as JSON.

Every body for a rank_features field gives the same score: the sum over the query's tokens of query weight times stored
weight. A sparse_vector field has a body of its own, whose tokens are ids. What a body needs of the server's search
pipelines stands in it, so that nothing has to be installed. `body["query"]` alone can be put into a larger query; the
two-phase processor finds it bare or in `bool.should` only.
Not covered: sending them (search.py), the limits that they keep (limits.py), their explanations (reading.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as made_of
from typing import Any, NamedTuple, TypedDict, Unpack

from sparse_ingest.cluster.limits import (
    MAX_CLAUSES,
    FittedWeights,
    check_clauses,
    check_seismic,
    check_two_phase,
    count_clauses,
    fit_weights,
    leaves_nothing,
)
from sparse_ingest.errors import PipelineError, UsageError
from sparse_ingest.pipeline import EngineName, QuerySettings, packaged_folder

SearchBody = dict[str, Any]
QueryClause = Mapping[str, Any]
Weights = Mapping[str, float] | FittedWeights  # by token, or by its key in the field
# Above zero and below every score: hits without any token of the query have 0.
_LEAST_SCORE = 1e-45
_WORD_FIELDS = ["title", "text"]
HYBRID_DEPTH = 100  # documents of each search that a hybrid one combines


@dataclass(frozen=True)
class Engine:
    """How an index is asked: with which engine, on which field.

    `keys` says by which key the field knows a token, None where tokens are keys; `two_phase` and `seismic` are the
    settings of those engines, as [query] has them. `ceiling` is what the clusters of a sparse_vector field clip query
    weights at, None where it is not known. `mappings` has those of the index, if they were read.
    """

    name: EngineName = "exact"
    field: str = "sparse"
    kind: str = "rank_features"
    keys: Mapping[str, str] | None = None
    two_phase: Mapping[str, Any] = made_of(default_factory=dict)
    seismic: Mapping[str, Any] = made_of(default_factory=dict)
    ceiling: float | None = None
    mappings: Mapping[str, Any] | None = made_of(default=None, repr=False, compare=False)


class BodyOptions(TypedDict, total=False):
    """What every search of weights takes besides.

    Attributes:
        filter: any query: documents that it does not match are no hits.
        explain: hits come with their explanation.
        collapse: a field of one value (keyword or number): of the documents that share one, the best is found.
        max_clauses: how many clauses the cluster allows, MAX_CLAUSES by default.
    """

    filter: QueryClause | None
    explain: bool
    collapse: str | None
    max_clauses: int


def engine_body(weights: Weights, engine: Engine, *, size: int, **options: Unpack[BodyOptions]) -> SearchBody:
    """Return the request of a search with an engine.

    Args:
        weights: Query weights by token. With `engine.keys` they are converted to those keys.
        engine: The engine, its field and its settings.
        size: Number of hits.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights, the engine's settings or a combination do not fit.
    """
    rules = ENGINES[engine.name]
    settings = {"settings": getattr(engine, rules.settings)} if rules.settings else {}
    return rules.body(weights, field=engine.field, size=size, **settings, **options)


def neural_sparse_body(weights: Weights, *, field: str, size: int, **options: Unpack[BodyOptions]) -> SearchBody:
    """Return the request of a learned-sparse search. Without any weight it finds nothing, and is still valid.

    Args:
        weights: Query weights by token.
        field: Name of the sparse field.
        size: Number of hits.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights do not fit; see `fit_weights`.
    """
    fitted = _fitted(weights, options)
    return _body(_sparse_clause(fitted, field), field=field, size=size, tokens=len(fitted), **options)


def two_phase_body(
    weights: Weights,
    *,
    field: str,
    size: int,
    settings: Mapping[str, Any] | None = None,
    **options: Unpack[BodyOptions],
) -> SearchBody:
    """Return the search in two phases: the heavy tokens find documents, the light ones raise the best of them.

    The processor is part of the request. Documents that have light tokens only are no hits, and those outside the
    window keep the score of the first phase.

    Args:
        weights: Query weights by token.
        field: Name of the sparse field.
        size: Number of hits.
        settings: `prune_type`, `prune_ratio`, `expansion_rate` and `max_window_size` of the processor.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights do not fit (see `fit_weights`), or the settings (see `check_two_phase`), or they leave
            no token to the first phase, which would find nothing; or hits are to be collapsed.
    """
    if options.get("collapse") is not None:
        raise UsageError(
            "Two-phase search cannot collapse hits: OpenSearch refuses it beside a second phase. "
            "Leave out --collapse, or search with --engine exact."
        )
    full = check_two_phase(settings or {}, size=size)
    fitted, ratio = fit_weights(weights, max_clauses=options.get("max_clauses", MAX_CLAUSES)), full["prune_ratio"]
    if full["prune_type"] == "abs_value":
        # A border among the weights moves with them.
        full["prune_ratio"] = ratio / fitted.scale
    if fitted.weights and leaves_nothing(fitted.weights, full):
        raise UsageError(
            f"With {full['prune_type']} and prune_ratio {ratio:g} no token of the query is left for the first phase, "
            "so nothing can be found. Choose other [query] two_phase settings."
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

    The filter goes into the search of the clusters, as a bool filter alone would take hits away from those k;
    it is around it as well, as the clusters of a segment without any match of it are not filtered (3.6.0).

    Args:
        weights: Query weights by token id.
        field: Name of the sparse_vector field.
        size: Number of hits.
        settings: `top_n` (the server's default is 10), `heap_factor` (1.0), and `k`, the most hits of a segment, which
            is at least `size`.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights do not fit (see `fit_weights`), or the settings (see `check_seismic`).
    """
    settings = settings or {}
    check_seismic(settings)
    fitted, filter = _fitted(weights, options), options.get("filter")
    clause = _sparse_clause(fitted, field, _method_parameters(size, settings, filter))
    body = _body(clause, field=field, size=size, tokens=len(fitted), **options)
    # Otherwise documents that match the filter and no token fill up the k hits (3.6.0).
    return body | {"min_score": _LEAST_SCORE} if filter else body


def rank_feature_body(weights: Weights, *, field: str, size: int, **options: Unpack[BodyOptions]) -> SearchBody:
    """Return the search of `neural_sparse_body` for a cluster without the neural-search plugin.

    Args:
        weights: Query weights by token.
        field: Name of the sparse field.
        size: Number of hits.
        **options: `filter`, `collapse`, `explain`, `max_clauses`; see `BodyOptions`.

    Raises:
        UsageError: the weights do not fit (see `fit_weights`), or a token holds a dot: `rank_feature` takes what
            stands after the last dot of its field for the feature (tried on 3.6.0), so it can never find that token.
    """
    fitted = _fitted(weights, options)
    dotted = [token for token in fitted if "." in token]
    if dotted:
        raise UsageError(
            f"The token {dotted[0]!r} holds a dot, which a rank_feature query cannot ask for. "
            "Leave it out, or use a cluster with the neural-search plugin."
        )
    clauses = [
        {"rank_feature": {"field": f"{field}.{token}", "linear": {}, "boost": weight}}
        for token, weight in fitted.items()
    ]
    # An empty bool matches every document.
    query = {"bool": {"should": clauses}} if clauses else {"match_none": {}}
    return _body(query, field=field, size=size, tokens=len(fitted), **options)


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
    """Return the request of a search whose text the server turns into weights, with a deployed model or an analyzer.

    Args:
        text: The query.
        engine: The engine, its field and its settings.
        size: Number of hits.
        model_id: A deployed model. One of this and `analyzer` is needed.
        analyzer: An analyzer. With neither, OpenSearch since 3.1 would use bert-uncased without a warning: wrong for
            every other vocabulary.
        filter: A query clause that every hit matches.
        explain: The server explains each score.

    Raises:
        UsageError: neither or both of `model_id` and `analyzer` are given, or the text is empty.
    """
    if (model_id is None) == (analyzer is None):
        raise UsageError("Name either a model_id or an analyzer, with which the server makes the weights of the query.")
    if not text.strip():
        raise UsageError("The query is empty, which OpenSearch refuses as query_text. Ask for some words.")
    asked: SearchBody = {"query_text": text}
    asked |= {"model_id": model_id} if model_id is not None else {"analyzer": analyzer}
    if engine.name == "seismic":
        asked["method_parameters"] = _method_parameters(size, engine.seismic, filter)
    query = {"neural_sparse": {engine.field: asked}}
    body = _body(query, field=engine.field, size=size, filter=filter, explain=explain)
    if engine.name == "seismic" and filter:
        body["min_score"] = _LEAST_SCORE
    if engine.name == "two-phase":
        body["search_pipeline"] = _two_phase_pipeline(check_two_phase(engine.two_phase, size=size))
    return body


def hybrid_body(
    text: str,
    weights: Weights,
    engine: Engine,
    *,
    size: int,
    filter: QueryClause | None = None,
    search_pipeline: str | None = None,
    depth: int | None = HYBRID_DEPTH,
    max_clauses: int = MAX_CLAUSES,
) -> SearchBody:
    """Return the request of BM25 on title and text beside a learned-sparse search, whose scores the server combines.

    Args:
        text: The query, for BM25.
        weights: The query weights, for the learned-sparse search.
        engine: The engine of the learned-sparse search.
        size: Number of hits.
        filter: A query clause that every hit matches.
        search_pipeline: Name of an installed pipeline with a normalization or score-ranker processor, whose first
            weight is that of BM25. By default the packaged one is part of the request
            (pipelines/opensearch/search/hybrid.json).
        depth: Number of documents of each search that are combined; None for `size`, which servers before 2.19 need.
            A document below that depth in one search counts as not found by it.
        max_clauses: The most query tokens that the server accepts.

    Raises:
        UsageError: the weights do not fit (see `fit_weights`), or the engine is two-phase, which has no effect there.
    """
    if engine.name == "two-phase":
        raise UsageError(
            "The two-phase processor leaves the parts of a hybrid query alone: "
            "use --engine exact, or leave out --hybrid."
        )
    fitted = fit_weights(weights, max_clauses=max_clauses).weights
    depth = max(size, depth) if depth is not None else None
    parameters = _method_parameters(depth or size, engine.seismic, filter) if engine.name == "seismic" else None
    sparse = _sparse_clause(fitted, engine.field, parameters)
    parts: SearchBody = {"queries": [_filtered(_words_clause(text), filter), _filtered(sparse, filter)]}
    query = {"hybrid": parts | ({"pagination_depth": depth} if depth is not None else {})}
    body = _body(query, field=engine.field, size=size, tokens=len(fitted), max_clauses=max_clauses)
    return body | {"search_pipeline": search_pipeline or packaged_search_pipeline("hybrid")}


def bm25_body(text: str, *, field: str, size: int, filter: QueryClause | None = None) -> SearchBody:
    """Return the request of a BM25 search on title and text, for comparison.

    Args:
        text: The query.
        field: Name of the sparse field, which the hits omit.
        size: Number of hits.
        filter: A query clause that every hit matches.
    """
    return _body(_words_clause(text), field=field, size=size, filter=filter)


class EngineRules(NamedTuple):
    """What an engine is to the rest: the kind of field that it searches, and how its request is made.

    `settings` is its table in [query] and in `Engine`, which `check` refuses where the server would.
    """

    kind: str
    body: Callable[..., SearchBody]
    collapses: bool = True
    settings: str = ""
    check: Callable[[Mapping[str, Any]], object] = dict


# The first engine of a kind of field is taken when none is named. The two-phase processor refuses sparse_vector
# fields, and their clusters never answer exactly.
ENGINES: dict[EngineName, EngineRules] = {
    "exact": EngineRules("rank_features", neural_sparse_body),
    "two-phase": EngineRules("rank_features", two_phase_body, False, "two_phase", check_two_phase),
    "seismic": EngineRules("sparse_vector", seismic_body, True, "seismic", check_seismic),
}


def choose_engine(settings: QuerySettings, kind: str) -> EngineName:
    """Return the engine that [query] names for a kind of field, or the field's own.

    Raises:
        PipelineError: the kind of field does not have the engine, or a setting of any engine is unknown.
    """
    for rules in ENGINES.values():
        if rules.settings:
            rules.check(getattr(settings, rules.settings))
    engines = [name for name, rules in ENGINES.items() if rules.kind == kind]
    name = settings.engine or engines[0]
    if name not in engines:
        raise PipelineError(
            f"The engine {name} cannot search a {kind} field; {' and '.join(engines)} can. "
            "Leave out --engine (or engine in [query]), or load into a field of the other kind with load --kind."
        )
    return name


def packaged_search_pipeline(name: str) -> SearchBody:
    """A packaged search pipeline as a request can carry it."""
    path = packaged_folder() / "opensearch" / "search" / f"{name}.json"
    content: SearchBody = json.loads(path.read_bytes())
    return {key: value for key, value in content.items() if key != "description"}


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


def _sparse_clause(fitted: Mapping[str, float], field: str, parameters: SearchBody | None = None) -> SearchBody:
    """The clause of query tokens; `parameters` are those of the search in clusters."""
    if not fitted:
        return {"match_none": {}}
    asked = {"query_tokens": dict(fitted)} | ({"method_parameters": parameters} if parameters else {})
    return {"neural_sparse": {field: asked}}


def _method_parameters(size: int, settings: Mapping[str, Any], filter: QueryClause | None) -> SearchBody:
    parameters = {**settings, "k": max(size, settings.get("k", 0))}
    return parameters | {"filter": _single_terms(dict(filter))} if filter else parameters


def _single_terms(query: Any) -> Any:
    """The query with a `term` a value in place of each `terms`, on which the filter of clusters fails (3.6.0)."""
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


def _words_clause(text: str) -> SearchBody:
    return {"multi_match": {"query": text, "fields": _WORD_FIELDS, "type": "most_fields"}}


def _filtered(query: SearchBody, filter: QueryClause | None) -> SearchBody:
    """The query, for those documents only that `filter` matches.

    It stands in `should`, where alone the two-phase processor looks for it, and must match: beside a filter a `should`
    need not, and documents without any of its tokens would be hits with score 0.
    """
    if not filter:
        return query
    return {"bool": {"should": [query], "minimum_should_match": 1, "filter": [dict(filter)]}}


def _fitted(weights: Weights, options: BodyOptions) -> dict[str, float]:
    return fit_weights(weights, max_clauses=options.get("max_clauses", MAX_CLAUSES)).weights


def _body(
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
    """The request of a query. With `tokens`, how many of its clauses are sparse ones, the clauses are counted."""
    query = _filtered(query, filter)
    if tokens is not None:
        check_clauses(tokens, count_clauses(query) - tokens, max_clauses=max_clauses)
    body: SearchBody = {"size": size, "_source": {"excludes": [field]}, "query": query}
    if collapse is not None:
        body["collapse"] = {"field": collapse}
    return body | {"explain": True} if explain else body
