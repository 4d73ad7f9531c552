"""Products on CPUs: linear layers laid out once for oneDNN, and the instructions that a CPU multiplies with.

In: a model in float32 or bfloat16. Out: the same model, with the same results up to the order of sums, a tenth faster
than with torch's own product. The operators, which torch's compiler uses too, are not public, so they are tried first
and not used if they fail; that depends on torch's version and the CPU alone. float16 keeps torch's product.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from sparse_ingest.errors import first_line
from sparse_ingest.models.integer_linear import feed_forward, fits, functions_of, integer_linear

# oneDNN caches a product, and torch its working memory, for every number of rows. packing.py keeps these few: about 16,
# for 7 products and GELUs of a BERT, which the second cache holds. The default of 1,024 takes gigabytes where documents
# are padded. Both are read at the first product of the process.
for _name, _capacity in {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "192"}.items():
    os.environ[_name] = os.environ.get(_name) or _capacity  # torch crashes if it is set but empty

# Number of rows for which oneDNN chooses the layout; it works for any number.
ROWS = 2048
TRIED_WIDTH = 64  # of rows of int16
# The vendor whose AVX512_BF16 has twice the rate of float32: Zen 4 does 220 GFLOP/s a core instead of 108 in a product
# of 2,048 rows of any width. Intel CPUs without AMX are no faster than in float32.
FULL_RATE = "AuthenticAMD"
# Parts of the values of ONEDNN_MAX_CPU_ISA for instruction sets with bfloat16, with AVX512's VNNI, and with AVX512.
WITH_BFLOAT16 = ("BF16", "FP16", "AMX", "AVX10")
WITH_VNNI = ("CORE_VNNI", *WITH_BFLOAT16)
WITH_AVX512 = ("AVX512", "AVX10")

# What the compiled kernels multiply, with its name there.
KERNEL_DTYPES = {torch.int8: "int8", torch.int16: "int16", torch.bfloat16: "bfloat16", torch.float32: "float32"}

# Linux's numbers for a request to use the tiles of AMX.
ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 0x1023, 18
SYS_ARCH_PRCTL = 158

Product = Callable[[torch.Tensor], torch.Tensor]
Sum = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Parts = tuple[torch.Tensor, torch.Tensor | None]  # the weight and the bias of a linear layer
logger = logging.getLogger(__name__)


def pack_linear_layers(model: torch.nn.Module, *, integers: torch.dtype | None = None) -> None:
    """Replace the product of every linear layer of a model on the CPU, and free the original weights."""
    for module in model.modules():
        # Subclasses, or a forward that was set from outside, may compute something else.
        if type(module) is not torch.nn.Linear or "forward" in vars(module):
            continue
        if integers or has_fast_linear(module.weight.dtype):
            bias = None if module.bias is None else module.bias.detach()
            weight = module.weight.detach()
            product = product_of(weight, bias, integers=integers)
            # Integers are multiplied for `[rows, width]` only.
            module.__dict__["forward"] = _of_rows(product, len(weight)) if integers else product
            module.weight = torch.nn.Parameter(module.weight.new_empty(0), requires_grad=False)


def _of_rows(product: Product, columns: int) -> Product:
    """Return a product of rows as one of tensors with any number of dimensions."""
    return lambda given: product(given.flatten(0, -2)).view(*given.shape[:-1], columns)


def product_of(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, integers: torch.dtype | None = None
) -> Product:
    """Return the function from rows to `rows @ weight.T + bias`; with `integers` in int8 or int16, if the size fits."""
    if integers and fits(weight, integers):
        return integer_linear(weight, bias, integers)
    if _is_fast(weight):
        return _onednn_product(weight, bias)
    return lambda rows: torch.nn.functional.linear(rows, weight, bias)


def gelu_of(product: Product) -> Product:
    """Return a function that applies GELU to a product.

    One call of oneDNN for both is 2 to 10% faster with AVX512 and up to 13% slower with AVX2. But with AMX it adds 5 to
    10 ms of compilation for each number of rows.
    """
    return lambda rows: torch.ops.aten.gelu_(product(rows))


def gated_of(up: Product, gate: Product) -> Product:
    """Return a function that multiplies a product by the GELU of another one."""
    return lambda rows: torch.ops.aten.gelu_(gate(rows)).mul_(up(rows))


def sum_of(weight: torch.Tensor, bias: torch.Tensor | None, *, integers: torch.dtype | None = None) -> Sum:
    """Return the function from rows and others to `rows @ weight.T + bias + others`; `integers` as in `product_of`."""
    if integers and fits(weight, integers):
        return integer_linear(weight, bias, integers)
    if _is_fast(weight):
        return _onednn_sum(weight, bias)
    return lambda rows, others: torch.nn.functional.linear(rows, weight, bias) + others


def feed_forward_of(
    down: Parts, up: Parts, gate: Parts | None = None, *, integers: torch.dtype | None = None
) -> Product:
    """Return the function from rows to `down(gelu(up(rows))) + rows`, with a gate `down(gelu(gate(rows)) * up(rows))`.

    `integers` as in `product_of`.
    """
    layers = [up, down, *([gate] if gate else [])]
    if integers and all(fits(weight, integers) for weight, _ in layers):
        return feed_forward(*(integer_linear(*parts, integers) for parts in layers))
    raised = gated_of(product_of(*up), product_of(*gate)) if gate else gelu_of(product_of(*up))
    lowered = sum_of(*down)
    return lambda rows: lowered(raised(rows), rows)


def _onednn_product(weight: torch.Tensor, bias: torch.Tensor | None) -> Product:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def product(rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, "none", [], "")
        return found

    return product


def _onednn_sum(weight: torch.Tensor, bias: torch.Tensor | None) -> Sum:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)

    def product_and_sum(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, others, packed, bias, "add")
        return found

    return product_and_sum


def _is_fast(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and has_fast_linear(weight.dtype)


@cache
def has_fast_linear(dtype: torch.dtype) -> bool:
    """Return whether the faster linear layers of oneDNN exist for this dtype and compute the right numbers."""
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    # Integers that both dtypes represent exactly.
    rows, weight, bias = torch.eye(8, dtype=dtype), torch.arange(64).view(8, 8).to(dtype), torch.arange(8).to(dtype)
    expected = weight.T + bias
    try:
        found, with_rows = _onednn_product(weight, bias)(rows), _onednn_sum(weight, bias)(rows, rows)
        return torch.equal(found, expected) and torch.equal(with_rows, expected + rows)
    except Exception as error:  # missing, another signature, not for this CPU: torch raises a different type for each
        logger.debug("The linear layers of oneDNN are not used: %s.", first_line(error))
        return False


def fastest_instructions(dtype: torch.dtype) -> str | None:
    """Return the instructions of this CPU that compiled kernels multiply a dtype with: amx, avx512, avx2 or None."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return None
    if dtype == torch.float32:
        return "avx512" if has_avx512() else "avx2" if has_avx2() else None
    if dtype == torch.int16:
        return "avx2" if has_avx2() else None
    has_instructions = {torch.int8: has_vnni, torch.bfloat16: has_avx512_bfloat16}.get(dtype)
    if has_instructions is None:
        return None
    return "amx" if has_amx() and may_use_tiles() else "avx512" if has_instructions() else None


