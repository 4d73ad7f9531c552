"""The pruning rules that a plan tries, for documents and for queries, scaled to their mean numbers of terms.

A family has rules of one kind, from mild to strict: every term that a rule keeps is kept by all milder ones, on which
sweep.py relies. pruning.py and query.py apply rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparse_ingest.pipeline import in_words as settings_in_words

PruningRule = Mapping[str, Any]  # the arguments of `prune`; empty: all terms
Family = tuple[PruningRule, ...]

ALL_TERMS: PruningRule = {}
_SHARES_OF_TERMS = (1.0, 0.75, 0.5, 0.35, 0.25, 0.15)
_DOCUMENT_RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4)
_MASSES = (0.99, 0.97, 0.95, 0.9, 0.8, 0.7, 0.5)
_QUERY_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


def document_families(mean_terms: float) -> list[Family]:
    """Return the rules to try on documents with this mean number of terms."""
    return [
        tuple({"top_k": count} for count in _counts(mean_terms)),
        tuple({"max_ratio": ratio} for ratio in _DOCUMENT_RATIOS),
        tuple({"alpha_mass": share} for share in _MASSES),
    ]


def query_rules(mean_tokens: float) -> list[PruningRule]:
    """Return the rules to try on queries with this mean number of tokens; the first keeps all."""
    counts = [{"top_k": count} for count in _counts(mean_tokens)]
    return [ALL_TERMS, *counts, *({"max_ratio": ratio} for ratio in _QUERY_RATIOS)]


def rule_text(rule: PruningRule) -> str:
    """Return a rule as shown in tables."""
    return settings_in_words(rule, " and ") or "all"


def as_flags(rule: PruningRule) -> str:
    """Return a rule as options of `load`."""
    return "".join(f" --{name.replace('_', '-')} {value:g}" for name, value in rule.items())


def _counts(mean: float) -> list[int]:
    return sorted({max(1, round(mean * share)) for share in _SHARES_OF_TERMS}, reverse=True)
