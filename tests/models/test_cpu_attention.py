"""Attention compiled for CPUs: its numbers, its instructions, and torch's attention where it cannot be used."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import checkpoints
from support.emulated_cpu import failing_compiler, with_emulated_bfloat16
from torch.nn.functional import scaled_dot_product_attention

from sparse_ingest.models import cpu_attention, threads
from sparse_ingest.models import packing as packing_module
from sparse_ingest.models.compiled import compile_function
from sparse_ingest.models.cpu_attention import WIDTHS, attention_of, instructions_for, tried_attention
from sparse_ingest.models.cpu_attention_products import BLOCK, FORMS
from sparse_ingest.models.cpu_attention_text import attention_text
from sparse_ingest.models.packing import Packing, packed_attention

llvm = pytest.importorskip("llvmlite.binding")
DTYPES = [dtype for dtype in (torch.bfloat16, torch.float32) if instructions_for(dtype, 64)]
needs_attention = pytest.mark.skipif(not DTYPES, reason="no attention is compiled for this CPU")
# As close as torch's own attention: bfloat16 rounds to 8 bits.
CLOSE = {torch.bfloat16: {"rtol": 2e-2, "atol": 1e-2}, torch.float32: {"rtol": 1e-5, "atol": 1e-5}}
CPU = torch.device("cpu")
GUARDED = """
import ctypes, mmap, sys
import numpy as np
import torch
from sparse_ingest.models.cpu_attention import attention_of
from sparse_ingest.models.packing import Packing

libc = ctypes.CDLL(None, use_errno=True)
maps = []

