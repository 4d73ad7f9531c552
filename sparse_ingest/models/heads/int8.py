"""The vocabulary projection in whole numbers of 8 bits, for CPUs whose vector units multiply those (VNNI).

Each column of the projection has a scale of its own, and each document one for all of its tokens: with one per token
the maximum of the whole numbers would not be that of the weights. The products are exact, only hidden states and
weights are rounded; so it is the same to the last bit whether the compiled kernel multiplies or torch. In: packed
hidden states. Not covered: the body.
"""

from __future__ import annotations

from copy import copy

import numpy as np
import torch

from sparse_ingest.errors import UsageError
from sparse_ingest.models.heads.cpu_kernel import Kernel
from sparse_ingest.models.heads.tiles import largest
from sparse_ingest.models.linear import has_vnni
from sparse_ingest.models.packing import Packing

TILE = 512  # columns
STEPS = 127  # on each side of zero


class Int8Head:
    """The head of `--dtype int8`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        if not has_vnni():
            raise UsageError(
                "int8 needs a CPU with AVX512 VNNI that ONEDNN_MAX_CPU_ISA does not forbid, and here is none. Go on "
                "with a run of int8 on such a CPU, or encode into a new folder with --dtype auto or float32."
            )
        weight = weight.to(torch.float32)
        scales = _scale(weight.abs().amax(1))
        rounded = (weight / scales.unsqueeze(1)).round_().to(torch.int8)
        self._maxima: _Tiles | Kernel = _Tiles(rounded, bias.to(torch.float32), scales)

    def compiled(self, instructions: str) -> Int8Head:
        """The same head with the compiled kernel."""
        assert isinstance(self._maxima, _Tiles), "it is compiled already"
        head, tiles = copy(self), self._maxima
        head._maxima = Kernel(tiles.weight, tiles.bias, tiles.scales, instructions=instructions)
        return head

    def __call__(self, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Weights before the logarithm."""
        rows = rows.to(torch.float32)
        of_rows = rows.abs().amax(1).numpy()
        starts = np.cumsum((0, *packing.lengths[:-1]))
        scales = _scale(torch.from_numpy(np.maximum.reduceat(of_rows, starts)))
        steps = torch.from_numpy(np.repeat(scales.numpy(), packing.lengths)).unsqueeze(1)
        return self._maxima((rows / steps).round_().to(torch.int8), packing, scales)


class _Tiles:
    """As `Kernel`, by torch's own product."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, scales: torch.Tensor) -> None:
        self.weight, self.bias, self.scales = weight, bias, scales
        self._tiles = [part.T for part in torch.split(weight, TILE)]

    def __call__(self, rows: torch.Tensor, packing: Packing, scales: torch.Tensor) -> torch.Tensor:
        index, blocks = packing.blocks
        rows = rows if index is None else rows[index]
        products = torch.empty(len(rows) * TILE, dtype=torch.int32)
        found = []
        for tile in self._tiles:
            part = products[: len(rows) * tile.shape[1]].view(len(rows), -1)
            torch._int_mm(rows, tile, out=part)
            found.append(largest(part, blocks))
        weights = torch.cat(found, dim=1).to(torch.float32)
        return weights.mul_(scales.unsqueeze(1)).mul_(self.scales).add_(self.bias).relu_()


def _scale(largest_value: torch.Tensor) -> torch.Tensor:
    """The step of whole numbers that reach the largest value; 1 where all are zero."""
    return torch.where(largest_value > 0, largest_value / STEPS, torch.ones_like(largest_value))
