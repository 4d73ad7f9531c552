"""Pruning of sparse vectors: which terms of a row stay.

The rules, each on one row, applied in this order and each only when given:

- `min_weight`: keep w >= min_weight.
- `max_ratio`: keep w >= max_ratio * (largest weight of the row). OpenSearch's rule; opensearch-py-ml uses a strict >.
- `top_k`: keep the k heaviest; of equal weights the lower token id stays.

Ties and order of rules are part of a run's identity, so every implementation (numpy here, a device later) must give
these very rows.
"""

from __future__ import annotations

import numpy as np

from sparse_ingest.records import SparseRows


def prune(
    vectors: SparseRows, *, top_k: int | None = None, max_ratio: float | None = None, min_weight: float | None = None
) -> SparseRows:
    """The same rows with fewer terms; token ids stay ascending."""
    if top_k is None and max_ratio is None and min_weight is None:
        return vectors
    weights = vectors.weights.astype(np.float32, copy=False)
    lengths = np.diff(vectors.indptr)
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    kept = np.ones(len(weights), dtype=bool)
    if min_weight is not None:
        kept &= weights >= np.float32(min_weight)
    if max_ratio is not None:
        largest = np.zeros(len(lengths), dtype=np.float32)
        np.maximum.at(largest, row_of, weights)
        kept &= weights >= np.float32(max_ratio) * largest[row_of]
    if top_k is not None:
        # Sorted by row, then weight downwards, then token id: a term's place in its row is its rank.
        order = np.lexsort((vectors.token_ids, -weights, row_of))
        rank = np.empty(len(weights), dtype=np.int64)
        rank[order] = np.arange(len(weights)) - vectors.indptr[row_of[order]]
        kept &= rank < top_k
    return vectors.keep(kept)
