"""Limits of queries: weights in (0, 64], the number of clauses, the settings of engines.

Lucene counts the clauses of the complete query after rewriting: each token, each filter and each word of the other part
of a hybrid search (3.6.0). The second phase of a two-phase search adds the light tokens to the best `size` times
`expansion_rate` documents of each shard, the window.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from sparse_ingest.cluster.dialects import MAX_CLAUSES
from sparse_ingest.errors import PipelineError, UsageError
from sparse_ingest.pipeline import HybridSettings, changed
from sparse_ingest.records import check_weights

CLAUSE_SETTING = "(on OpenSearch indices.query.bool.max_clause_count; on Elasticsearch its heap decides)"
MAX_WEIGHT = 64.0  # Lucene's FeatureField takes weights in (0, 64]
_LEAST_WEIGHT = 2.0**-149  # of float32

# The defaults of neural_sparse_two_phase_processor.
TWO_PHASE_DEFAULTS = {"prune_type": "max_ratio", "prune_ratio": 0.4, "expansion_rate": 5.0, "max_window_size": 10000}
# The ranges of Elasticsearch's pruning_config: a token is skipped if its document frequency is more than so many times
# the average, and its weight below this share of the best.
_PRUNED = {"tokens_freq_ratio_threshold": (1, 100), "tokens_weight_threshold": (0, 1)}
_LEAST_WINDOW = 50  # the server refuses less
# The possible values of prune_ratio for each prune_type of the two-phase processor.
_RATIOS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "max_ratio": ("a number from 0 to below 1", lambda ratio: 0 <= ratio < 1),
    "alpha_mass": ("a number from 0 to below 1", lambda ratio: 0 <= ratio < 1),
    "abs_value": ("a weight of at least 0", lambda ratio: ratio >= 0),
    "top_k": ("an integer above zero", lambda ratio: ratio > 0 and ratio == int(ratio)),
}


class FittedWeights(NamedTuple):
    """Query weights within the limits of a cluster, divided by `scale`: multiply scores with it."""

    weights: dict[str, float]
    scale: float


def fit_weights(weights: Mapping[str, float] | FittedWeights, *, max_clauses: int = MAX_CLAUSES) -> FittedWeights:
    """Divide query weights by a power of two, if one is above 64. This changes only the exponent of a score.

    Args:
        weights: Query weights by token. Fitted ones are returned as they are.
        max_clauses: The maximum of query tokens that the server accepts.

    Raises:
        UsageError: a weight is not above zero within float32 range, or there are more tokens than `max_clauses`.
    """
    if isinstance(weights, FittedWeights):
        return weights
    check_clauses(len(weights), 0, max_clauses=max_clauses)
    check_weights(weights)
    scale, heaviest = 1.0, max(map(float, weights.values()), default=0.0)
    while heaviest > MAX_WEIGHT * scale:
        scale *= 2
    # The server refuses a weight that is zero in float32.
    fitted = {token: max(float(weight) / scale, _LEAST_WEIGHT) for token, weight in weights.items()}
    return FittedWeights(fitted, scale)


def check_clauses(tokens: int, others: int, *, max_clauses: int = MAX_CLAUSES) -> None:
    """Raise `UsageError` if a query has more clauses, of tokens and others, than the cluster allows."""
    if tokens + others > max_clauses:
        more = f" and {others} other clauses" if others else ""
        advice = f"Prune it, for example with --set query.top_k={max_clauses - others}."
        if others >= max_clauses:
            advice = "Shorten the filter (a single terms query can hold many values), or the text of a hybrid search."
        raise UsageError(
            f"The query has {tokens} tokens{more}, but the cluster allows {max_clauses} clauses {CLAUSE_SETTING}. "
            f"{advice}"
        )


def count_clauses(query: Mapping[str, Any]) -> int:
    """Return the number of clauses of a query. An analyzer may change the number of words, which is not considered."""
    try:
        return sum(_clauses_of(name, content) for name, content in query.items())
    except (AttributeError, KeyError, TypeError):
        return 1  # malformed: the server explains it better


def _clauses_of(name: str, content: Any) -> int:
    if name == "sparse_vector":
        return len(content["query_vector"])
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
    """Raise `PipelineError` if a setting of SEISMIC is unknown or not above zero."""
    _refuse_unknown("seismic", settings, ("heap_factor", "k", "top_n"))
    for name, value in settings.items():
        fits, expected = (is_number, "a number") if name == "heap_factor" else (_is_integer, "an integer")
        if not fits(value) or value <= 0:
            raise PipelineError(f"[query] seismic.{name} = {value!r}; expected {expected} above zero.")


def check_hybrid(settings: HybridSettings, engine: str = "exact") -> None:
    """Raise `PipelineError` if settings of a hybrid search have no effect, or the server refuses them together."""
    given = changed(settings)
    others = sorted(given.keys() & HybridSettings.__dataclass_fields__.keys() - {"hybrid"})
    if settings.hybrid is None and others:
        raise PipelineError(f"{others[0]} has no effect without a hybrid search. Set hybrid = true (--hybrid) too.")
    weights = settings.hybrid_weights or (0.5, 0.5)
    if not (min(weights) >= 0 and math.isclose(sum(weights), 1, abs_tol=1e-3)):
        raise PipelineError(f"hybrid_weights = {list(weights)}; expected two numbers from 0 to 1 that sum to 1.")
    if settings.hybrid_combination == "rrf" and settings.hybrid_normalization:
        raise PipelineError("hybrid_combination rrf combines ranks, which are not normalized: omit the normalization.")
    if settings.hybrid_normalization == "z_score" and settings.hybrid_combination not in (None, "arithmetic_mean"):
        raise PipelineError(
            "OpenSearch combines z_score by arithmetic_mean only. Change hybrid_combination or hybrid_normalization."
        )
    if settings.hybrid and engine == "two-phase":
        raise PipelineError("Two-phase has no effect in a hybrid query. Use --engine exact, or --no-hybrid.")


def check_pruned(settings: Mapping[str, Any]) -> None:
    """Raise `PipelineError` if a setting of Elasticsearch's pruning is unknown or out of its range."""
    _refuse_unknown("pruned", settings, _PRUNED)
    for name, value in settings.items():
        least, most = _PRUNED[name]
        if not is_number(value) or not least <= value <= most:
            raise PipelineError(f"[query] pruned.{name} = {value!r}; expected a number from {least} to {most}.")


