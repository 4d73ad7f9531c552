"""How sparse queries and documents are, and what a search costs by that.

In: how many documents, or queries, hold each token. Out: active dimensions (terms of one, on average), sparsity (the
share of the vocabulary that one leaves at zero, on average) and FLOPS: the expected number of terms that a query and a
document share, the sum over tokens of the share of queries times the share of documents that hold it. That is the
measure of Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations" (ICLR 2020), as the papers on
SPLADE print it.
Not covered: what a search with pruning or clusters really visits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TermCounts:
    """How many were counted, and of these how many hold each token."""

    count: int
    holding: Mapping[str, int]


@dataclass(frozen=True)
class Sparsity:
    """Active dimensions and sparsity; `sparsity` is None where the size of the vocabulary is not known."""

    count: int
    active_dimensions: float
    sparsity: float | None


class QueryTerms:
    """Counts the terms of queries that pass through."""

    def __init__(self) -> None:
        self._count = 0
        self._holding: Counter[str] = Counter()

    def passing(self, queries: Iterable[tuple[str, dict[str, float]]]) -> Iterator[tuple[str, dict[str, float]]]:
        """The same queries, counted on their way."""
        for query_id, weights in queries:
            self._count += 1
            self._holding.update(weights.keys())
            yield query_id, weights

    def counts(self) -> TermCounts:
        """What passed so far."""
        return TermCounts(self._count, self._holding)


def sparsity(counts: TermCounts, vocabulary: int | None) -> Sparsity:
    """Active dimensions and sparsity of what was counted; `vocabulary` is the number of dimensions."""
    mean = sum(counts.holding.values()) / counts.count if counts.count else 0.0
    return Sparsity(counts.count, mean, 1 - mean / vocabulary if vocabulary else None)


def flops(queries: TermCounts, documents: TermCounts) -> float:
    """The expected number of terms that a query and a document share."""
    if not queries.count or not documents.count:
        return 0.0
    shared = sum(number * documents.holding.get(token, 0) for token, number in queries.holding.items())
    return shared / queries.count / documents.count


def pooled(parts: Iterable[TermCounts]) -> TermCounts:
    """The counts of all parts together."""
    count, holding = 0, Counter[str]()
    for part in parts:
        count += part.count
        holding.update(part.holding)
    return TermCounts(count, holding)
