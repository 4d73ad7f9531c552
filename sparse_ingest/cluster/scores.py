"""Arithmetic of a sparse field: stored weights, and the size of the postings on disk.

A rank_features field stores `floatToIntBits(weight) >>> 15`: sign, exponent and the upper 8 bits of the mantissa,
without rounding. A search multiplies query weight and stored weight in float32, adds the products in double and casts
the sum to float32 once. tests/cluster/test_rank_features.py compares both with OpenSearch 3.6.0, bit for bit. A
sparse_vector field stores the same 9 bits and, in clusters, a byte: round(min(weight, ceiling) · 255 / ceiling).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

DROPPED_BITS = 15
LEVELS = 255  # of the byte that a sparse_vector field keeps
# The smallest normal float32. OpenSearch refuses a document with a smaller weight.
LOWEST_WEIGHT = float(np.finfo(np.float32).tiny)

# Lucene 10.4 (OpenSearch 3.6) stores the documents of a token in blocks of 256, before that of 128: the gaps between
# documents with equally many bits, the codes of weights below 2 in 15 bits each. Outside of blocks, a gap has 1 or 2
# bytes and a code 3. A token of one document is only in the dictionary. For two corpora (1,400 and 6,000 documents)
# these rules give the size of the file to 0.1%.
BLOCK = 256
_CODE_BITS, _CODE_BYTES = 15.0, 3.0
_BLOCK_BYTES = 12.0  # a header and the largest code; the codes that need a 16th bit
_GAP_BYTES = 1.25  # of a gap below 128 documents
DICTIONARY_BYTES = 10.5  # of a token: its string, its frequencies, the address of its postings
_LARGEST_GAP = 6.1  # times the mean of 256 gaps between random documents; it sets the bits of all


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


def posting_bytes(
    frequencies: npt.NDArray[np.int64],
    documents: int,
    *,
    code_bits: float = _CODE_BITS,
    code_bytes: float = _CODE_BYTES,
) -> float:
    """Predict the bytes of the postings of all tokens and of their dictionary, in one segment of an index.

    `frequencies` is the number of documents of each token. A code has `code_bits` in a block and `code_bytes` outside.
    Not included are other fields and the clusters of a sparse_vector field. tests/planning/test_plan.py compares with
    OpenSearch 3.6.0.
    """
    held = frequencies[frequencies > 0]
    blocks = np.floor(held / BLOCK)
    gap_bits = np.ceil(np.log2(np.maximum(_LARGEST_GAP * documents / held, 2.0)))
    # Where documents are dense, a block is a bit for each of them.
    gap_bits = np.minimum(gap_bits, documents / held)
    in_blocks = blocks * (BLOCK * (gap_bits + code_bits) / 8 + _BLOCK_BYTES)
    tail = held - blocks * BLOCK
    # The probability that a gap is longer than 127, if documents are spread at random.
    long_gaps = np.exp(-128 * held / documents)
    in_tails = np.where(held > 1, tail * (_GAP_BYTES + long_gaps + code_bytes), 0.0)
    return float((in_blocks + in_tails).sum()) + len(held) * DICTIONARY_BYTES
