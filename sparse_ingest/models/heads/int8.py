"""The vocabulary projection in whole numbers of 8 bits, for CPUs whose vector units multiply those (VNNI).

Each column of the projection has a scale of its own, and each document one for all of its tokens: with one per token
the maximum of the whole numbers would not be that of the weights. The products are exact, only hidden states and
weights are rounded. In: packed hidden states in float32. Not covered: the body, which stays in float32.
"""

from __future__ import annotations

import os

import torch

from sparse_ingest.errors import UsageError
from sparse_ingest.models.heads.tiles import largest
from sparse_ingest.models.packing import Packing

TILE = 512  # columns
STEPS = 127  # on each side of zero
# Parts of the names that ONEDNN_MAX_CPU_ISA has for instruction sets with VNNI.
NEWER_THAN_VNNI = ("VNNI", "BF16", "FP16", "AMX", "AVX10")


class Int8Head:
    """The head of `--dtype int8`."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
        if not has_vnni():
            raise UsageError(
                "int8 needs a CPU with AVX512 VNNI that ONEDNN_MAX_CPU_ISA does not forbid, and here is none. Go on "
                "with a run of int8 on such a CPU, or encode into a new folder with --dtype auto or float32."
            )
        weight = weight.to(torch.float32)
        self._scales = _scale(weight.abs().amax(1))
        rounded = (weight / self._scales.unsqueeze(1)).round_().to(torch.int8)
        self._tiles = [part.T for part in torch.split(rounded, TILE)]
        self._bias = bias.to(torch.float32)

    def __call__(self, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Weights before the logarithm."""
        index, blocks = packing.blocks
        rows = rows if index is None else rows[index]
        whole = torch.empty(rows.shape, dtype=torch.int8)
        scales = torch.empty(len(packing.lengths), 1)
        for block in blocks:
            documents = rows[block.rows].view(block.documents, -1)
            scale = _scale(documents.abs().amax(1, keepdim=True))
            whole[block.rows] = (documents / scale).round_().view(-1, rows.shape[1]).to(torch.int8)
            scales[block.document : block.document + block.documents] = scale
        products = torch.empty(len(rows) * TILE, dtype=torch.int32)
        found = []
        for tile in self._tiles:
            part = products[: len(rows) * tile.shape[1]].view(len(rows), -1)
            torch._int_mm(whole, tile, out=part)
            found.append(largest(part, blocks))
        weights = torch.cat(found, dim=1).to(torch.float32)
        return weights.mul_(scales).mul_(self._scales).add_(self._bias).relu_()


def has_vnni() -> bool:
    """Whether oneDNN multiplies 8-bit numbers fast here; ONEDNN_MAX_CPU_ISA can forbid it."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    known = allowed == "DEFAULT" or any(name in allowed for name in NEWER_THAN_VNNI)
    return known and bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())


def _scale(largest_value: torch.Tensor) -> torch.Tensor:
    """The step of whole numbers that reach the largest value; 1 where all are zero."""
    return torch.where(largest_value > 0, largest_value / STEPS, torch.ones_like(largest_value))
