"""Attention in bfloat16 for CPUs with AMX: one compiled call for all heads and documents of a batch.

In: query, key and value of packed documents. Out: attention within each document. Products run on AMX tiles; the
scores of 16 queries stay in the cache. A batch of documents of 128 tokens takes a quarter of the time of torch's
attention, of 512 tokens half, of 2,000 tokens two thirds. Sliding windows use torch (packing.py).
"""

from __future__ import annotations

import logging
import math
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_ingest.errors import first_line
from sparse_ingest.models.compiled import ADDRESS, NUMBER, REAL, compile_function
from sparse_ingest.models.cpu_attention_products import BLOCK, KEYS
from sparse_ingest.models.cpu_attention_text import attention_text
from sparse_ingest.models.heads.cpu_kernel_text import TILE_BYTES
from sparse_ingest.models.linear import has_amx, may_use_tiles
from sparse_ingest.models.memory import is_out_of_memory

WIDTHS = (32, 64)  # supported widths of a head: the sums of a block are at most four tiles
CLOSE = 2e-2  # largest difference from torch's attention in the trial, relative to the largest value
TRIAL = (16, 33, 64, 3, 47, 100, 17, 32)  # lengths of documents
logger = logging.getLogger(__name__)


class Attention:
    """Attention within documents for heads of `width` values. Linux must have granted the tiles (`may_use_tiles`)."""

    def __init__(self, width: int) -> None:
        self._width = width
        kinds = (*[ADDRESS] * 4, *[NUMBER] * 4, REAL, *[ADDRESS] * 2)
        self._attend = compile_function("\n".join(attention_text(width)), "attend", *kinds, feature="amx-bf16")

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: npt.NDArray[np.int64],
        scale: float, output: torch.Tensor,
    ) -> None:  # fmt: skip
        """Write the attention of each document to `output`, `[rows, heads, width]`.

        `query`, `key` and `value` are `[heads, rows, width]`. `places` has the first row of each document, ascending,
        and the one behind its last; `BLOCK` rows from the first one on must exist. Other rows may be overwritten.
        """
        if query.stride(2) != 1 or not query.stride() == key.stride() == value.stride():
            query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        keys = int((places[:, 1] - places[:, 0]).max()) + KEYS
        # Bytes per key: its transposed value, and scores and weights of a block. Then sums, queries and denominators.
        size = keys * (self._width * 2 + BLOCK * 6) + (self._width * 2 + 2) * TILE_BYTES
        scratch = torch.empty(size, dtype=torch.uint8)
        self._attend(
            query.data_ptr(), key.data_ptr(), value.data_ptr(), places.ctypes.data, len(places), len(query),
            query.stride(1) * 2, query.stride(0) * 2, scale * math.log2(math.e),
            -(-scratch.data_ptr() // TILE_BYTES) * TILE_BYTES, output.data_ptr(),
        )  # fmt: skip


@cache
def attention_of(width: int) -> Attention | None:
    """Return the attention for heads of this width; None if this CPU has no AMX, or its results are wrong."""
    if width not in WIDTHS or not has_amx() or not may_use_tiles():
        return None
    try:
        if attention := tried_attention(width):
            return attention
        reason = f"its results differ from torch's by more than {CLOSE:.0%}"
    except ImportError as error:
        logger.info("Attention is torch's, which is slower than the compiled one: %s.", first_line(error))
        return None
    except Exception as error:  # a broken llvmlite may raise any type
        if is_out_of_memory(error):  # it may have fit in another process of this run, and the last bits would differ
            raise
        reason = first_line(error)
    logger.warning("The compiled attention is not used: %s. Continuing with torch's, which is slower.", reason)
    return None


def tried_attention(width: int) -> Attention | None:
    """Compile the attention for heads of this width. Return None if its results differ from torch's.

    llvmlite may be missing, or raise any exception.
    """
    attention = Attention(width)
    generator = torch.Generator().manual_seed(0)
    ends = np.cumsum(TRIAL)
    # As models give them: query, key and value side by side in each row.
    rows = torch.randn(int(ends[-1]), 3, 2, width, generator=generator).mul_(2).to(torch.bfloat16)
    query, key, value = rows.permute(1, 2, 0, 3)
    output = torch.zeros(len(rows), 2, width, dtype=torch.bfloat16)
    places = np.stack([ends - TRIAL, ends], axis=1)
    attention(query, key, value, places, width**-0.5, output)
    for start, end in places.tolist():
        q, k, v = (tensor[:, start:end].float() for tensor in (query, key, value))
        expected = scaled_dot_product_attention(q, k, v).transpose(0, 1)
        if not (output[start:end].float() - expected).abs().amax() <= CLOSE * expected.abs().amax():
            return None
    return attention
