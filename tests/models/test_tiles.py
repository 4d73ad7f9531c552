"""The tiled head compared with full logits, and its memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.largest_output import LargestOutput

from sparse_ingest.models.heads.tiles import CPU_TILE, TiledHead, logarithm
from sparse_ingest.models.packing import Packing

CPU = torch.device("cpu")


LENGTHS = (7, 7, 7)


def random_inputs(vocabulary: int, width: int = 16, lengths: tuple[int, ...] = LENGTHS):
    generator = torch.Generator().manual_seed(vocabulary)
    shapes = ((sum(lengths), width), (vocabulary, width), (vocabulary,))
    return (torch.randn(*shape, generator=generator) for shape in shapes)


def head_of(weight, bias, dtype=torch.float32) -> TiledHead:
    return TiledHead(weight, bias, device=CPU, dtype=dtype)


def full_logits_maximum(rows, weight, bias, lengths: tuple[int, ...]):
    logits = (rows.double() @ weight.double().T + bias.double()).relu()
    return torch.stack([part.amax(0) for part in logits.split(lengths)]).float()


@pytest.mark.parametrize("vocabulary", [1, 200, CPU_TILE - 1, CPU_TILE, CPU_TILE + 1, 3 * CPU_TILE + 5])
@pytest.mark.parametrize("lengths", [(7, 7, 7), (1,), (9, 9, 4, 1, 1), (2, 70, 1, 69, 68, 3)])
def test_the_tiled_head_is_the_relu_of_the_maximum_of_full_logits(vocabulary: int, lengths: tuple[int, ...]) -> None:
    rows, weight, bias = random_inputs(vocabulary, lengths=lengths)
    found = head_of(weight, bias)(rows, Packing(lengths, CPU))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, full_logits_maximum(rows, weight, bias, lengths), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("activation", "times"), [("relu", 1), ("log1p_relu", 2)])
def test_the_activation_applies_its_logarithms(activation: str, times: int) -> None:
    weights = torch.tensor([0.25, 1.0, 7.5])
    expected = weights.clone()
    for _ in range(times):
        expected = (expected + 1).log()
    torch.testing.assert_close(logarithm(weights, activation), expected)


def test_the_head_does_not_change_its_inputs() -> None:
    given = list(random_inputs(700))
    copies = [tensor.clone() for tensor in given]
    head, packing = head_of(*given[1:]), Packing(LENGTHS, CPU)
    assert torch.equal(head(given[0], packing), head(given[0], packing))
    assert all(torch.equal(*pair) for pair in zip(copies, given, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_weights_close_to_float32(dtype: torch.dtype) -> None:
    """Also if every product is below zero and the bias above it."""
    rows, weight, bias = random_inputs(700)
    rows, weight, bias = torch.cat((rows[:14], -rows[14:].abs())), weight.abs(), bias + 5
    expected = full_logits_maximum(rows, weight, bias, LENGTHS)
    found = head_of(weight, bias, dtype)(rows.to(dtype), Packing(LENGTHS, CPU))
    assert found.dtype == torch.float32 and 0 < (found[2] > 0).sum() < 700
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_logits_of_all_tokens_are_never_allocated() -> None:
    lengths, vocabulary = (32,) * 8, 20 * CPU_TILE
    rows, weight, bias = random_inputs(vocabulary, lengths=lengths)
    head = head_of(weight, bias)
    with LargestOutput() as largest, torch.inference_mode():
        head(rows, Packing(lengths, CPU))
    assert largest.elements == max(sum(lengths) * CPU_TILE, len(lengths) * vocabulary)
    with LargestOutput() as largest:
        (rows @ weight.T).amax(1)
    assert largest.elements == sum(lengths) * vocabulary


def test_encoding_a_batch_never_allocates_all_logits() -> None:
    """With the real vocabulary, from token ids to weights."""
    from support.checkpoints import PACKAGED, build_encoder

    encoder = build_encoder(PACKAGED)
    token_ids = [ids for ids, _ in encoder.tokenize(["river stone lamp " * 8] * 8)]
    length = len(token_ids[0])
    with LargestOutput() as largest:
        encoder.maker.compute(token_ids, np.arange(8))
    # The embedding table is not an output; the largest outputs are dense rows, in panels of 32 columns, and tiles.
    assert largest.elements <= max(8 * 30528, 8 * length * CPU_TILE) < 8 * length * 30522 / 10
