"""Arithmetic of a sparse field: stored weights, and the size of the postings on disk.

In: weights, document frequencies. Out: the value an index keeps of each weight, the bytes of the postings.

A rank_features field stores `floatToIntBits(weight) >>> 15`: sign, exponent and the upper 8 bits of the mantissa. The
lower bits are cut off, never rounded. A search multiplies query weight and stored weight in float32, adds the products
in double and casts the sum to float32 once. Both match OpenSearch 3.6.0 bit for bit, whatever the order of the clauses
(tests/cluster/test_rank_features.py compares). A sparse_vector field stores the same 9 bits and, in segments with
clusters, also a byte: round(min(weight, ceiling) · 255 / ceiling).

Not covered: scores, which a search computes (searching/run_search.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

DROPPED_BITS = 15
LEVELS = 255  # of the byte that a sparse_vector field keeps
# The smallest normal float32. OpenSearch refuses a document with a smaller weight.
LOWEST_WEIGHT = float(np.finfo(np.float32).tiny)

# Lucene stores the documents of a token in blocks of 128: the gaps between documents in one number of bits, the 9-bit
# codes of weights below 2 in 15 bits each. Documents that do not fill a block take variable bytes, about two for a gap
# and three for a code. A token of one document is stored in the dictionary alone.
_BLOCK = 128
_CODE_BITS = 15.0
# A header, an entry of the skip list, the largest code, and up to seven 2-byte codes that need a 16th bit. Fitted to
# one run of 200,000 passages.
_BLOCK_BYTES = 18.0
_TAIL_BYTES = 5.0
_DICTIONARY_BYTES = 14.0  # of a token: its string, its frequencies, the address of its postings
# The largest of 128 gaps sets the bits of all. It is 5.4 times their mean if documents are spread at random.
_LARGEST_GAP = 5.4


def weight_codes(weights: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint32]:
    """Return the 16-bit number that the index stores for each weight, as a term frequency."""
    return np.ascontiguousarray(weights, dtype=np.float32).view(np.uint32) >> np.uint32(DROPPED_BITS)


def stored_weights(weights: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float32]:
    """Return the value that the index keeps of each weight."""
    return (weight_codes(weights) << np.uint32(DROPPED_BITS)).view(np.float32)


def stored_bytes(weights: npt.NDArray[np.floating[Any]], ceiling: float) -> npt.NDArray[np.uint8]:
    """Return the byte that a sparse_vector field keeps of each weight, in segments with clusters."""
    top = np.float32(ceiling)
    scaled = np.minimum(np.asarray(weights, dtype=np.float32), top) * np.float32(LEVELS) / top
    # The server rounds halves up; in double the sum is exact.
    return np.floor(scaled.astype(np.float64) + 0.5).astype(np.uint8)


def posting_bytes(frequencies: npt.NDArray[np.int64], documents: int) -> float:
    """Predict the bytes of the postings of all tokens, in one segment.

    tests/planning/test_plan.py compares with OpenSearch 3.6.0. Ids, `_source` and other fields are not included, nor
    the clusters of a sparse_vector field.

    Args:
        frequencies: how many documents contain each token, shape [vocabulary].
        documents: how many documents the index has.
    """
    held = frequencies[frequencies > 0]
    blocks = np.floor(held / _BLOCK)
    gap_bits = np.ceil(np.log2(np.maximum(_LARGEST_GAP * documents / held, 2.0)))
    # Where documents are dense, a block is a bit for each of them.
    gap_bits = np.minimum(gap_bits, documents / held)
    in_blocks = blocks * (_BLOCK * (gap_bits + _CODE_BITS) / 8 + _BLOCK_BYTES)
    tail = held - blocks * _BLOCK
    in_tails = np.where(held > 1, tail * _TAIL_BYTES, 0.0)
    return float((in_blocks + in_tails + _DICTIONARY_BYTES).sum())
