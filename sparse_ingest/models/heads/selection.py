"""Which head a device gets, and the trial that a fast one must pass on the device itself.

The fast heads are written for hardware that most machines do not have, so none is trusted: each is compared with the
plain one on random numbers once, where it will run, and left with a note when it fails or differs. A wrong kernel can
cost speed, never vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch

from sparse_ingest.errors import UsageError, first_line
from sparse_ingest.models.heads.cpu_kernel import Kernel, instructions_for
from sparse_ingest.models.heads.int8 import Int8Head
from sparse_ingest.models.heads.tiles import Head, TiledHead
from sparse_ingest.models.memory import is_out_of_memory
from sparse_ingest.models.packing import Packing

# Lengths of the trials' documents: one token, a tile and one more, and several tiles; then such that heads which choose
# how many rows they take at a time, as Triton's does, take few and take many.
TRIALS = ((1, 64, 65, 3, 128, 200), (1, 3, 30), (128, 250, 127))
# How far two heads may be apart in shares of the largest weight; float32 may be computed in TF32 by none of them.
CLOSE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
logger = logging.getLogger(__name__)


def build_head(
    weight: torch.Tensor, bias: torch.Tensor, *, device: torch.device, dtype: torch.dtype, int8: bool = False
) -> Head:
    """The fastest head of a device that computes what it should."""
    plain: Head
    if int8:
        if device.type != "cpu":
            raise UsageError(
                f"int8 is for CPUs, and the device is {device}. Go on with a run of int8 with --device cpu, or encode "
                "into a new folder with --dtype auto, float16 or bfloat16."
            )
        plain = Int8Head(weight, bias)
    else:
        plain = TiledHead(weight, bias, device=device, dtype=dtype)
    fast = _fast_head(plain, weight, bias, device, dtype)
    return _tried(fast, plain, weight.shape[1], device, dtype, exact=int8) if fast else plain


def _fast_head(
    plain: Head, weight: torch.Tensor, bias: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> Callable[[], Head] | None:
    """How to build the head that is faster than the plain one; None: there is none for this device and dtype."""
    if device.type != "cpu":
        # In float32 a GPU multiplies without its tensor cores, and then the plain head is as fast.
        return None if dtype == torch.float32 else lambda: _triton_head(weight, bias, device, dtype)
    instructions = instructions_for(torch.int8 if isinstance(plain, Int8Head) else dtype, weight.shape[1])
    if instructions is None:
        return None
    if isinstance(plain, Int8Head):
        return partial(plain.compiled, instructions)
    return lambda: Kernel(weight.to(dtype), bias, instructions=instructions)


def _triton_head(weight: torch.Tensor, bias: torch.Tensor, device: torch.device, dtype: torch.dtype) -> Head:
    from sparse_ingest.models.heads.triton_max import TritonHead

    return TritonHead(weight, bias, device=device, dtype=dtype)


def _tried(
    build: Callable[[], Head], plain: Head, width: int, device: torch.device, dtype: torch.dtype, *, exact: bool = False
) -> Head:
    try:
        head = build()
        if passes(head, plain, width=width, device=device, dtype=dtype, exact=exact):
            return head
        reason = "its weights would be others"
    except ImportError as error:
        logger.info("The plain head is used on %s, which is slower than a compiled one: %s.", device, first_line(error))
        return plain
    except Exception as error:  # a compiler that cannot compile for this device raises whatever it likes
        if is_out_of_memory(error):  # other processes of this run may have had it, whose last bits are others
            raise
        reason = first_line(error)
    logger.warning(
        "The compiled head is not used on %s: %s. Going on with the plain one, which is slower.", device, reason
    )
    return plain


def passes(
    head: Head, plain: Head, *, width: int, device: torch.device, dtype: torch.dtype, exact: bool = False
) -> bool:
    """Whether a head gives what the plain one gives for random hidden states; `exact`: to the last bit."""
    generator = torch.Generator().manual_seed(0)
    for lengths in TRIALS:
        packing = Packing(lengths, device)
        rows = torch.randn(sum(lengths), width, generator=generator).to(device=device, dtype=dtype)
        with torch.inference_mode():
            found, expected = head(rows, packing), plain(rows, packing)
            # relu is undone nowhere, so the trial must see weights above zero.
            far = 0 if exact else CLOSE[dtype] * expected.amax().clamp(min=1e-6)
            if found.shape != expected.shape or not (found - expected).abs().amax() <= far:
                return False
    return True
