"""What a cluster takes of a query: weights in (0, 64], so many clauses, known settings of an engine.

In: query weights, a query, the settings of an engine. Out: the weights, scaled where they must be, or one sentence
that says what does not fit. Lucene counts clauses over the whole query as it is after rewriting: each token, each
filter and each word of the other leg of a hybrid search (tried on 3.6.0).
In the first phase of a two-phase search the heavy tokens find documents; in the second the light ones are added to the
scores of the best of each shard, `size` times `expansion_rate` of them, the window. The server splits the tokens.
Not covered: limits that a cluster sets for itself (pass `max_clauses`; cluster/indexes.py asks for it).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from sparse_ingest.errors import PipelineError, UsageError

MAX_WEIGHT = 64.0  # Lucene's FeatureField takes weights in (0, 64]
MAX_CLAUSES = 1024  # default of indices.query.bool.max_clause_count

# The defaults of neural_sparse_two_phase_processor; a smaller window than 50 is refused by the server.
TWO_PHASE_DEFAULTS = {"prune_type": "max_ratio", "prune_ratio": 0.4, "expansion_rate": 5.0, "max_window_size": 10000}
LEAST_WINDOW = 50
# What prune_ratio is for each prune_type of the two-phase processor, in words and as a test.
_RATIOS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "max_ratio": ("a number from 0 to below 1", lambda ratio: 0 <= ratio < 1),
    "alpha_mass": ("a number from 0 to below 1", lambda ratio: 0 <= ratio < 1),
    "abs_value": ("a weight of at least 0", lambda ratio: ratio >= 0),
    "top_k": ("a whole number above zero", lambda ratio: ratio > 0 and ratio == int(ratio)),
}


class FittedWeights(NamedTuple):
    """Query weights within the limits of a cluster; a score it gives times `scale` is the score of the query."""

    weights: dict[str, float]
    scale: float


def fit_weights(weights: Mapping[str, float] | FittedWeights, *, max_clauses: int = MAX_CLAUSES) -> FittedWeights:
    """Bring query weights into (0, 64] by one power of two for all, which changes no bit of a score but its exponent.

    Args:
        weights: Query weights by token. Fitted ones are returned as they are.
        max_clauses: The most query tokens that the server accepts.

    Raises:
        UsageError: a weight is not above zero or not finite, or there are more tokens than clauses allowed.
    """
    if isinstance(weights, FittedWeights):
        return weights
    check_clauses(len(weights), 0, max_clauses=max_clauses)
    for token, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UsageError(f"The query weight of {token!r} is {weight}; expected a finite number above zero.")
    scale = 1.0
    while max(weights.values(), default=0.0) > MAX_WEIGHT * scale:
        scale *= 2
    return FittedWeights({token: weight / scale for token, weight in weights.items()}, scale)


def check_clauses(tokens: int, others: int, *, max_clauses: int = MAX_CLAUSES) -> None:
    """Refuse a query with more clauses than a cluster allows, so many of tokens and so many others.

    Raises:
        UsageError: how many there are of each sort.
    """
    if tokens + others > max_clauses:
        more, top_k = f" and {others} other clauses" if others else "", max(1, max_clauses - others)
        raise UsageError(
            f"The query has {tokens} tokens{more}, but the cluster allows {max_clauses} clauses "
            f"(indices.query.bool.max_clause_count). Prune it, such as --set query.top_k={top_k}."
        )


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


def check_two_phase(settings: Mapping[str, Any], *, size: int = 10) -> dict[str, Any]:
    """The settings of the two-phase processor, complete; `size` hits must fit into its window.

    Raises:
        PipelineError: a setting is unknown or out of its range.
        UsageError: the window for `size` documents is larger than max_window_size.
    """
    refuse_unknown("two_phase", settings, TWO_PHASE_DEFAULTS)
    full = {**TWO_PHASE_DEFAULTS, **settings}
    kind, ratio = full["prune_type"], full["prune_ratio"]
    if kind not in _RATIOS:
        raise PipelineError(f"[query] two_phase.prune_type = {kind!r}; expected one of {', '.join(_RATIOS)}.")
    words, fits = _RATIOS[kind]
    if not (is_number(ratio) and fits(ratio)):
        raise PipelineError(f"[query] two_phase.prune_ratio = {ratio!r}; with prune_type {kind} it is {words}.")
    rate, most = full["expansion_rate"], full["max_window_size"]
    if not (is_number(rate) and rate >= 1):
        raise PipelineError(f"[query] two_phase.expansion_rate = {rate!r}; expected a number of at least 1.")
    if not (type(most) is int and most >= LEAST_WINDOW):
        expected = f"expected a whole number of at least {LEAST_WINDOW}"
        raise PipelineError(f"[query] two_phase.max_window_size = {most!r}; {expected}.")
    window = two_phase_window(full, size)
    if window > most:
        raise UsageError(
            f"Two-phase search looks at {window} documents a shard for {size} hits (expansion_rate {rate:g}), more "
            f"than max_window_size {most}. Ask for fewer hits, or set max_window_size = {window} in [query] two_phase."
        )
    return full


def two_phase_window(settings: Mapping[str, Any], size: int) -> int:
    """How many documents of each shard the second phase looks at; the server multiplies in float32."""
    rate = _float32(settings.get("expansion_rate", TWO_PHASE_DEFAULTS["expansion_rate"]))
    return int(_float32(_float32(size) * rate))


def leaves_nothing(weights: Mapping[str, float], settings: Mapping[str, Any]) -> bool:
    """Whether complete settings leave none of these weights to the first phase, which alone finds documents.

    The arithmetic is that of neural-search 3.6 (PruneUtils, NeuralSparseTwoPhaseProcessor), in float32.
    """
    kind, ratio, heaviest = settings["prune_type"], _float32(settings["prune_ratio"]), max(weights.values())
    if ratio == 0 or kind == "top_k":
        return False
    if kind == "alpha_mass":
        return _float32(heaviest) > _float32(ratio * _float32(sum(sorted(weights.values(), reverse=True))))
    return heaviest < (ratio if kind == "abs_value" else _float32(ratio * heaviest))


def refuse_unknown(table: str, settings: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse an unknown setting of [query]; the message lists the known ones."""
    if unknown := sorted(settings.keys() - known.keys()):
        raise PipelineError(f"[query] {table} has a key {unknown[0]!r}; known are {', '.join(sorted(known))}.")


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


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
