"""The vocabulary projection in tiles of columns, with the maximum over each document's tokens taken per tile.

max commutes with adding a bias and with a rising activation, so a head computes the products of one tile, then their
maximum over the tokens, and only then bias and activation on `[documents, vocabulary]`. Logits of all tokens never
exist, and a tile of them fits the cache. Everything is plain torch: `TiledHead` for every device, `IntegerHead` for
CPUs that multiply integers fast.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch.nn.functional import pad

from sparse_ingest.models.heads.cpu_kernel import Kernel
from sparse_ingest.models.integers import STEPS, exact_product, rounded_weight, scale_of
from sparse_ingest.models.linear import product_of
from sparse_ingest.models.packing import LengthRun, Packing, row_padding

# Columns of a tile. On the CPU a tile of logits (2,048 rows x 256 x 4 bytes) stays in the cache; a GPU is faster with
# fewer, larger products.
CPU_TILE = 256
GPU_TILE = 1024
INTEGER_TILE = 512
LOGARITHMS = {"none": 0, "relu": 1, "log1p_relu": 2}  # of an activation

Maximum = Callable[[torch.Tensor, list[LengthRun]], torch.Tensor]


class Head(Protocol):
    """Packed hidden states `[rows, hidden]` to weights before the logarithm, `[documents, columns]` in float32.

    Of a vocabulary projection they are the relu of the maximal logits.
    """

    name: str  # for a log

    def __call__(self, rows: torch.Tensor, packing: Packing, /) -> torch.Tensor:
        """Return weights before the logarithm."""


class TiledHead:
    """The plain head, for every device. The fast heads are compared with it."""

    name = "torch"

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, *, device: torch.device, dtype: torch.dtype) -> None:
        tile = CPU_TILE if device.type == "cpu" else GPU_TILE
        weight, bias = weight.to(device=device, dtype=dtype), bias.to(device=device, dtype=torch.float32)
        if device.type == "cpu" and dtype != torch.float32:
            parts = zip(torch.split(weight, tile), torch.split(bias.to(dtype), tile), strict=True)
            self._tiles = [_short_maximum(part, of_part) for part, of_part in parts]
            self._bias = None
        else:
            product = product_of if device.type == "cpu" else _product
            self._tiles = [_maximum(product(part)) for part in torch.split(weight, tile)]
            self._bias = bias

    def __call__(self, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return weights before the logarithm."""
        index, blocks = packing.blocks
        rows = rows if index is None else rows[index]
        if self._bias is None:  # in float32 padding costs more than it saves
            rows = pad(rows, (0, 0, 0, row_padding(len(rows), rows.device)))
        weights = torch.cat([tile(rows, blocks) for tile in self._tiles], dim=1)
        if self._bias is not None:
            weights += self._bias
        return weights.relu_()


class IntegerHead:
    """The head of the dtypes with int8 and int16; with `instructions` the compiled kernel computes the products.

    Each column of the projection has its own scale, and each document one for all of its tokens: with a scale per token
    the largest integer might not be the largest weight. Hidden states and weights are rounded, products are exact, so
    torch and the compiled kernel return the same bits.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, integers: torch.dtype, *, instructions: str | None = None
    ) -> None:
        self._integers, self._bias = integers, bias.to(torch.float32)
        rounded, self._scales = rounded_weight(weight, integers)
        self._kernel = Kernel(rounded, self._bias, self._scales, instructions=instructions) if instructions else None
        self.name = self._kernel.name if self._kernel else TiledHead.name
        self._tiles = [] if instructions else [part.T for part in torch.split(rounded, INTEGER_TILE)]

    def __call__(self, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Return weights before the logarithm."""
        rows = rows.to(torch.float32)
        of_rows = rows.abs().amax(1).numpy()
        starts = np.cumsum((0, *packing.lengths[:-1]))
        scales = scale_of(torch.from_numpy(np.maximum.reduceat(of_rows, starts)), STEPS[self._integers])
        steps = torch.from_numpy(np.repeat(scales.numpy(), packing.lengths)).unsqueeze(1)
        maxima = self._kernel or self._tiled_maxima
        return maxima((rows / steps).round_().to(self._integers), packing, scales)

    def _tiled_maxima(self, rows: torch.Tensor, packing: Packing, scales: torch.Tensor) -> torch.Tensor:
        index, blocks = packing.blocks
        rows = rows if index is None else rows[index]
        products = torch.empty(len(rows) * INTEGER_TILE, dtype=torch.int32)
        found = []
        for tile in self._tiles:
            part = products[: len(rows) * tile.shape[1]].view(len(rows), -1)
            found.append(_largest(exact_product(rows, tile, out=part), blocks))
        weights = torch.cat(found, dim=1).to(torch.float32)
        return weights.mul_(scales.unsqueeze(1)).mul_(self._scales).add_(self._bias).relu_()


def logarithm(weights: torch.Tensor, activation: str) -> torch.Tensor:
    """Apply the activation's logarithms to weights above zero, in place.

    Only non-zero weights should be given: over the complete vocabulary it costs more than the products of a short
    document. `relu` is log1p(relu(x)) (SPLADE-max, arXiv 2109.10086, equation 5), `log1p_relu` is
    log1p(log1p(relu(x))), as in sentence-transformers' SpladePooling, and `none` is relu(x).
    """
    for _ in range(LOGARITHMS[activation]):
        weights.log1p_()
    return weights


def _largest(products: torch.Tensor, blocks: list[LengthRun]) -> torch.Tensor:
    """Return the maximum of each document's rows."""
    found = [products[block.rows].view(block.documents, block.length, -1).amax(1) for block in blocks]
    return found[0] if len(found) == 1 else torch.cat(found)


def _maximum(product: Callable[[torch.Tensor], torch.Tensor]) -> Maximum:
    return lambda rows, blocks: _largest(product(rows), blocks).to(torch.float32)


def _product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    columns = weight.T.contiguous()
    return lambda rows: rows @ columns


def _short_maximum(weight: torch.Tensor, bias: torch.Tensor) -> Maximum:
    """Return the maximum for bfloat16 and float16 on a CPU by their bit patterns, as integers are 5 times as fast.

    Bit patterns and numbers have the same order above zero, so the bias is added first, and negative ones become zero.
    """
    columns = weight.T.contiguous()

    def maximum(rows: torch.Tensor, blocks: list[LengthRun]) -> torch.Tensor:
        products = torch.addmm(bias, rows, columns)
        return _largest(products.view(torch.int16), blocks).clamp_(min=0).view(bias.dtype).to(torch.float32)

    return maximum
