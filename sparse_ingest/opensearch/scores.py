"""What a rank_features field keeps of a weight, and the score that a query gets from it.

The field stores `floatToIntBits(weight) >>> 15`: sign, exponent and the upper 8 bits of the mantissa, 9 significant
bits, cut off and never rounded. A search multiplies query weight and stored weight in float32, adds the products in
double and casts the sum to float32 once. Both are bit for bit what OpenSearch 3.6.0 returns (tests/opensearch/
test_scores.py asks it), whatever the order of the clauses.
Not covered: sparse_vector fields, which keep a byte; the two-phase processor, which adds two such sums.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

DROPPED_BITS = 15
# The smallest normal float32: a document with a smaller weight is refused whole.
LOWEST_WEIGHT = float(np.finfo(np.float32).tiny)


def weight_codes(weights: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint32]:
    """The 16-bit number that the index stores for each weight, as a term frequency."""
    return np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32) >> np.uint32(DROPPED_BITS)


def stored_weights(weights: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """What the index keeps of each weight."""
    return (weight_codes(weights) << np.uint32(DROPPED_BITS)).view(np.float32)


def score(query_weights: npt.NDArray[np.floating[Any]], weights: npt.NDArray[np.floating[Any]]) -> np.float32:
    """The score of one document: its weights, aligned with the query's, of the tokens that both have."""
    products = np.asarray(query_weights, dtype=np.float32) * stored_weights(weights)
    return np.float32(np.sum(products, dtype=np.float64))
