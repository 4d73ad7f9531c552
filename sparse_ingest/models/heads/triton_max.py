"""The vocabulary projection and the maximum over each document's tokens as one kernel, for GPUs with Triton.

A program computes one tile of the vocabulary for one document: it walks over the document's tokens, keeps the running
maximum of their products in registers, and writes one row of the tile at the end, with the bias added, relu and the
logarithms taken. Logits never reach memory: what is written is `[documents, vocabulary]`. Sums are float32.

In: packed hidden states in half precision or float32. TRITON_INTERPRET=1 runs the kernel on the CPU, for tests.
Not covered: which head a device gets, and the trial it must pass there (selection.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from sparse_ingest.models.packing import Packing

# Columns of the vocabulary, and of the width of hidden states what is multiplied at a time. Not measured on a GPU yet.
COLUMN_TILE, WIDTH_TILE = 128, 64
# Rows of hidden states at a time -> what a row costs, as larger tiles read less for each product (estimated).
ROW_TILES = {32: 1.7, 64: 1.25, 128: 1.0}
# Documents whose programs run together, so that they read the same columns from the cache.
GROUP = 32
# The vocabulary is padded to a multiple of this.
ALIGNED = 64


@triton.jit  # type: ignore[untyped-decorator]
def _maxima(
    rows: Any, weight: Any, bias: Any, starts: Any, found: Any,
    documents: int, width: int, vocabulary: int, found_stride: int,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, TOGETHER: tl.constexpr,
) -> None:  # fmt: skip
    """`found[document, column]` = relu(max over the document's rows of rows @ weight.T + bias)."""
    program = tl.program_id(0)
    tiles = tl.cdiv(vocabulary, COLUMNS)
    # Programs that follow each other: all documents of a group for one tile of columns, then the next tile.
    group = program // (TOGETHER * tiles)
    size = min(documents - group * TOGETHER, TOGETHER)
    within = program % (TOGETHER * tiles)
    document = (group * TOGETHER + within % size).to(tl.int64)
    tile = within // size
    columns = tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < vocabulary
    first, end = tl.load(starts + document), tl.load(starts + document + 1)
    largest = tl.full((COLUMNS,), float("-inf"), dtype=tl.float32)
    for row in range(first, end, ROWS):
        # Rows behind the document's last one repeat it, which changes no maximum.
        places = tl.minimum(row + tl.arange(0, ROWS), end - 1).to(tl.int64)
        products = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, width, WIDTH):
            depth = start + tl.arange(0, WIDTH)
            there = depth < width
            left = tl.load(rows + places[:, None] * width + depth[None, :], mask=there[None, :], other=0.0)
            right = tl.load(
                weight + columns[None, :].to(tl.int64) * width + depth[:, None],
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            products = tl.dot(left, right, products, input_precision="ieee")
        largest = tl.maximum(largest, tl.max(products, axis=0))
    # The bias comes after the maximum: it is the same for every row.
    weights = tl.maximum(largest + tl.load(bias + columns, mask=inside, other=0.0), 0.0)
    tl.store(found + document * found_stride + columns, weights, mask=inside)


class TritonHead:
    """The head of GPUs that Triton knows."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, device: torch.device, dtype: torch.dtype) -> None:
        self._columns = len(bias)
        padding = -self._columns % ALIGNED
        self._weight = torch.nn.functional.pad(weight, (0, 0, 0, padding)).to(device=device, dtype=dtype).contiguous()
        self._bias = torch.nn.functional.pad(bias, (0, padding)).to(device=device, dtype=torch.float32)

    def __call__(self, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Weights before the logarithm."""
        documents, vocabulary = len(packing.lengths), len(self._bias)
        row_tile = cheapest_row_tile(packing.lengths)
        rows = rows.contiguous()
        found = torch.empty(documents, vocabulary, dtype=torch.float32, device=rows.device)
        programs = documents * triton.cdiv(vocabulary, COLUMN_TILE)
        # Triton launches on the current GPU, which need not be the one of --device cuda:N.
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            _maxima[(programs,)](
                rows, self._weight, self._bias, packing.starts, found,
                documents, rows.shape[1], vocabulary, found.stride(0),
                ROWS=row_tile, COLUMNS=COLUMN_TILE, WIDTH=WIDTH_TILE, TOGETHER=GROUP,
                num_warps=8 if row_tile == 128 else 4, num_stages=3,
            )  # fmt: skip
        return found[:, : self._columns]


def cheapest_row_tile(lengths: Sequence[int]) -> int:
    """The tile with which documents of these lengths cost least: the last tile of each is filled up."""
    rows = np.array(lengths)
    return min(ROW_TILES, key=lambda tile: ROW_TILES[tile] * tile * int((-(-rows // tile)).sum()))
