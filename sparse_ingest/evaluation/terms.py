"""Active dimensions, sparsity and FLOPS of queries and documents.

FLOPS is the expected number of terms that a query and a document share: the sum over tokens of the share of queries
times the share of documents that have it. Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations"
(ICLR 2020), as in the SPLADE papers. Searches with pruning or clusters visit fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class TermCounts:
    """The number of queries or documents, and how many of them have each token."""

    count: int = 0
    frequencies: Counter[str] = field(default_factory=Counter)

    def passing(self, queries: Iterable[tuple[str, dict[str, float]]]) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield the same queries, and count them."""
        for query_id, weights in queries:
            self.count += 1
            self.frequencies.update(weights.keys())
            yield query_id, weights


@dataclass(frozen=True)
class Sparsity:
    """Mean active dimensions, and the mean share of zeros."""

    count: int
    active_dimensions: float
    sparsity: float


def sparsity(counts: TermCounts, vocabulary: int) -> Sparsity:
    """Return active dimensions and sparsity; `vocabulary` is the number of dimensions."""
    mean = sum(counts.frequencies.values()) / counts.count if counts.count else 0.0
    return Sparsity(counts.count, mean, 1 - mean / max(1, vocabulary))


def flops(queries: TermCounts, documents: TermCounts) -> float:
    """Return the expected number of terms that a query and a document share."""
    if not queries.count or not documents.count:
        return 0.0
    shared = sum(number * documents.frequencies[token] for token, number in queries.frequencies.items())
    return shared / queries.count / documents.count


def pooled(parts: Iterable[TermCounts]) -> TermCounts:
    """Return the sum of all counts."""
    together = TermCounts()
    for part in parts:
        together.count += part.count
        together.frequencies.update(part.frequencies)
    return together
