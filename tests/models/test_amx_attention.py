"""Attention compiled for AMX: its numbers, its instructions, and torch's attention where it cannot be used."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_ingest.models import amx_attention
from sparse_ingest.models.amx_attention import SHORTEST, WIDTHS, Attention, attention_of
from sparse_ingest.models.amx_attention_text import attention_text
from sparse_ingest.models.linear import has_amx, may_use_tiles
from sparse_ingest.models.packing import Packing, packed_attention

llvm = pytest.importorskip("llvmlite.binding")
needs_amx = pytest.mark.skipif(not (has_amx() and may_use_tiles()), reason="this CPU has no AMX")
CPU = torch.device("cpu")
# Every remainder of a block of 16 queries and of 32 keys, and documents that torch computes.
LENGTHS = (700, *range(80, SHORTEST - 1, -1), 15, 3, 1)


def tensors(heads: int, width: int, lengths: tuple[int, ...], *, seed: int = 1) -> list[torch.Tensor]:
    """Return query, key and value as a model gives them, side by side in each row."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, sum(lengths), 3, heads, width, generator=generator).to(torch.bfloat16)
    return list(rows.permute(2, 0, 3, 1, 4))


def expected_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], scale: float):
    parts = zip(*(tensor.float().split(lengths, dim=2) for tensor in (query, key, value)), strict=True)
    return torch.cat([scaled_dot_product_attention(q, k, v, scale=scale) for q, k, v in parts], dim=2).transpose(1, 2)


@needs_amx
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("contiguous", [False, True])
def test_attention_matches_torch_in_float32(width: int, *, contiguous: bool) -> None:
    query, key, value = tensors(3, width, LENGTHS)
    if contiguous:  # as rotary embeddings return them
        query, key = query.contiguous(), key.contiguous()
    for scale in (width**-0.5, 1.0):
        found, _ = packed_attention(None, query, key, value, None, packing=Packing(LENGTHS, CPU), scaling=scale)
        expected = expected_of(query, key, value, LENGTHS, scale)
        # As close as torch's own attention: the numbers are rounded to 8 bits.
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-2)


@needs_amx
def test_scores_far_apart_and_equal_ones_give_the_right_shares() -> None:
    query, key, value = tensors(1, 64, (40,))
    for factor in (0.0, 100.0, -100.0):
        found, _ = packed_attention(None, query * factor, key, value, None, packing=Packing((40,), CPU))
        expected = expected_of(query * factor, key, value, (40,), 64**-0.5)
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-2)


@needs_amx
def test_numbers_that_are_not_finite_stay_in_their_document() -> None:
    lengths = (33, 40, 20)
    query, key, value = tensors(2, 32, lengths)
    for tensor, number in ((query, torch.nan), (key, torch.inf), (value, torch.nan)):
        before = tensor[:, :, 50].clone()
        tensor[:, :, 50] = number
        found, _ = packed_attention(None, query, key, value, None, packing=Packing(lengths, CPU))
        tensor[:, :, 50] = before
        rows = found.isfinite().all(dim=3).all(dim=2)[0]
        assert rows[:33].all() and not rows[50] and rows[73:].all()


@needs_amx
def test_every_row_is_the_same_in_other_company() -> None:
    query, key, value = tensors(2, 64, LENGTHS)
    together = packed_attention(None, query, key, value, None, packing=Packing(LENGTHS, CPU))[0][0]
    start = 0
    for length in LENGTHS:
        q, k, v = (tensor[:, :, start : start + length].contiguous() for tensor in (query, key, value))
        alone = packed_attention(None, q, k, v, None, packing=Packing((length,), CPU))[0][0]
        assert torch.equal(together[start : start + length], alone)
        start += length


@needs_amx
def test_documents_longer_than_a_sliding_window_are_left_to_torch() -> None:
    lengths = (60, 20)
    query, key, value = tensors(2, 32, lengths)
    found, _ = packed_attention(None, query, key, value, None, packing=Packing(lengths, CPU), sliding_window=31)
    places = torch.arange(60)
    q, k, v = (tensor.float() for tensor in (query, key, value))
    mask = (places.unsqueeze(1) - places).abs() <= 30
    longer = scaled_dot_product_attention(q[:, :, :60], k[:, :, :60], v[:, :, :60], attn_mask=mask)
    shorter = scaled_dot_product_attention(q[:, :, 60:], k[:, :, 60:], v[:, :, 60:])
    expected = torch.cat([longer, shorter], dim=2).transpose(1, 2)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-2)


@needs_amx
@pytest.mark.parametrize("failure", ["wrong numbers", "no llvmlite"])
def test_torch_is_used_if_the_function_fails(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def compile_function(*_, **__):
        if failure == "no llvmlite":
            raise ImportError("No module named 'llvmlite'")
        return lambda *_: None

    attention_of.cache_clear()
    monkeypatch.setattr(amx_attention, "compile_function", compile_function)
    with caplog.at_level(logging.INFO):
        assert attention_of(64) is None
    assert "Compiled attention is not used" in caplog.text
    query, key, value = tensors(2, 64, (20,))
    found, _ = packed_attention(None, query, key, value, None, packing=Packing((20,), CPU))
    expected = expected_of(query, key, value, (20,), 64**-0.5)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=1e-2)
    attention_of.cache_clear()


def test_other_widths_are_left_to_torch() -> None:
    assert attention_of(48) is None and attention_of(128) is None


@pytest.mark.parametrize("width", WIDTHS)
def test_the_function_is_compiled_to_the_expected_instructions(width: int) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly("\n".join(attention_text(width)))
    module.verify()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    assembly = target.create_target_machine(cpu="sapphirerapids", opt=3).emit_assembly(module)
    words = ("ldtilecfg", "tdpbf16ps", "tilestored", "tilerelease", "vscalefps", "vcvtneps2bf16", "vrndscaleps")
    assert [word for word in words if word not in assembly] == []


@needs_amx
def test_a_document_of_one_block_is_computed() -> None:
    query, key, value = (tensor[0] for tensor in tensors(1, 64, (SHORTEST,)))
    found = torch.full((SHORTEST, 1, 64), np.nan, dtype=torch.bfloat16)
    Attention(64)(query, key, value, [(0, SHORTEST)], 64**-0.5, found)
    assert found.isfinite().all()
