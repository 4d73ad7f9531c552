"""What a cluster takes of a query: weights in (0, 64], so many clauses, known settings of an engine.

In: query weights, a query, the settings of an engine. Out: the weights, scaled where they must be, or one sentence
that says what does not fit. Lucene counts clauses over the whole query as it is after rewriting: each token, each
filter and each word of the other leg of a hybrid search (tried on 3.6.0).
Not covered: the two-phase processor (two_phase.py); limits that a cluster sets for itself (pass `max_clauses`;
cluster/indexes.py asks for it).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from sparse_ingest.errors import PipelineError, UsageError

MAX_WEIGHT = 64.0  # Lucene's FeatureField takes weights in (0, 64]
MAX_CLAUSES = 1024  # default of indices.query.bool.max_clause_count


class FittedWeights(NamedTuple):
    """Query weights within the limits of a cluster; a score it gives times `scale` is the score of the query."""

    weights: dict[str, float]
    scale: float


def fit_weights(weights: Mapping[str, float] | FittedWeights, *, max_clauses: int = MAX_CLAUSES) -> FittedWeights:
    """Bring query weights into (0, 64] by one power of two for all, which changes no bit of a score but its exponent.

    Weights that are fitted already are returned as they are.

    Raises:
        UsageError: a weight is not above zero or not finite, or there are more tokens than clauses allowed.
    """
    if isinstance(weights, FittedWeights):
        return weights
    _refuse_clauses(len(weights), 0, max_clauses)
    for token, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UsageError(f"The query weight of {token!r} is {weight}; expected a finite number above zero.")
    scale = 1.0
    while max(weights.values(), default=0.0) > MAX_WEIGHT * scale:
        scale *= 2
    return FittedWeights({token: weight / scale for token, weight in weights.items()}, scale)


def check_clauses(query: Mapping[str, Any], tokens: int, *, max_clauses: int = MAX_CLAUSES) -> None:
    """Refuse a query with more clauses than a cluster allows; `tokens` of them are sparse ones.

    Raises:
        UsageError: how many there are of each sort.
    """
    _refuse_clauses(tokens, count_clauses(query) - tokens, max_clauses)


def count_clauses(query: Mapping[str, Any]) -> int:
    """How many clauses a query has. Words of a full-text query are counted as written; an analyzer may make others."""
    try:
        return sum(_clauses_of(name, content) for name, content in query.items())
    except (AttributeError, KeyError, TypeError):
        return 1  # malformed, which the server says better


def _clauses_of(name: str, content: Any) -> int:
    if name == "neural_sparse":
        # The filter of clusters is a query of its own.
        return sum(len(entry.get("query_tokens", ())) for entry in content.values())
    if name == "bool":
        parts = (content.get(part, ()) for part in ("must", "should", "filter", "must_not"))
        inner = [one for part in parts for one in (part if isinstance(part, list) else [part] if part else [])]
        return sum(map(count_clauses, inner))
    if name in ("hybrid", "dis_max"):
        filters = [content["filter"]] if content.get("filter") else []
        return sum(map(count_clauses, [*content["queries"], *filters]))
    if name in ("constant_score", "nested", "function_score", "script_score", "has_child", "has_parent"):
        return count_clauses(content.get("filter") or content.get("query") or {"match_all": {}})
    if name in ("match", "multi_match", "match_bool_prefix"):
        return _words(content)
    return int(name != "match_none")


def check_seismic(settings: Mapping[str, Any]) -> None:
    """Refuse settings of SEISMIC that the server would.

    Raises:
        PipelineError: a setting is unknown or not above zero.
    """
    refuse_unknown("seismic", settings, {"k": 0, "top_n": 0, "heap_factor": 0})
    for name, value in settings.items():
        whole = name != "heap_factor"
        if not (type(value) is int if whole else is_number(value)) or value <= 0:
            expected = "whole number" if whole else "number"
            raise PipelineError(f"[query] seismic.{name} = {value!r}; expected a {expected} above zero.")


def refuse_unknown(table: str, settings: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse a setting of [query] that nobody knows, naming those that are known."""
    if unknown := sorted(settings.keys() - known.keys()):
        raise PipelineError(f"[query] {table} has a key {unknown[0]!r}; known are {', '.join(sorted(known))}.")


def _refuse_clauses(tokens: int, others: int, max_clauses: int) -> None:
    if tokens + others > max_clauses:
        more, top_k = f" and {others} other clauses" if others else "", max(1, max_clauses - others)
        raise UsageError(
            f"The query has {tokens} tokens{more}, but the cluster allows {max_clauses} clauses "
            f"(indices.query.bool.max_clause_count). Prune it, such as --set query.top_k={top_k}."
        )


def _words(content: Mapping[str, Any]) -> int:
    """The clauses of a full-text query: each of its words on each of its fields."""
    if "fields" in content:
        text, fields = content.get("query", ""), len(content["fields"])
    else:
        [asked] = list(content.values())[:1] or [""]
        text, fields = asked.get("query", "") if isinstance(asked, Mapping) else asked, 1
    return fields * max(1, len(set(re.findall(r"\w+", str(text).lower()))))


def is_number(value: object) -> bool:
    """Whether a value of a settings table is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
