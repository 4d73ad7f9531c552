"""The vocabulary projection in tiles of columns, with the maximum over each document's tokens taken per tile.

max commutes with adding a bias and with a rising activation, so: raw products of one tile, their maximum over the
tokens, and only then bias and activation on `[documents, vocabulary]`. Batch x length x vocabulary logits never exist;
a tile of them lies in the cache. Plain torch, for every device; other heads have files of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from sparse_ingest.models.linear import product_of
from sparse_ingest.models.packing import LengthRun, Packing

# Columns of a tile. On the CPU a tile of logits (2,048 rows x 256 x 4 bytes) stays in the cache; a GPU wants fewer,
# larger products.
CPU_TILE = 256
GPU_TILE = 1024
# How many logarithms an activation has.
LOGARITHMS = {"relu": 1, "log1p_relu": 2}


class Head(Protocol):
    """Packed hidden states `[rows, hidden]` to the relu of the maximal logits, `[documents, vocabulary]` in float32."""

    def __call__(self, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Weights before the logarithm."""
        ...


class TiledHead:
    """The head that every device has; the one by which others are checked."""

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
        """Weights before the logarithm."""
        index, blocks = packing.blocks
        rows = rows if index is None else rows[index]
        weights = torch.cat([tile(rows, blocks) for tile in self._tiles], dim=1)
        if self._bias is not None:
            weights += self._bias
        return weights.relu_()


def logarithm(weights: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation's logarithms of weights above zero, in place.

    Left to the few weights that there are: over the whole vocabulary it would cost more than the products of a short
    document. `relu` is log1p(relu(x)) (SPLADE-max, arXiv 2109.10086, equation 5), `log1p_relu` is
    log1p(log1p(relu(x))), as in sentence-transformers' SpladePooling.
    """
    for _ in range(LOGARITHMS[activation]):
        weights.log1p_()
    return weights


def largest(products: torch.Tensor, blocks: list[LengthRun]) -> torch.Tensor:
    """The maximum of each document's rows."""
    found = [products[block.rows].view(block.documents, block.length, -1).amax(1) for block in blocks]
    return found[0] if len(found) == 1 else torch.cat(found)


Maximum = Callable[[torch.Tensor, list[LengthRun]], torch.Tensor]


def _maximum(product: Callable[[torch.Tensor], torch.Tensor]) -> Maximum:
    return lambda rows, blocks: largest(product(rows), blocks).to(torch.float32)


def _product(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    columns = weight.T.contiguous()
    return lambda rows: rows @ columns


def _short_maximum(weight: torch.Tensor, bias: torch.Tensor) -> Maximum:
    """For bfloat16 and float16 on a CPU: their bit patterns order like whole numbers, whose maximum is 5 times faster.

    That holds from zero on, so the bias must be inside, and what is below zero counts as zero.
    """
    columns = weight.T.contiguous()

    def maximum(rows: torch.Tensor, blocks: list[LengthRun]) -> torch.Tensor:
        products = torch.addmm(bias, rows, columns)
        return largest(products.view(torch.int16), blocks).clamp_(min=0).view(bias.dtype).to(torch.float32)

    return maximum
