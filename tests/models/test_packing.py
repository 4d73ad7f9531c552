"""Packed batches: row layout, attention masks, and which models are packed."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import ARCHITECTURES, build_encoder, make_masked_lm
from support.largest_output import LargestOutput

from sparse_ingest.checkpoints.layouts import read_checkpoint
from sparse_ingest.models import linear
from sparse_ingest.models.body import Body
from sparse_ingest.models.packing import PADDING, PIECE, Packing, ordinal_positions, packed_attention, positions_behind

CPU = torch.device("cpu")
lengths_of = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(tuple)


@settings(max_examples=60)
@given(lengths_of)
def test_blocks_hold_each_document_and_repeat_only_its_own_rows(lengths: tuple[int, ...]) -> None:
    index, blocks = Packing(lengths, CPU).blocks
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    rows = np.arange(sum(lengths)) if index is None else index.numpy()
    assert [document for block in blocks for document in range(block.document, block.document + block.documents)] == [
        *range(len(lengths))
    ]
    for block in blocks:
        held = rows[block.rows].reshape(block.documents, block.length)
        for place, document in enumerate(range(block.document, block.document + block.documents)):
            assert set(held[place]) == set(np.flatnonzero(document_of == document))
            assert block.length <= lengths[document] * (1 + PADDING)


def test_positions_restart_with_each_document() -> None:
    token_ids = [np.array(ids, dtype=np.int32) for ids in ([7, 7, 7], [9], [4, 1, 4])]
    assert ordinal_positions(token_ids).tolist() == [0, 1, 2, 0, 0, 1, 2]
    # In RoBERTa, a padding token within a text gets the padding position and is not counted.
    assert positions_behind(1, token_ids).tolist() == [2, 3, 4, 2, 2, 1, 3]


def test_positions_after_padding_match_transformers() -> None:
    from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

    ids = np.array([0, 9, 1, 8, 8, 1, 2], dtype=np.int32)
    expected = RobertaEmbeddings.create_position_ids_from_input_ids(torch.from_numpy(ids)[None].long(), 1)[0]
    assert positions_behind(1, [ids]).tolist() == expected.tolist()


@pytest.mark.parametrize("reach", [None, 0, 2, 50])
def test_a_token_attends_to_its_own_document_within_its_window(reach: int | None) -> None:
    lengths, heads, width = (PIECE * 2 + 9, 60, 60, 5, 5, 1, 9), 2, 4  # three pieces of the first one
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, heads, sum(lengths), width, generator=generator) for _ in range(3))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(sum(lengths))
    seen = document[:, None] == document[None, :]
    if reach is not None:
        seen &= (place[:, None] - place[None, :]).abs() <= reach
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~seen, float("-inf"))
    expected = (scores.softmax(-1) @ value).transpose(1, 2)
    window = None if reach is None else reach + 1
    found, _ = packed_attention(
        torch.nn.Identity(), query, key, value, None, packing=Packing(lengths, CPU), scaling=0.3, sliding_window=window
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_and_padded_hidden_states_are_the_same(architecture: str, tmp_path: Path) -> None:
    body = Body(read_checkpoint(str(make_masked_lm(tmp_path, architecture))), device=CPU, dtype=torch.float32)
    token_ids = [np.arange(5, 5 + length, dtype=np.int32) for length in (30, 30, 17, 3, 1)]
    with torch.inference_mode():
        packed, packing = body.hidden(token_ids, 0)
        body._pad("for a test")
        padded, same = body.hidden(token_ids, 0)
    assert not body.packs and packing.lengths == same.lengths
    assert packed.shape == padded.shape == (81, packed.shape[1])
    torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_memory_does_not_grow_with_the_square_of_a_batch(architecture: str, tmp_path: Path) -> None:
    """A mask over all tokens of a packed row would fill the memory for documents of 8,192 tokens."""
    body = build_encoder(make_masked_lm(tmp_path, architecture)).maker.body
    assert body.packs
    token_ids = [np.arange(5, 45, dtype=np.int32)] * 50
    with LargestOutput() as largest, torch.inference_mode():
        body.hidden(token_ids, 0)
    assert 2000 * 32 <= largest.elements <= 2000 * 200 < 2000**2


def test_a_model_with_other_results_when_packed_is_padded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparse_ingest.models import body

    checkpoint = read_checkpoint(str(make_masked_lm(tmp_path)))
    token_ids = [np.arange(5, 5 + length, dtype=np.int32) for length in (9, 4)]
    expected = Body(checkpoint, device=CPU, dtype=torch.float32)
    monkeypatch.setattr(body, "ordinal_positions", lambda token_ids: ordinal_positions(token_ids)[::-1].copy())
    with caplog.at_level(logging.INFO):
        found = Body(checkpoint, device=CPU, dtype=torch.float32)
    assert expected.packs and not found.packs and "computes padded documents" in caplog.text
    with torch.inference_mode():
        torch.testing.assert_close(
            found.hidden(token_ids, 0)[0], expected.hidden(token_ids, 0)[0], rtol=1e-4, atol=1e-4
        )


def test_a_model_that_ignores_the_mask_encodes_each_document_alone(tmp_path: Path) -> None:
    """The Fourier transform of FNet has no mask."""
    import transformers

    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    model = transformers.FNetForMaskedLM(transformers.FNetConfig(vocab_size=200, **sizes))
    make_masked_lm(tmp_path)  # its tokenizer
    model.save_pretrained(tmp_path)
    body = Body(read_checkpoint(str(tmp_path)), device=CPU, dtype=torch.float32)
    token_ids = [np.arange(5, 5 + length, dtype=np.int32) for length in (30, 17, 17, 1)]
    with torch.inference_mode():
        found, packing = body.hidden(token_ids, 0)
        alone = torch.cat([body.hidden([ids], 0)[0] for ids in token_ids])
    assert not body.packs and packing.lengths == (30, 17, 17, 1)
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


class Missing:
    """torch.ops.mkldnn of a torch build without these operators."""


class Changed:
    """Operators with another signature."""

    def _reorder_linear_weight(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


class Wrong(Changed):
    """Operators with wrong results."""

    def _reorder_linear_weight(self, weight: torch.Tensor, rows: int = 0) -> torch.Tensor:
        return weight

    def _linear_pointwise(self, rows, weight, *_) -> torch.Tensor:
        return rows @ weight


@pytest.mark.parametrize("operators", [Missing, Changed, Wrong])
def test_torch_linear_layers_are_used_if_onednn_operators_fail(
    operators: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, texts = make_masked_lm(tmp_path), ["river stone", "lamp", "the water of the river " * 4]
    expected = build_encoder(model).encode(texts)
    monkeypatch.setattr(torch.ops, "mkldnn", operators())
    linear.has_fast_linear.cache_clear()
    try:
        found = build_encoder(model).encode(texts)
        assert not linear.has_fast_linear(torch.float32)
    finally:
        linear.has_fast_linear.cache_clear()
    assert found.vectors.token_ids.tolist() == expected.vectors.token_ids.tolist()
    np.testing.assert_allclose(found.vectors.weights, expected.vectors.weights, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_onednn_linear_layers_match_torch(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.Linear(40, 3, bias=False)).to(dtype)
    rows = torch.randn(50, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.inference_mode():
        expected = model(rows)
        linear.pack_linear_layers(model)
        torch.testing.assert_close(model(rows), expected)
        assert all(len(layer.weight) == 0 for layer in (model[0], model[2])) or not linear.has_fast_linear(dtype)


def test_gelu_after_a_product_matches_torch() -> None:
    rows, weight, bias = (torch.randn(*shape, generator=torch.Generator()) for shape in ((50, 24), (40, 24), (40,)))
    expected = torch.nn.functional.gelu(rows @ weight.T + bias)
    with torch.inference_mode():
        found = linear.gelu_of(linear.product_of(weight, bias))(rows)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_cpu_sees_few_numbers_of_rows() -> None:
    def rows(tokens: int) -> int:
        packing = Packing((tokens,), CPU, [np.ones(tokens, dtype=np.int32)])
        assert packing.ids[:tokens].all() and not packing.ids[tokens:].any()
        assert len(packing.without_padding(packing.ids)) == tokens
        return len(packing.ids)

    assert len({rows(tokens) for tokens in range(1, 2049)}) == 38
    assert [rows(tokens) for tokens in (1, 64, 65, 256, 257, 2047, 2048)] == [16, 64, 96, 256, 320, 2048, 2048]


def test_starts_are_the_first_rows_of_packed_documents_and_the_end() -> None:
    assert Packing((2, 1), CPU).starts.tolist() == [0, 2, 3]
