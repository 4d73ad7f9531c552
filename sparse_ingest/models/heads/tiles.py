"""The vocabulary projection in tiles of columns, with the maximum over each document's tokens taken per tile.

max commutes with adding a bias and with a rising activation, so: raw products of one tile, their maximum over the
tokens, and only then bias and activation on `[documents, vocabulary]`. Batch x length x vocabulary logits never exist;
a tile of them lies in the cache. Plain torch, for every device; compiled heads have files of their own.
"""

from __future__ import annotations

import torch

# Columns of a tile. On the CPU a tile of logits (2,048 tokens x 512 x 4 bytes) stays in the cache; a GPU wants fewer,
# larger products.
CPU_TILE = 512
GPU_TILE = 8192


class TiledHead:
    """Hidden states `[batch, length, hidden]` to the relu of the maximal logits, `[batch, vocabulary]` in float32.

    The logarithm is left to `logarithm`, for the few weights above zero: over the whole vocabulary it would cost more
    than the products of a short document. `activation` is `relu` for log1p(relu(x)) (SPLADE-max, arXiv 2109.10086,
    equation 5) or `log1p_relu` for log1p(log1p(relu(x))), as in sentence-transformers' SpladePooling.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, *, activation: str, device: torch.device, dtype: torch.dtype
    ) -> None:
        tile = CPU_TILE if device.type == "cpu" else GPU_TILE
        columns = weight.to(device=device, dtype=dtype)
        self._tiles = [part.T.contiguous() for part in torch.split(columns, tile)]
        self._bias = bias.to(device=device, dtype=torch.float32)
        self._logarithms = {"relu": 1, "log1p_relu": 2}[activation]

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Weights before the logarithm; every row of `hidden` counts, so padding must repeat a row of its document."""
        batch, length, width = hidden.shape
        rows = hidden.reshape(batch * length, width)
        # One buffer for every tile: a fresh one each time costs a third of the product in page faults.
        buffer = torch.empty(len(rows) * self._tiles[0].shape[1], dtype=rows.dtype, device=rows.device)
        maxima = []
        for tile in self._tiles:
            products = buffer[: len(rows) * tile.shape[1]].view(len(rows), -1)
            torch.mm(rows, tile, out=products)
            maxima.append(products.view(batch, length, -1).amax(1))
        weights = torch.cat(maxima, dim=1).to(torch.float32)
        return weights.add_(self._bias).relu_()

    def logarithm(self, weights: torch.Tensor) -> torch.Tensor:
        """The activation's logarithms of weights above zero, in place."""
        for _ in range(self._logarithms):
            weights.log1p_()
        return weights