def check_two_phase(settings: Mapping[str, Any], *, size: int = 10) -> dict[str, Any]:
    """Return the settings of the two-phase processor with its defaults, or raise `UsageError` for an invalid one."""
    _refuse_unknown("two_phase", settings, TWO_PHASE_DEFAULTS)
    full = {**TWO_PHASE_DEFAULTS, **settings}
    kind, ratio = full["prune_type"], full["prune_ratio"]
    if kind not in _RATIOS:
        raise PipelineError(f"[query] two_phase.prune_type = {kind!r}; expected one of {', '.join(_RATIOS)}.")
    words, ratio_fits = _RATIOS[kind]
    rate, most = full["expansion_rate"], full["max_window_size"]
    for name, fits, expected in (
        ("prune_ratio", is_number(ratio) and ratio_fits(ratio), f"{words} with prune_type {kind}"),
        ("expansion_rate", is_number(rate) and rate >= 1, "a number of at least 1"),
        ("max_window_size", _is_integer(most) and most >= _LEAST_WINDOW, f"an integer of at least {_LEAST_WINDOW}"),
    ):
        if not fits:
            raise PipelineError(f"[query] two_phase.{name} = {full[name]!r}; expected {expected}.")
    window = two_phase_window(full, size)
    if window > most:
        raise UsageError(
            f"Two-phase search reads {window} documents per shard for {size} hits (expansion_rate {rate:g}), more "
            f"than max_window_size {most}. Request fewer hits, or set max_window_size = {window} in [query] two_phase."
        )
    return full


def two_phase_window(settings: Mapping[str, Any], size: int) -> int:
    """Return how many documents of each shard the second phase reads; the server multiplies in float32."""
    rate = _float32(settings.get("expansion_rate", TWO_PHASE_DEFAULTS["expansion_rate"]))
    return int(_float32(_float32(size) * rate))


def leaves_nothing(weights: Mapping[str, float], settings: Mapping[str, Any]) -> bool:
    """Return whether settings leave none of these weights to the first phase, which alone finds documents.

    The arithmetic is that of neural-search 3.6 (PruneUtils, NeuralSparseTwoPhaseProcessor), in float32.
    """
    kind, ratio, heaviest = settings["prune_type"], _float32(settings["prune_ratio"]), max(weights.values())
    if ratio == 0 or kind == "top_k":
        return False
    if kind == "alpha_mass":
        return _float32(heaviest) > _float32(ratio * _float32(sum(sorted(weights.values(), reverse=True))))
    return heaviest < (ratio if kind == "abs_value" else _float32(ratio * heaviest))


def _refuse_unknown(table: str, settings: Mapping[str, Any], known: Iterable[str]) -> None:
    if unknown := sorted(settings.keys() - set(known)):
        raise PipelineError(f"[query] {table} has a key {unknown[0]!r}; known are {', '.join(sorted(known))}.")


def _words(content: Mapping[str, Any]) -> int:
    """Return the number of clauses of a full-text query: each of its words on each of its fields."""
    fields = len(content.get("fields", [""]))
    text = content.get("query", "") if "fields" in content else next(iter(content.values()), "")
    text = text.get("query", "") if isinstance(text, Mapping) else text
    return fields * max(1, len(set(re.findall(r"\w+", str(text).lower()))))


def _is_integer(value: object) -> bool:
    return type(value) is int


def is_number(value: object) -> bool:
    """Return whether a value of a settings table is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