def guarded(tensor, at_end):
    size, page = tensor.numel() * tensor.itemsize, mmap.PAGESIZE
    pages = -(-size // page) * page
    area = mmap.mmap(-1, pages + 2 * page)
    maps.append(area)
    first = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for guard in (first, first + page + pages):
        assert libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0
    start = page + (pages - size if at_end else 0)
    held = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
    held.copy_(tensor)
    return held

dtype, lengths = getattr(torch, sys.argv[1]), tuple(map(int, sys.argv[2:]))
attention = attention_of(64, dtype)
rows = torch.randn(sum(lengths), 3, 2, 64).to(dtype)
places, _ = Packing(lengths, torch.device("cpu")).split(None, len(rows))
expected = torch.zeros(len(rows), 2, 64, dtype=dtype)
attention(*rows.permute(1, 2, 0, 3), places, 0.125, expected)
for at_end in (False, True):
    found = guarded(torch.zeros_like(expected), at_end)
    attention(*guarded(rows, at_end).permute(1, 2, 0, 3), places, 0.125, found)
    assert torch.equal(found, expected)
print("same")
"""
# Every remainder modulo 16 queries and 32 keys, short documents, and at the end those that are too close to it.
LENGTHS = (700, *range(80, 0, -1), 40, 5, 3, 2, 1)


@pytest.fixture(autouse=True)
def _compiled() -> Iterator[None]:
    """Make sure that the compiled function is tested, not torch's attention, which replaces a wrong one."""
    assert all(attention_of(width, dtype) for width in WIDTHS for dtype in DTYPES)
    yield
    attention_of.cache_clear()


@pytest.fixture(params=DTYPES or [torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def tensors(heads: int, width: int, lengths: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """Return query, key and value as a model gives them, side by side in each row."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, sum(lengths), 3, heads, width, generator=generator).to(dtype)
    return list(rows.permute(2, 0, 3, 1, 4))


def expected_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scale: float):
    parts = zip(*(tensor.float().split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in parts], dim=2).transpose(1, 2)


@needs_attention
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("contiguous", [False, True])
def test_attention_matches_torch_in_float32(width: int, dtype: torch.dtype, *, contiguous: bool) -> None:
    query, key, value = tensors(3, width, LENGTHS, dtype)
    if contiguous:  # as rotary embeddings return them
        query, key = query.contiguous(), key.contiguous()
    for scale in (width**-0.5, 1.0):
        found, _ = packed_attention(None, query, key, value, None, packing=Packing(LENGTHS, CPU), scaling=scale)
        expected = expected_of(query, key, value, LENGTHS, scale)
        torch.testing.assert_close(found.float(), expected, **CLOSE[dtype])


@needs_attention
def test_scores_far_apart_and_equal_ones_give_the_right_shares(dtype: torch.dtype) -> None:
    query, key, value = tensors(1, 64, (40,), dtype)
    for factor in (0.0, 100.0, -100.0):
        found, _ = packed_attention(None, query * factor, key, value, None, packing=Packing((40,), CPU))
        expected = expected_of(query * factor, key, value, (40,), 64**-0.5)
        torch.testing.assert_close(found.float(), expected, **CLOSE[dtype])


@needs_attention
def test_numbers_that_are_not_finite_stay_in_their_document(dtype: torch.dtype) -> None:
    lengths = (33, 40, 20)
    query, key, value = tensors(2, 32, lengths, dtype)
    for tensor, number in ((query, torch.nan), (key, torch.inf), (value, torch.nan)):
        before = tensor[:, :, 50].clone()
        tensor[:, :, 50] = number
        found, _ = packed_attention(None, query, key, value, None, packing=Packing(lengths, CPU))
        tensor[:, :, 50] = before
        rows = found.isfinite().all(dim=3).all(dim=2)[0]
        assert rows[:33].all() and not rows[50] and rows[73:].all()


@needs_attention
def test_every_row_is_the_same_in_another_batch(dtype: torch.dtype) -> None:
    lengths = tuple(length for length in LENGTHS if length >= BLOCK)  # shorter ones alone are computed by torch
    query, key, value = tensors(2, 64, lengths, dtype)
    together = packed_attention(None, query, key, value, None, packing=Packing(lengths, CPU))[0][0]
    start = 0
    for length in lengths:
        q, k, v = (tensor[:, :, start : start + length].contiguous() for tensor in (query, key, value))
        alone = packed_attention(None, q, k, v, None, packing=Packing((length,), CPU))[0][0]
        assert torch.equal(together[start : start + length], alone)
        start += length


@needs_attention
@pytest.mark.parametrize("longest", [30, 31, 32, 33, 60])
def test_documents_longer_than_a_sliding_window_use_torch(longest: int, dtype: torch.dtype) -> None:
    reach, lengths = 30, (longest, 20)
    query, key, value = tensors(2, 32, lengths, dtype)
    packing = Packing(lengths, CPU)
    found, _ = packed_attention(None, query, key, value, None, packing=packing, sliding_window=reach + 1)
    places = torch.arange(longest)
    q, k, v = (tensor.float() for tensor in (query, key, value))
    mask = (places.unsqueeze(1) - places).abs() <= reach
    longer = scaled_dot_product_attention(q[:, :, :longest], k[:, :, :longest], v[:, :, :longest], attn_mask=mask)
    shorter = scaled_dot_product_attention(q[:, :, longest:], k[:, :, longest:], v[:, :, longest:])
    expected = torch.cat([longer, shorter], dim=2).transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, **CLOSE[dtype])
    assert len(packing.split(reach, sum(lengths))[0]) == (2 if longest <= reach + 1 else 1)


@needs_attention
@pytest.mark.parametrize("lengths", [(16,), (1, 31), (33, 16), (17, 1), (48, 1, 1, 16), (500,)])
def test_nothing_outside_of_the_tensors_is_read_or_written(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    """In its own process: it ends if one of the pages around a tensor is touched."""
    given = [str(dtype).removeprefix("torch."), *map(str, lengths)]
    answer = subprocess.run([sys.executable, "-c", GUARDED, *given], capture_output=True, text=True, timeout=300)
    assert (answer.returncode, answer.stdout) == (0, "same\n"), answer.stderr


@needs_attention
@pytest.mark.parametrize("factor", [1e9, 1e12])
def test_huge_scores_are_those_of_one_key(factor: float, dtype: torch.dtype) -> None:
    query, key, value = tensors(1, 64, (40,), dtype)
    found, _ = packed_attention(None, query * factor, key, value, None, packing=Packing((40,), CPU))
    scores = (query[0, 0].float() * factor) @ key[0, 0].float().T
    torch.testing.assert_close(found[0, :, 0], value[0, 0][scores.argmax(1)])


@needs_attention
def test_tensors_that_do_not_fit_are_left_to_torch(dtype: torch.dtype) -> None:
    query, key, value = tensors(2, 64, (40,), dtype)
    for given, lengths in (((query, key, value[..., :32]), (40,)), ((query, key.half(), value), (40,)),
                           ((query, key, value), (40, 40))):  # fmt: skip
        packing = Packing(lengths, CPU)
        output = torch.empty(1, 80, 2, 64)
        assert packing_module._attend_compiled(*given, None, None, packing=packing, output=output) == packing.runs


@needs_attention
@pytest.mark.parametrize("architecture", ["bert", "gte", "modernbert"])
def test_models_give_the_weights_of_torch(
    architecture: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "HEADS", 1)  # 32 wide
    model = checkpoints.make_masked_lm(tmp_path, architecture)
    texts = ["river stone lamp water " * 8, "water of the river", "lamp", "the stone"]
    calls: list[int] = []
    attend = cpu_attention.Attention.__call__
    monkeypatch.setattr(
        cpu_attention.Attention, "__call__", lambda *given: (calls.append(len(given[4])), attend(*given))
    )
    with monkeypatch.context() as patch:
        patch.setattr(packing_module, "attention_of", lambda *_: None)
        expected = checkpoints.build_encoder(model).encode(texts).vectors
    assert not calls
    found = checkpoints.build_encoder(model, dtype=str(dtype).removeprefix("torch.")).encode(texts).vectors
    assert calls
    assert abs(found.weights.sum() / expected.weights.sum() - 1) < (0.05 if dtype == torch.bfloat16 else 1e-4)


@needs_attention
@pytest.mark.parametrize("failure", ["wrong numbers", "no llvmlite", "broken llvmlite"])
def test_torch_is_used_if_the_function_fails(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    attention_of.cache_clear()
    monkeypatch.setattr(cpu_attention, "compile_function", failing_compiler(failure))
    with caplog.at_level(logging.INFO):
        assert attention_of(64, DTYPES[0]) is None
    assert "so encoding is slower: " in caplog.text
    query, key, value = tensors(2, 64, (20,), DTYPES[0])
    found, _ = packed_attention(None, query, key, value, None, packing=Packing((20,), CPU))
    expected = expected_of(query, key, value, (20,), 64**-0.5)
    torch.testing.assert_close(found.float(), expected, **CLOSE[DTYPES[0]])


@needs_attention
def test_a_trial_without_memory_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes.")

    attention_of.cache_clear()
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="allocate"):
        patch.setattr(cpu_attention, "compile_function", no_memory)
        attention_of(64, DTYPES[0])
    assert attention_of(64, DTYPES[0]) is not None


@needs_attention
def test_other_widths_use_torch() -> None:
    assert attention_of(48, DTYPES[0]) is None and attention_of(128, DTYPES[0]) is None
    assert attention_of(64, torch.float16) is None


def test_avx2_computes_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert (instructions_for(torch.float32, 64), instructions_for(torch.bfloat16, 64)) == ("avx2", None)


@needs_attention
def test_threads_share_the_heads_of_a_batch_that_is_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = (120, 33)
    query, key, value = tensors(5, 64, lengths, dtype)
    alone, _ = packed_attention(None, query, key, value, None, packing=Packing(lengths, CPU))
    monkeypatch.setattr(threads, "LEAST_OPERATIONS", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    started: list[int] = []
    monkeypatch.setattr(
        threads, "ThreadPoolExecutor", lambda workers: started.append(workers) or ThreadPoolExecutor(workers)
    )
    shared, _ = packed_attention(None, query, key, value, None, packing=Packing(lengths, CPU))
    assert torch.equal(alone, shared) and started == [3]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_matches_torch_with_emulated_instructions(
    form: tuple[str, str], width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def emulated(text: str, name: str, *given, **_):
        return compile_function(with_emulated_bfloat16(text), name, *given)

    monkeypatch.setattr(cpu_attention, "compile_function", emulated)
    dtype, instructions = form
    assert tried_attention(width, getattr(torch, dtype), instructions)


# The oldest CPUs that LLVM knows with the instructions.
CPUS = {
    ("bfloat16", "amx"): "sapphirerapids",
    ("bfloat16", "avx512"): "cooperlake",
    ("float32", "avx512"): "skylake-avx512",
    ("float32", "avx2"): "haswell",
}
INSTRUCTIONS = {
    ("bfloat16", "amx"): ("ldtilecfg", "tdpbf16ps", "tilestored", "tilerelease", "vcvtneps2bf16"),
    ("bfloat16", "avx512"): ("vdpbf16ps", "vcvtneps2bf16"),
    ("float32", "avx512"): ("vfmadd", "%zmm"),
    ("float32", "avx2"): ("vfmadd", "%ymm", "vpslld"),
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", FORMS)
def test_the_function_is_compiled_to_the_expected_instructions(form: tuple[str, str], width: int) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly("\n".join(attention_text(FORMS[form], width)))
    module.verify()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    assembly = target.create_target_machine(cpu=CPUS[form], opt=3).emit_assembly(module)
    assert [word for word in INSTRUCTIONS[form] if word not in assembly] == []
    tiles = [word for word in ("ldtilecfg", "tilerelease") if word in assembly]
    assert bool(tiles) == (form[1] == "amx")
