"""What a sparse field keeps of a weight, and the score that a query gets from it.

A rank_features field stores `floatToIntBits(weight) >>> 15`: sign, exponent and the upper 8 bits of the mantissa, 9
significant bits, cut off and never rounded. A search multiplies query weight and stored weight in float32, adds the
products in double and casts the sum to float32 once. Both are bit for bit what OpenSearch 3.6.0 returns (tests/
opensearch/test_scores.py asks it), whatever the order of the clauses. A sparse_vector field stores the same, and in
segments with clusters a byte besides: round(min(weight, ceiling) · 255 / ceiling).
The two-phase processor adds two such sums (two_phase.py says of which tokens). Not covered: scores of bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

DROPPED_BITS = 15
LEVELS = 255  # of the byte that a sparse_vector field keeps
# The smallest normal float32: a document with a smaller weight is refused whole.
LOWEST_WEIGHT = float(np.finfo(np.float32).tiny)


def weight_codes(weights: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint32]:
    """The 16-bit number that the index stores for each weight, as a term frequency."""
    return np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32) >> np.uint32(DROPPED_BITS)


def stored_weights(weights: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """What the index keeps of each weight."""
    return (weight_codes(weights) << np.uint32(DROPPED_BITS)).view(np.float32)


def stored_bytes(weights: npt.NDArray[np.floating[Any]], ceiling: float) -> npt.NDArray[np.uint8]:
    """The byte that a sparse_vector field keeps of each weight, in segments with clusters."""
    top = np.float32(ceiling)
    scaled = np.minimum(np.asarray(weights, dtype=np.float32), top) * np.float32(LEVELS) / top
    # The server rounds halves up; in double the sum is exact.
    return np.floor(scaled.astype(np.float64) + 0.5).astype(np.uint8)


def score(query_weights: npt.NDArray[np.floating[Any]], weights: npt.NDArray[np.floating[Any]]) -> np.float32:
    """The score of one document: its weights, aligned with the query's, of the tokens that both have."""
    products = np.asarray(query_weights, dtype=np.float32) * stored_weights(weights)
    return np.float32(np.sum(products, dtype=np.float64))


def two_phase_score(first: np.float32, second: np.float32) -> np.float32:
    """The score of a document in the window, from those of its phases; outside it keeps that of the first."""
    return np.float32(first + second)
