"""How many bytes the postings of a sparse field take, from the document frequency of each token.

The layout is Lucene's: a token's documents lie in blocks of 128, each with its gaps between documents in one number of
bits and its 9-bit codes of weights in 15, as those of weights below 2 need; what does not fill a block takes variable
bytes, about two of a gap and three of a code. A token of one document lies in the dictionary alone.
In: frequencies, the number of documents. Out: bytes of one merged segment. tests/planning/test_plan.py compares with
what OpenSearch 3.6.0 writes. The bytes of a block were fitted to one run of 200,000 passages.
Not covered: ids, _source and other fields, which pruning does not change; the clusters of a sparse_vector field.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BLOCK = 128
_CODE_BITS = 15.0
# Of a header, a place in the skip list, the largest code, and the codes that need a 16th bit: up to seven of two bytes.
_BLOCK_BYTES = 18.0
_TAIL_BYTES = 5.0
_DICTIONARY_BYTES = 14.0  # of a token: its string, its frequencies, where its documents are
# The largest of 128 gaps, which sets the bits of all, is 5.4 times their mean when documents lie at random.
_LARGEST_GAP = 5.4


def posting_bytes(frequencies: npt.NDArray[np.int64], documents: int, *, segments: int = 1) -> float:
    """The bytes of the postings of all tokens, in so many segments of equal size."""
    held = frequencies[frequencies > 0] / segments
    size = documents / segments
    blocks = np.floor(held / _BLOCK)
    gap_bits = np.ceil(np.log2(np.maximum(_LARGEST_GAP * size / held, 2.0)))
    # Where documents lie dense, a block is a bit for each of them.
    gap_bits = np.minimum(gap_bits, size / held)
    in_blocks = blocks * (_BLOCK * (gap_bits + _CODE_BITS) / 8 + _BLOCK_BYTES)
    tail = held - blocks * _BLOCK
    in_tails = np.where(held > 1, tail * _TAIL_BYTES, 0.0)
    return float(segments * (in_blocks + in_tails + _DICTIONARY_BYTES).sum())
