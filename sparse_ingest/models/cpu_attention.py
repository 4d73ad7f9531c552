"""Attention for CPUs with AVX2, AVX512 or AMX: one compiled call for all heads and documents of a batch.

In: query, key and value of packed documents, in float32 or bfloat16. Out: attention within each document. The scores of
16 queries stay in the cache. Sliding windows use torch (packing.py).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_ingest.models.compiled import ADDRESS, NUMBER, REAL, compile_function, tried_or_none
from sparse_ingest.models.cpu_attention_products import BLOCK, FORMS, KEYS
from sparse_ingest.models.cpu_attention_text import attention_text
from sparse_ingest.models.heads.cpu_kernel_text import TILE_BYTES
from sparse_ingest.models.linear import KERNEL_DTYPES, fastest_instructions
from sparse_ingest.models.threads import on_threads

WIDTHS = (32, 64)  # supported widths of a head: the sums of a block are at most four tiles
# Largest difference from torch's attention in the trial, relative to the largest value.
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TRIAL = (16, 33, 64, 3, 47, 100, 17, 32)  # lengths of documents


class Attention:
    """Attention within documents for heads of `width` numbers. Linux must have granted the tiles (`may_use_tiles`)."""

    def __init__(self, width: int, dtype: torch.dtype, instructions: str) -> None:
        self._width, self._bytes = width, dtype.itemsize
        form = FORMS[KERNEL_DTYPES[dtype], instructions]
        kinds = (*[ADDRESS] * 4, *[NUMBER] * 5, REAL, *[ADDRESS] * 2)
        self._attend = compile_function("\n".join(attention_text(form, width)), "attend", *kinds, feature=form.feature)

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
        lengths = places[:, 1] - places[:, 0]
        keys = int(lengths.max()) + KEYS
        # Bytes per key: it and its value, and scores and weights of a block. Then sums, queries and denominators.
        row = self._width * self._bytes
        size = keys * (2 * row + BLOCK * (4 + self._bytes)) + (self._width * 4 + row) * BLOCK + 2 * TILE_BYTES

        def attend(heads: slice) -> None:
            scratch = torch.empty(size, dtype=torch.uint8)
            addresses = (tensor[heads].data_ptr() for tensor in (query, key, value))
            self._attend(
                *addresses, places.ctypes.data, len(places), heads.stop - heads.start, len(query) * row,
                query.stride(1) * self._bytes, query.stride(0) * self._bytes, scale * math.log2(math.e),
                -(-scratch.data_ptr() // TILE_BYTES) * TILE_BYTES, output[:, heads].data_ptr(),
            )  # fmt: skip

        on_threads(attend, len(query), operations=4 * len(query) * self._width * int((lengths**2).sum()))


@cache
def attention_of(width: int, dtype: torch.dtype) -> Attention | None:
    """Return the attention for heads of this width; None if this CPU has none, or its results are wrong."""
    instructions = instructions_for(dtype, width)
    if instructions is None:
        return None
    return tried_or_none(lambda: tried_attention(width, dtype, instructions), "attention")


def instructions_for(dtype: torch.dtype, width: int) -> str | None:
    """Return the instructions of this CPU for the attention, or None if there is no attention for them."""
    instructions = fastest_instructions(dtype)
    return instructions if width in WIDTHS and (KERNEL_DTYPES.get(dtype), instructions) in FORMS else None


def tried_attention(width: int, dtype: torch.dtype, instructions: str) -> Attention | None:
    """Compile the attention for heads of this width. Return None if its results differ from torch's.

    llvmlite may be missing, or raise any exception.
    """
    attention = Attention(width, dtype, instructions)
    generator = torch.Generator().manual_seed(0)
    ends = np.cumsum(TRIAL)
    # As models give them: query, key and value side by side in each row.
    rows = torch.randn(int(ends[-1]), 3, 2, width, generator=generator, dtype=torch.float32).mul_(2).to(dtype)
    query, key, value = rows.permute(1, 2, 0, 3)
    output = torch.zeros(len(rows), 2, width, dtype=dtype)
    places = np.stack([ends - TRIAL, ends], axis=1)
    attention(query, key, value, places, width**-0.5, output)
    for start, end in places.tolist():
        q, k, v = (tensor[:, start:end].float() for tensor in (query, key, value))
        expected = scaled_dot_product_attention(q, k, v).transpose(0, 1)
        if not (output[start:end].float() - expected).abs().amax() <= CLOSE[dtype] * expected.abs().amax():
            return None
    return attention
