"""Which instructions of this CPU may be used: those it has, and that ONEDNN_MAX_CPU_ISA does not forbid.

The variable is oneDNN's, which torch multiplies with; what it forbids there is not used by kernels of ours either.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

# Parts of the names that ONEDNN_MAX_CPU_ISA has for instruction sets with bfloat16, and for those with AVX512's VNNI.
WITH_BFLOAT16 = ("BF16", "FP16", "AMX", "AVX10")
WITH_VNNI = ("CORE_VNNI", *WITH_BFLOAT16)
# Who makes CPUs whose AVX512_BF16 has twice the rate of float32: Zen 4 does 220 GFLOP/s a core in place of 108 in a
# product of 2,048 rows, whatever its width. Intel's without AMX are no faster than in float32.
FULL_RATE = "AuthenticAMD"


def has_amx() -> bool:
    """Whether AMX may be used here."""
    return _allowed("AMX") and _supports("_is_amx_tile_supported")


def has_avx512_bfloat16() -> bool:
    """Whether AVX512 multiplies bfloat16 here, fast or not."""
    return _allowed(*WITH_BFLOAT16) and _supports("_is_avx512_bf16_supported")


def has_vnni() -> bool:
    """Whether 8-bit numbers are multiplied fast here."""
    return _allowed(*WITH_VNNI) and _supports("_is_vnni_supported")


def has_fast_bfloat16() -> bool:
    """Whether bfloat16 is multiplied about twice as fast as float32, or with AMX faster still."""
    return has_amx() or (has_avx512_bfloat16() and vendor() == FULL_RATE)


@cache
def vendor() -> str:
    """Who made this CPU, as Linux tells it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _allowed(*names: str) -> bool:
    """Whether the variable allows instruction sets with one of these names."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    return allowed == "DEFAULT" or any(name in allowed for name in names)


def _supports(name: str) -> bool:
    return bool(getattr(torch.cpu, name, lambda: False)())
