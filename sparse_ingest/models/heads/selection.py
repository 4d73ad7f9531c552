"""The choice of the head for a device, and the trial that a fast head must pass.

A fast head is compared with the plain one on random numbers, on the device itself. If it fails or differs, a warning is
logged and the plain head is used, so a wrong kernel can cost speed but never change vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ingest.errors import UsageError
from sparse_ingest.models.compiled import tried_or_none
from sparse_ingest.models.heads.cpu_kernel import Kernel, instructions_for
from sparse_ingest.models.heads.tiles import Head, IntegerHead, TiledHead
from sparse_ingest.models.linear import KERNEL_DTYPES, has_avx2, has_vnni
from sparse_ingest.models.packing import Packing

# Lengths of the trials' documents: one token, a tile and one more, several tiles; then lengths for which Triton's head
# chooses few and many rows at a time.
TRIALS = ((1, 64, 65, 3, 128, 200), (1, 3, 30), (128, 250, 127))
# About as many columns are in a trial on a CPU, where the complete vocabulary takes seconds. They are from all of it:
# the first ones are often unused tokens.
TRIED = 1000
# Largest difference of two heads as a share of the largest weight; a head that computes float32 in TF32 fails.
CLOSE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
# Which instructions multiply integers, and whether there are any.
NEEDED = {torch.int8: ("AVX512 VNNI", has_vnni), torch.int16: ("AVX2", has_avx2)}


def build_head(
    weight: Tensor, bias: Tensor, *, device: torch.device, dtype: torch.dtype, integers: torch.dtype | None = None
) -> Head:
    """Return the fastest head of a device that computes the right weights."""
    tried = slice(None, None, max(1, len(bias) // TRIED) if device.type == "cpu" else 1)

    def fast_head() -> Head | None:
        works = _works(weight[tried], bias[tried], device=device, dtype=dtype, integers=integers)
        return _fast_head(weight, bias, device=device, dtype=dtype, integers=integers) if works else None

    if _has_fast_head(weight.shape[1], device=device, dtype=dtype, integers=integers):
        fast = tried_or_none(fast_head, f"head on {device}")
        if fast is not None:
            return fast
    return _plain_head(weight, bias, device=device, dtype=dtype, integers=integers)


def refuse_integers(integers: torch.dtype, device: torch.device) -> None:
    """Raise `UsageError` if a device does not multiply these integers fast."""
    name = KERNEL_DTYPES[integers]
    if device.type != "cpu":
        raise UsageError(
            f"{name} needs a CPU, but the device is {device}. Continue an {name} run with --device cpu, or encode into "
            "a new folder with --dtype auto, float16 or bfloat16."
        )
    instructions, may_use = NEEDED[integers]
    if not may_use():
        raise UsageError(
            f"{name} needs {instructions}, which this CPU lacks or ONEDNN_MAX_CPU_ISA forbids. Continue an {name} "
            "run on a CPU that has it, or encode into a new folder with --dtype auto or float32."
        )


def _has_fast_head(width: int, *, device: torch.device, dtype: torch.dtype, integers: torch.dtype | None) -> bool:
    """Return whether a device has a head for this width that is faster than the plain one."""
    if device.type != "cpu":
        return dtype != torch.float32  # which tensor cores do not multiply
    return instructions_for(integers or dtype, width) is not None


def fast_head_works(device: torch.device, dtype: torch.dtype, *, integers: torch.dtype | None = None) -> bool:
    """Compile the fast head for random weights, for a device that has one. Return whether its weights are right.

    A compiler that is missing, or cannot compile for the device, may raise any exception.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1000, 128, generator=generator, dtype=torch.float32)
    bias = torch.randn(1000, generator=generator, dtype=torch.float32)
    return _works(weight, bias, device=device, dtype=dtype, integers=integers)


def _works(
    weight: Tensor, bias: Tensor, *, device: torch.device, dtype: torch.dtype, integers: torch.dtype | None
) -> bool:
    """Return whether the fast head of these weights agrees with the plain one."""
    fast, plain = (
        build(weight, bias, device=device, dtype=dtype, integers=integers) for build in (_fast_head, _plain_head)
    )
    return passes(fast, plain, width=weight.shape[1], device=device, dtype=dtype, exact=integers is not None)


def _plain_head(
    weight: Tensor, bias: Tensor, *, device: torch.device, dtype: torch.dtype, integers: torch.dtype | None
) -> Head:
    return IntegerHead(weight, bias, integers) if integers else TiledHead(weight, bias, device=device, dtype=dtype)


def _fast_head(
    weight: Tensor, bias: Tensor, *, device: torch.device, dtype: torch.dtype, integers: torch.dtype | None
) -> Head:
    """Build the head that is faster than the plain one; see `_has_fast_head`."""
    if device.type != "cpu":
        from sparse_ingest.models.heads.triton_max import TritonHead

        return TritonHead(weight, bias, device=device, dtype=dtype)
    instructions = instructions_for(integers or dtype, weight.shape[1])
    assert instructions
    if integers:
        return IntegerHead(weight, bias, integers, instructions=instructions)
    return Kernel(weight.to(dtype), bias, instructions=instructions)


def passes(
    head: Head, plain: Head, *, width: int, device: torch.device, dtype: torch.dtype, exact: bool = False
) -> bool:
    """Return whether a head agrees with the plain one on random hidden states; `exact`: to the last bit."""
    generator = torch.Generator().manual_seed(0)
    for lengths in TRIALS:
        packing = Packing(lengths, device)
        rows = torch.randn(sum(lengths), width, generator=generator).to(device=device, dtype=dtype)
        with torch.inference_mode():
            found, expected = head(rows, packing), plain(rows, packing)
            # Relative to the largest weight, which is at least 1e-6 because relu may leave zeros only.
            far = 0 if exact else CLOSE[dtype] * expected.amax().clamp(min=1e-6)
            if found.shape != expected.shape or not (found - expected).abs().amax() <= far:
                return False
    return True
