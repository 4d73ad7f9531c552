"""The vocabulary projection and the maximum over each document's tokens as one kernel, for GPUs with Triton.

In: packed hidden states in half precision. Out: weights before the logarithm, `[documents, vocabulary]`; logits are
never written to memory. A program computes one tile of the vocabulary for some documents, in tiles of rows, and keeps
the running maximum in registers. Weights that fit stay in shared memory; otherwise both factors are loaded in steps of
the width. Rows of a product are the vocabulary, columns the tokens: a thread then has most of a maximum in its own
registers, with 4 exchanges between threads instead of 192. Sums are float32.

Tests check shared memory, registers and instructions of the compiled kernel, and run it on the CPU with
TRITON_INTERPRET=1; it has not been timed, because no GPU was available.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from sparse_ingest.models.packing import Packing, to_device

# Tiles of rows of one program, which loads its weights once; a long document may have more.
TOGETHER = 16
WARPS = 8
# Bytes of shared memory that a kernel needs in addition to its tiles.
SHARED_BESIDE = 2048
SHARED_HOPPER = 227 << 10
# On older GPUs Triton does not use tensor cores, and the kernel would be slower than the plain head.
OLDEST = (8, 0)


class Shape(NamedTuple):
    """The columns of the vocabulary of a program, and the part of the width that it multiplies at a time.

    `row_tiles` maps the rows of hidden states at a time to the cost of a row: larger tiles read less per product. The
    costs are estimated from the bytes read, not measured.
    """

    resident: bool  # the weights of the columns stay, because `depth` is the full width
    columns: int
    depth: int
    stages: int
    row_tiles: dict[int, float]


def shape_of(width: int, shared_bytes: int) -> Shape:
    """Return the shape for hidden states of a width on a GPU with this much shared memory per block."""
    depth = max(16, triton.next_power_of_2(width))
    # One tile of weights, and three of rows: one is multiplied while others are loaded. With fewer stages Triton loads
    # the next tile only after the previous one. Two such programs share a multiprocessor at a width of 128.
    if depth <= 256 and 2 * depth * (128 + 3 * 64) + SHARED_BESIDE <= shared_bytes:
        return Shape(True, 128, depth, 5, {32: 1.4, 64: 1.0})
    # More columns read the rows less often; they need the shared memory of a Hopper.
    columns = 256 if shared_bytes >= SHARED_HOPPER else 128
    return Shape(False, columns, 64, 3, {32: 1.7, 64: 1.25, 128: 1.0})


@triton.jit  # type: ignore[untyped-decorator]
def _block(matrix, places, depth, WIDTH: tl.constexpr, EVEN: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN202
    """`matrix[places, depth]` of a matrix with WIDTH columns, zeros after them; `EVEN`: no place is after them."""
    there = matrix + places[:, None] * WIDTH + depth[None, :]
    if EVEN:
        return tl.load(there)
    return tl.load(there, mask=(depth < WIDTH)[None, :], other=0.0)


# Only constants have annotations: Triton reads them as code of the kernel.
@triton.jit  # type: ignore[untyped-decorator]
def _maxima(  # type: ignore[no-untyped-def] # noqa: ANN202
    rows, weight, bias, tiles, parts, found, vocabulary,  # noqa: ANN001
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    RESIDENT: tl.constexpr,
):  # fmt: skip
    """`found[document, column]` = relu(max over the document's rows of rows @ weight.T + bias).

    `tiles` and `parts` come from `row_tiles`. `weight` and `bias` are padded to full tiles of columns.
    """
    EVEN: tl.constexpr = WIDTH % DEPTH == 0
    columns = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    added = tl.load(bias + columns)
    if RESIDENT:
        left = _block(weight, columns, tl.arange(0, DEPTH), WIDTH, EVEN)
    largest = tl.full((COLUMNS,), float("-inf"), dtype=tl.float32)
    first, end = tl.load(parts + tl.program_id(1)), tl.load(parts + tl.program_id(1) + 1)
    # One loop over tiles and steps, so that loads continue over the border between two tiles.
    for tile in tl.range(first, end, num_stages=STAGES, flatten=not RESIDENT):
        row, last = tl.load(tiles + 4 * tile), tl.load(tiles + 4 * tile + 1)
        document, begins = tl.load(tiles + 4 * tile + 2), tl.load(tiles + 4 * tile + 3)
        # Rows after the document's last one repeat it, which changes no maximum.
        places = tl.minimum(row + tl.arange(0, ROWS), last).to(tl.int64)
        if RESIDENT:
            right = _block(rows, places, tl.arange(0, DEPTH), WIDTH, EVEN)
            products = tl.dot(left, tl.trans(right), input_precision="ieee")
        else:
            products = tl.zeros((COLUMNS, ROWS), dtype=tl.float32)
            for start in range(0, WIDTH, DEPTH):
                depth = start + tl.arange(0, DEPTH)
                part = _block(weight, columns, depth, WIDTH, EVEN)
                right = _block(rows, places, depth, WIDTH, EVEN)
                products = tl.dot(part, tl.trans(right), products, input_precision="ieee")
        largest = tl.maximum(tl.where(begins != 0, float("-inf"), largest), tl.max(products, axis=1))
        # Written for each tile; the value of the document's last tile remains. The bias is the same for every row.
        weights = tl.maximum(largest + added, 0.0)
        tl.store(found + document.to(tl.int64) * vocabulary + columns, weights, mask=columns < vocabulary)


class TritonHead:
    """The head of GPUs that Triton knows."""

    name = "Triton"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, device: torch.device, dtype: torch.dtype) -> None:
        self._columns, self._width = weight.shape
        shared_bytes = SHARED_HOPPER
        if device.type == "cuda":
            if (gpu := torch.cuda.get_device_capability(device)) < OLDEST:
                raise RuntimeError(f"its compute capability is {gpu[0]}.{gpu[1]}, and the kernel is for 8.0 and newer")
            shared_bytes = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
        self._shape = shape_of(self._width, shared_bytes)
        padding = -self._columns % self._shape.columns
        self._weight = torch.nn.functional.pad(weight, (0, 0, 0, padding)).to(device=device, dtype=dtype).contiguous()
        self._bias = torch.nn.functional.pad(bias, (0, padding)).to(device=device, dtype=torch.float32)

    def __call__(self, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return weights before the logarithm."""
        shape = self._shape
        row_tile = cheapest_row_tile(packing.lengths, shape.row_tiles)
        work, count = row_tiles(packing.lengths, row_tile)
        # One copy; the parts start at a multiple of 16 bytes, which Triton reads faster.
        tiles, parts = to_device(work, rows.device).tensor_split((4 * count,))
        rows = rows.contiguous()
        found = torch.empty(len(packing.lengths), self._columns, dtype=torch.float32, device=rows.device)
        programs = len(self._bias) // shape.columns, len(parts) - 1
        # Triton launches on the current GPU, which need not be the one of --device cuda:N.
        with torch.cuda.device_of(rows):  # type: ignore[no-untyped-call]
            _maxima[programs](
                rows, self._weight, self._bias, tiles, parts, found, self._columns,
                WIDTH=self._width, ROWS=row_tile, COLUMNS=shape.columns, DEPTH=shape.depth, STAGES=shape.stages,
                RESIDENT=shape.resident, num_warps=WARPS, enable_fp_fusion=True,
            )  # fmt: skip
        return found


def cheapest_row_tile(lengths: Sequence[int], costs: Mapping[int, float]) -> int:
    """Return the tile for which documents of these lengths cost least, including the padding of their last tiles."""
    rows = np.array(lengths)
    return min(costs, key=lambda tile: costs[tile] * tile * int((-(-rows // tile)).sum()))


def row_tiles(lengths: Sequence[int], row_tile: int) -> tuple[npt.NDArray[np.int32], int]:
    """Return tiles of rows in order, followed by the first tile of each program and the end; and the number of tiles.

    A tile is its first row, the document's last row, the document, and whether it is the document's first tile. A
    program has complete documents, because a maximum over two programs would need another pass.
    """
    rows = np.array(lengths)
    starts, counts = rows.cumsum() - rows, -(-rows // row_tile)
    begins = counts.cumsum() - counts
    documents = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(documents)) - begins[documents]
    first, last = starts[documents] + within * row_tile, (starts + rows - 1)[documents]
    tiles = np.stack((first, last, documents, within == 0), axis=1)
    _, programs = np.unique(begins // TOGETHER, return_index=True)
    parts = np.append(begins[programs], len(documents))
    return np.concatenate((tiles.ravel(), parts)).astype(np.int32), len(documents)
