"""The tiled head against full logits, and what it never allocates."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_ingest.models.heads.tiles import CPU_TILE, TiledHead

CPU = torch.device("cpu")


class LargestOutput(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: ANN001
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def made(vocabulary: int, width: int = 16, batch: int = 3, length: int = 7):
    generator = torch.Generator().manual_seed(vocabulary)
    shapes = ((batch, length, width), (vocabulary, width), (vocabulary,))
    return (torch.randn(*shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("activation", ["relu", "log1p_relu"])
@pytest.mark.parametrize("vocabulary", [1, 200, CPU_TILE - 1, CPU_TILE, CPU_TILE + 1, 3 * CPU_TILE + 5])
def test_it_is_the_activation_of_full_logits(vocabulary: int, activation: str) -> None:
    hidden, weight, bias = made(vocabulary)
    expected = torch.log1p(torch.relu(hidden @ weight.T + bias)).amax(1)
    if activation == "log1p_relu":
        expected = torch.log1p(expected)
    head = TiledHead(weight, bias, activation=activation, device=CPU, dtype=torch.float32)
    found = head.logarithm(head(hidden))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_it_takes_and_keeps_what_it_was_given() -> None:
    hidden, weight, bias = made(700)
    copies = [tensor.clone() for tensor in (hidden, weight, bias)]
    head = TiledHead(weight, bias, activation="relu", device=CPU, dtype=torch.float32)
    first, again = head(hidden), head(hidden)
    assert torch.equal(first, again)
    assert all(torch.equal(*pair) for pair in zip(copies, (hidden, weight, bias), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_short_dtype_gives_float32_weights_nearby(dtype: torch.dtype) -> None:
    hidden, weight, bias = made(700)
    expected = TiledHead(weight, bias, activation="relu", device=CPU, dtype=torch.float32)(hidden)
    found = TiledHead(weight, bias, activation="relu", device=CPU, dtype=dtype)(hidden.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.1)


def test_logits_of_every_token_never_exist() -> None:
    batch, length, vocabulary = 8, 32, 20 * CPU_TILE
    hidden, weight, bias = made(vocabulary, batch=batch, length=length)
    head = TiledHead(weight, bias, activation="relu", device=CPU, dtype=torch.float32)
    with LargestOutput() as largest, torch.inference_mode():
        head(hidden)
    assert largest.elements == max(batch * length * CPU_TILE, batch * vocabulary)
    with LargestOutput() as largest:
        (hidden @ weight.T).amax(1)
    assert largest.elements == batch * length * vocabulary


def test_nor_in_a_whole_batch_of_documents() -> None:
    """Over the real vocabulary, from token ids to weights."""
    from made_checkpoints import PACKAGED, build_encoder

    encoder = build_encoder(PACKAGED)
    token_ids = encoder._tokenizer(["river stone lamp " * 8] * 8).token_ids
    length = len(token_ids[0])
    with LargestOutput() as largest:
        encoder._encode_batch(token_ids)
    # The embedding table is not an output; the largest things are dense rows and tiles.
    assert largest.elements <= max(8 * 30522, 8 * length * CPU_TILE) < 8 * length * 30522 / 10
