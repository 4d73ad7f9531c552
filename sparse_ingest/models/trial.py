"""Try torch, nanotoken and the compiled kernels on this machine, for `doctor`.

`doctor` runs `main` in a process of its own: a broken driver or library may hang or end the process.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec

from sparse_ingest.errors import first_line
from sparse_ingest.reporting import Check, checks_of, size_text

PROGRAM = "from sparse_ingest.models.trial import main; main()"
ROW_WIDTH = 768  # of linear layers, for a trial
_ENCODE = 'For encoding: pip install "sparse-ingest[encode]"'
_FAST = 'For speed: pip install "sparse-ingest[fast]"'


def main() -> None:
    """Print the findings as one line of JSON."""
    found = [*checks_of("torch", _torch), *checks_of("tokenizer", _tokenizer)]
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def _torch() -> Iterator[Check]:
    if not find_spec("torch"):
        yield Check("torch", "missing", "not installed: no model can encode", _ENCODE)
        return
    try:
        import torch
    except Exception as error:  # a broken build may raise any type
        reason = f"cannot be imported ({type(error).__name__}: {first_line(error)})"
        yield Check("torch", "problem", reason, "Reinstall torch in a version for this Python, CPU and driver.")
        return
    yield Check("torch", "ok", f"{torch.__version__}, {torch.get_num_threads()} threads")
    yield from _cpu()
    for number in range(torch.cuda.device_count()):
        yield from checks_of(f"GPU {number}", partial(_gpu, number))
    if not torch.cuda.device_count():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield Check("GPU", "missing", f"torch finds none (it was built with {built}); the CPU is used")


def _cpu() -> Iterator[Check]:
    import torch

    from sparse_ingest.models import cpu_attention
    from sparse_ingest.models.heads.cpu_kernel import instructions_for
    from sparse_ingest.models.heads.selection import fast_head_works
    from sparse_ingest.models.integer_linear import tried_functions
    from sparse_ingest.models.linear import has_amx, has_avx512_bfloat16, has_only_avx2, has_vnni
    from sparse_ingest.models.precision import faster_dtypes

    has = {
        "AMX": has_amx(), "AVX512 BF16": has_avx512_bfloat16(), "AVX512 VNNI": has_vnni(), "AVX2": has_only_avx2(),
    }  # fmt: skip
    faster = ", ".join(faster_dtypes("cpu"))
    instructions = ", ".join(name for name, there in has.items() if there)
    found = f"{instructions}; --dtype auto tries {faster}" if faster else "--dtype auto is float32 here"
    yield Check("CPU instructions", "ok" if instructions else "missing", found)
    heads = {"int8": (torch.float32, torch.int8), "bfloat16": (torch.bfloat16, None)}
    if has["AVX2"]:
        heads["int16"] = torch.float32, torch.int16
    for name, (dtype, integers) in heads.items():
        works = partial(fast_head_works, torch.device("cpu"), dtype, integers=integers)
        yield _kernel(f"{name} kernel", instructions_for(integers or dtype, 128), works)
    if kind := instructions_for(torch.float32, 128):  # None where the plain one is as fast
        yield _kernel("float32 kernel", kind, partial(fast_head_works, torch.device("cpu"), torch.float32))
    if has["AVX512 VNNI"]:
        yield _kernel("int8 linear layers", "avx512", partial(tried_functions, ROW_WIDTH, torch.int8))
    if has["AVX2"]:
        yield _kernel("int16 linear layers", "avx2", partial(tried_functions, ROW_WIDTH, torch.int16))
    width = cpu_attention.WIDTHS[-1]
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        if kind := cpu_attention.instructions_for(dtype, width):
            yield _kernel(f"{name} attention", kind, partial(cpu_attention.tried_attention, width, dtype, kind))


def _kernel(name: str, kind: str | None, works: Callable[[], object]) -> Check:
    """Try a compiled kernel for instructions of the CPU, or for a GPU."""
    slower = "the plain one is used, which is slower"
    if kind is None:
        return Check(name, "missing", f"none for this CPU; {slower}")
    try:
        if works():
            return Check(name, "ok", f"compiled for {kind}; its results are right")
        return Check(name, "problem", f"compiled for {kind}, but its results are wrong; {slower}", "Please report it.")
    except ImportError as error:
        return Check(name, "missing", f"{first_line(error)}; {slower}", _FAST)
    except Exception as error:  # a compiler that cannot compile for this device may raise any type
        return Check(name, "problem", f"cannot be compiled for {kind} ({first_line(error)}); {slower}", _FAST)


def _gpu(number: int) -> Iterator[Check]:
    import torch

    from sparse_ingest.models.heads.selection import fast_head_works

    device = torch.device("cuda", number)
    free, total = torch.cuda.mem_get_info(device)
    found = f"{torch.cuda.get_device_name(device)}, {size_text(free)} of {size_text(total)} free"
    yield Check(f"GPU {number}", "ok", found)
    yield _kernel(f"GPU {number} kernel", "Triton", partial(fast_head_works, device, torch.float16))


def _tokenizer() -> Iterator[Check]:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    from sparse_ingest.models.nanotokens import build_nanotokens

    slower = "the library tokenizers is used, which is slower"
    if not find_spec("nanotoken"):
        yield Check("tokenizer", "missing", f"nanotoken is not installed; {slower}", _FAST)
        return
    tokens = ("[UNK]", *"abcdefghijklmnopqrstuvwxyz", *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"))
    plain = Tokenizer(models.WordPiece({token: place for place, token in enumerate(tokens)}, unk_token="[UNK]"))
    plain.normalizer, plain.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    if build_nanotokens(plain):
        yield Check("tokenizer", "ok", "nanotoken returns the same tokens as the library tokenizers")
    else:
        yield Check("tokenizer", "problem", f"nanotoken does not work; {slower}", _FAST)
