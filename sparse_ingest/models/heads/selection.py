"""Which head a device gets, and the trial that a fast one must pass on the device itself.

The fast heads are written for hardware that most machines do not have, so none is trusted: each is compared with the
plain one on random numbers once, where it will run, and left with a note when it fails or differs. A wrong kernel can
cost speed, never vectors.
"""

from __future__ import annotations

import logging

import torch

from sparse_ingest.errors import UsageError, first_line
from sparse_ingest.models.heads.int8 import Int8Head
from sparse_ingest.models.heads.tiles import Head, TiledHead
from sparse_ingest.models.packing import Packing

# Lengths of the trial's documents: one token, a tile and one more, and several tiles.
TRIAL = (1, 64, 65, 3, 128, 200)
# How far two heads may be apart in shares of the largest weight; float32 may be computed in TF32 by none of them.
CLOSE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
logger = logging.getLogger(__name__)


def build_head(
    weight: torch.Tensor, bias: torch.Tensor, *, device: torch.device, dtype: torch.dtype, int8: bool = False
) -> Head:
    """The fastest head of a device that computes what it should."""
    if int8:
        if device.type != "cpu":
            raise UsageError(
                f"int8 is for CPUs, and the device is {device}. Go on with a run of int8 with --device cpu, or encode "
                "into a new folder with --dtype auto, float16 or bfloat16."
            )
        return Int8Head(weight, bias)
    plain = TiledHead(weight, bias, device=device, dtype=dtype)
    return plain if device.type == "cpu" else _tried(weight, bias, plain, device, dtype)


def _tried(
    weight: torch.Tensor, bias: torch.Tensor, plain: TiledHead, device: torch.device, dtype: torch.dtype
) -> Head:
    try:
        from sparse_ingest.models.heads.triton_max import TritonHead

        head = TritonHead(weight, bias, device=device, dtype=dtype)
        if passes(head, plain, width=weight.shape[1], device=device, dtype=dtype):
            return head
        reason = "its weights would be others"
    except Exception as error:  # no Triton, or one that cannot compile for this device; it raises whatever it likes
        reason = first_line(error)
    logger.warning(
        "The Triton head is not used on %s: %s. Going on with the plain one, which is slower.", device, reason
    )
    return plain


def passes(head: Head, plain: Head, *, width: int, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a head gives what the plain one gives for random hidden states."""
    generator = torch.Generator().manual_seed(0)
    packing = Packing(TRIAL, device)
    rows = torch.randn(sum(TRIAL), width, generator=generator).to(device=device, dtype=dtype)
    with torch.inference_mode():
        found, expected = head(rows, packing), plain(rows, packing)
        # relu is undone nowhere, so the trial must see weights above zero.
        same_shape = found.shape == expected.shape
        return same_shape and bool((found - expected).abs().amax() <= CLOSE[dtype] * expected.amax().clamp(min=1e-6))
