"""Query weights to `_search` bodies (plain dicts, ready to be sent or printed as JSON), and explanations to terms.

Both bodies for a rank_features field give the same score: the sum over the query's tokens of query weight times stored
weight. A sparse_vector field has a body of its own, whose tokens are ids.
Not covered: sending them, and the limits of a cluster that was set up differently (pass `max_clauses`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sparse_ingest.errors import UsageError

Body = dict[str, Any]

# How a segment with clusters explains one token of a score.
CONTRIBUTION = re.compile(r"token '(\d+)' contribution: query_weight=(\d+) \* doc_weight=(\d+)")

MAX_WEIGHT = 64.0  # Lucene's FeatureField takes weights in (0, 64]
MAX_CLAUSES = 1024  # default of indices.query.bool.max_clause_count, counted over the whole rewritten query


class FittedWeights(NamedTuple):
    """Query weights within the limits of a cluster; a score it gives times `scale` is the score of the query."""

    weights: dict[str, float]
    scale: float


def fit_weights(weights: Mapping[str, float], *, max_clauses: int = MAX_CLAUSES) -> FittedWeights:
    """Bring query weights into (0, 64] by one power of two for all, which changes no bit of a score but its exponent.

    Raises:
        UsageError: a weight is not above zero or not finite, or there are more tokens than clauses allowed.
    """
    if len(weights) > max_clauses:
        raise UsageError(
            f"The query has {len(weights)} tokens, but the cluster allows {max_clauses} clauses "
            f"(indices.query.bool.max_clause_count). Prune it, such as --set query.top_k={max_clauses}."
        )
    for token, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UsageError(f"The query weight of {token!r} is {weight}; expected a finite number above zero.")
    scale = 1.0
    while max(weights.values(), default=0.0) > MAX_WEIGHT * scale:
        scale *= 2
    return FittedWeights({token: weight / scale for token, weight in weights.items()}, scale)


def neural_sparse_body(
    weights: Mapping[str, float],
    *,
    field: str,
    size: int,
    explain: bool = False,
    max_clauses: int = MAX_CLAUSES,
    collapse: str | None = None,
) -> Body:
    """The request of a learned-sparse search; without any weight it asks for nothing, which is a valid request.

    `collapse` is a field of one value (keyword or number): of the documents that share one, the best is found.

    Raises:
        UsageError: the weights do not fit; see `fit_weights`.
    """
    fitted = fit_weights(weights, max_clauses=max_clauses).weights
    query: Body = {"neural_sparse": {field: {"query_tokens": fitted}}} if fitted else {"match_none": {}}
    return _body(query, field=field, size=size, explain=explain, collapse=collapse)


def seismic_body(
    weights: Mapping[str, float],
    *,
    field: str,
    size: int,
    settings: Mapping[str, Any],
    explain: bool = False,
    max_clauses: int = MAX_CLAUSES,
    collapse: str | None = None,
) -> Body:
    """The search of a sparse_vector field; `weights` are by token id, `settings` are `top_n` and `heap_factor`.

    The server leaves both at 10 and 1.0, and gives no more than `k` hits of a segment, so k is what is asked for.

    Raises:
        UsageError: the weights do not fit (see `fit_weights`), or there are other settings.
    """
    unknown = sorted(settings.keys() - {"top_n", "heap_factor"})
    if unknown:
        raise UsageError(f"[query] seismic has a key {unknown[0]!r}; known are top_n and heap_factor.")
    body = neural_sparse_body(
        weights, field=field, size=size, explain=explain, max_clauses=max_clauses, collapse=collapse
    )
    if "neural_sparse" in body["query"]:
        body["query"]["neural_sparse"][field]["method_parameters"] = {"k": size, **settings}
    return body


def rank_feature_body(
    weights: Mapping[str, float],
    *,
    field: str,
    size: int,
    explain: bool = False,
    max_clauses: int = MAX_CLAUSES,
    collapse: str | None = None,
) -> Body:
    """The same search for a cluster without the neural-search plugin.

    Raises:
        UsageError: the weights do not fit (see `fit_weights`), or a token holds a dot: `rank_feature` takes what
            stands after the last dot of its field for the feature (tried on 3.6.0), so it can never find that token.
    """
    dotted = [token for token in weights if "." in token]
    if dotted:
        raise UsageError(
            f"The token {dotted[0]!r} holds a dot, which a rank_feature query cannot ask for. "
            "Leave it out, or use a cluster with the neural-search plugin."
        )
    fitted = fit_weights(weights, max_clauses=max_clauses).weights
    clauses = [
        {"rank_feature": {"field": f"{field}.{token}", "linear": {}, "boost": weight}}
        for token, weight in fitted.items()
    ]
    # An empty bool matches every document.
    query: Body = {"bool": {"should": clauses}} if clauses else {"match_none": {}}
    return _body(query, field=field, size=size, explain=explain, collapse=collapse)


def bm25_body(text: str, *, field: str, size: int) -> Body:
    """The request of a BM25 search on title and text, for comparison; `field` is the sparse field to leave out."""
    query = {"multi_match": {"query": text, "fields": ["title", "text"], "type": "most_fields"}}
    return _body(query, field=field, size=size, explain=False)


def _body(query: Body, *, field: str, size: int, explain: bool, collapse: str | None = None) -> Body:
    body: Body = {"size": size, "_source": {"excludes": [field]}, "query": query}
    if collapse is not None:
        body["collapse"] = {"field": collapse}
    return body | {"explain": True} if explain else body


class ExplainedTerm(NamedTuple):
    """What one token gave to a score, in the words of the server: query weight, stored weight, their product."""

    token: str
    query_weight: float
    stored_weight: float
    contribution: float


def explained_terms(explanation: Mapping[str, Any], field: str) -> Iterator[ExplainedTerm]:
    """The terms in the `_explanation` of a hit, of any sparse body.

    The tree is one node for each matching token, under a node "sum of:" when the query has more than one. Such a node
    says "Linear function on the F field for the T feature, computed as w * S from:" and has two details: w, the
    weight in the query, and S, what the index stored. Clusters of a sparse_vector field have a node of their own,
    which names the `top_n` heaviest tokens of the query; the score may hold more.
    """
    description, details = explanation["description"], explanation["details"]
    before, after = f"Linear function on the {field} field for the ", " feature, computed as w * S from:"
    # By prefix and suffix: a token may hold any character, also the words of the description.
    if description.startswith(before) and description.endswith(after):
        weight, stored = (float(detail["value"]) for detail in details)
        token = description[len(before) : -len(after)]
        yield ExplainedTerm(token, weight, stored, float(explanation["value"]))
    elif description.startswith("sparse_ann score for doc "):
        yield from _clustered_terms(details)
    else:
        for detail in details:
            yield from explained_terms(detail, field)


def _clustered_terms(details: Sequence[Mapping[str, Any]]) -> Iterator[ExplainedTerm]:
    """The terms of a document in clusters; weights are bytes there, of the ceilings that are named beside them."""
    [raw] = (part for part in details if part["description"].startswith("raw dot product"))
    [scaling] = (part for part in details if part["description"].startswith("quantization rescaling"))
    boost, ceiling_ingest, ceiling_search, levels = (float(part["value"]) for part in scaling["details"])
    for part in raw["details"]:
        if named := CONTRIBUTION.fullmatch(part["description"]):
            asked, stored = int(named[2]) * boost * ceiling_search / levels, int(named[3]) * ceiling_ingest / levels
            yield ExplainedTerm(named[1], asked, stored, float(part["value"]) * float(scaling["value"]))
