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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass
class TermCounts:
    """How many queries or documents were counted, and of these how many hold each token."""

    count: int = 0
    holding: Counter[str] = field(default_factory=Counter)

    def passing(self, queries: Iterable[tuple[str, dict[str, float]]]) -> Iterator[tuple[str, dict[str, float]]]:
        """Yield the same queries, and count them."""
        for query_id, weights in queries:
            self.count += 1
            self.holding.update(weights.keys())
            yield query_id, weights


@dataclass(frozen=True)
class Sparsity:
    """Active dimensions and sparsity; `sparsity` is None where the size of the vocabulary is not known."""

    count: int
    active_dimensions: float
    sparsity: float | None


def sparsity(counts: TermCounts, vocabulary: int | None) -> Sparsity:
    """Active dimensions and sparsity of what was counted; `vocabulary` is the number of dimensions."""
    mean = sum(counts.holding.values()) / counts.count if counts.count else 0.0
    return Sparsity(counts.count, mean, 1 - mean / vocabulary if vocabulary else None)


def flops(queries: TermCounts, documents: TermCounts) -> float:
    """The expected number of terms that a query and a document share."""
    if not queries.count or not documents.count:
        return 0.0
    shared = sum(number * documents.holding[token] for token, number in queries.holding.items())
    return shared / queries.count / documents.count


def pooled(parts: Iterable[TermCounts]) -> TermCounts:
    """The counts of all parts together."""
    together = TermCounts()
    for part in parts:
        together.count += part.count
        together.holding.update(part.holding)
    return together