def has_only_avx2() -> bool:
    """Return whether AVX2 has the fastest products here. Then int16 is the fastest dtype."""
    return fastest_instructions(torch.float32) == "avx2"


def has_fast_int16() -> bool:
    """Return whether int16 is the fastest dtype, and its functions can be compiled: torch multiplies it slowly."""
    return has_only_avx2() and find_spec("llvmlite") is not None and functions_of(TRIED_WIDTH, torch.int16) is not None


def has_amx() -> bool:
    """Return whether AMX may be used here."""
    return _may_use("_is_amx_tile_supported", "AMX")


def has_avx512_bfloat16() -> bool:
    """Return whether AVX512 multiplies bfloat16 here, fast or not."""
    return _may_use("_is_avx512_bf16_supported", *WITH_BFLOAT16)


def has_vnni() -> bool:
    """Return whether this CPU multiplies 8-bit numbers fast."""
    return _may_use("_is_vnni_supported", *WITH_VNNI)


def has_avx512() -> bool:
    """Return whether AVX512 may be used here."""
    return _may_use("_is_avx512_supported", *WITH_AVX512)


def has_avx2() -> bool:
    """Return whether AVX2 may be used here."""
    return _may_use("_is_avx2_supported", "AVX2", *WITH_AVX512)


def has_fast_bfloat16() -> bool:
    """Return whether bfloat16 is multiplied at least about twice as fast as float32."""
    return has_amx() or (has_avx512_bfloat16() and vendor() == FULL_RATE)


@cache
def vendor() -> str:
    """Return the vendor of this CPU as Linux names it; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def _may_use(supported: str, *names: str) -> bool:
    """Return whether torch sees an instruction set and ONEDNN_MAX_CPU_ISA, which our kernels follow too, allows it."""
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", "DEFAULT").upper()
    if allowed != "DEFAULT" and not any(name in allowed for name in names):
        return False
    return bool(getattr(torch.cpu, supported, lambda: False)())


@cache
def may_use_tiles() -> bool:
    """Request the tiles of AMX from Linux. Return whether it grants them."""
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.syscall(SYS_ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0)
