"""Attention in bfloat16 for CPUs with AMX: one compiled function for all heads and documents of a batch.

In: query, key and value of packed documents. Out: attention within each document. Products are tiles of AMX, and the
scores of 16 queries stay in the cache. It takes a fifth to a half of the time of torch's attention, which also compiles
its products anew for every length. Documents of fewer than 16 tokens and sliding windows are left to torch
(packing.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_ingest.errors import first_line
from sparse_ingest.models.amx_attention_text import BLOCK, KEYS, attention_text
from sparse_ingest.models.compiled import ADDRESS, NUMBER, REAL, compile_function
from sparse_ingest.models.heads.cpu_kernel_text import TILE_BYTES
from sparse_ingest.models.linear import has_amx, may_use_tiles

SHORTEST = BLOCK  # tokens of a document
WIDTHS = (32, 64)  # of a head: the sums of a block are at most four tiles
CLOSE = 2e-2  # largest difference to torch's attention in the trial, as a share of the largest number
TRIAL = (16, 33, 64, 3, 47, 100, 17, 32)  # lengths of documents
logger = logging.getLogger(__name__)


class Attention:
    """Attention within documents of at least `BLOCK` tokens, for heads of `width` numbers."""

    def __init__(self, width: int) -> None:
        self._width = width
        kinds = (*[ADDRESS] * 4, *[NUMBER] * 4, REAL, *[ADDRESS] * 2)
        self._attend = compile_function("\n".join(attention_text(width)), "attend", *kinds, feature="amx-bf16")

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: Sequence[tuple[int, int]],
        scale: float, found: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write the attention of documents to `found`, `[rows, heads, width]`.

        The others are `[heads, rows, width]`. `places` has the first row of each document and the one behind its last.
        """
        if query.stride(2) != 1 or not query.stride() == key.stride() == value.stride():
            query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        ends = np.array(places, dtype=np.int64)
        keys = int((ends[:, 1] - ends[:, 0]).max()) + KEYS
        # Per key: its part of all values, the scores and the shares of a block; then sums, queries and totals.
        scratch = torch.empty(
            keys * (self._width * 2 + BLOCK * 6) + (self._width * 2 + 2) * TILE_BYTES, dtype=torch.uint8
        )
        self._attend(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), ends.ctypes.data, len(ends), len(query),
            query.stride(1) * 2, query.stride(0) * 2, scale * math.log2(math.e),
            -(-scratch.data_ptr() // TILE_BYTES) * TILE_BYTES, found.data_ptr(),
        )  # fmt: skip


@cache
def attention_of(width: int) -> Attention | None:
    """Return the attention for heads of this width; None if this CPU has no AMX, or it does not agree with torch's."""
    if width not in WIDTHS or not has_amx() or not may_use_tiles():
        return None
    try:
        attention = Attention(width)
        if _agrees(attention, width):
            return attention
        logger.warning("Compiled attention is not used: its numbers differ. Continuing with torch's, which is slower.")
    except (ImportError, RuntimeError) as error:
        logger.info("Compiled attention is not used, which is faster: %s.", first_line(error))
    return None


def _agrees(attention: Attention, width: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    ends = np.cumsum(TRIAL).tolist()
    # As models give them: rows of three tensors side by side.
    rows = torch.randn(ends[-1], 3, 2, width, generator=generator).mul_(2).to(torch.bfloat16)
    query, key, value = rows.permute(1, 2, 0, 3)
    found = torch.zeros(ends[-1], 2, width, dtype=torch.bfloat16)
    places = [(end - length, end) for length, end in zip(TRIAL, ends, strict=True) if length >= BLOCK]
    attention(query, key, value, places, width**-0.5, found)
    for start, end in places:
        own = (tensor[:, start:end].float() for tensor in (query, key, value))
        expected = scaled_dot_product_attention(*own).transpose(0, 1)
        if not (found[start:end].float() - expected).abs().amax() <= CLOSE * expected.abs().amax():
            return False
    return True
