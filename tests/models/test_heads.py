"""The fast heads compared with the plain one: integers, the Triton kernel interpreted on the CPU, and the trial run."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_ingest.models.heads.selection import build_head, passes
from sparse_ingest.models.heads.tiles import IntegerHead, TiledHead
from sparse_ingest.models.integers import STEPS, rounded_weight
from sparse_ingest.models.linear import has_avx2, has_vnni
from sparse_ingest.models.packing import Packing

CPU = torch.device("cpu")
RAGGED = (1, 5, 31, 32, 33, 129, 7)


def random_inputs(lengths: tuple[int, ...], width: int, vocabulary: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(vocabulary)
    rows = torch.randn(sum(lengths), width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    return rows, weight, torch.randn(vocabulary, generator=generator)


def plain(weight, bias) -> TiledHead:
    return TiledHead(weight.float(), bias, device=CPU, dtype=torch.float32)


of_integers = pytest.mark.parametrize(
    "integers",
    [
        pytest.param(torch.int8, marks=pytest.mark.skipif(not has_vnni(), reason="this CPU has no VNNI")),
        pytest.param(torch.int16, marks=pytest.mark.skipif(not has_avx2(), reason="this CPU has no AVX2")),
    ],
    ids=str,
)


@of_integers
@pytest.mark.parametrize("lengths", [RAGGED, (1,), (40, 40)])
@pytest.mark.parametrize("vocabulary", [1, 511, 512, 1300])
def test_weights_of_integers_are_within_the_rounding_error(
    integers: torch.dtype, lengths: tuple[int, ...], vocabulary: int
) -> None:
    rows, weight, bias = random_inputs(lengths, 64, vocabulary)
    packing = Packing(lengths, CPU)
    found, expected = IntegerHead(weight, bias, integers)(rows, packing), plain(weight, bias)(rows, packing)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    # The worst case: half a step of each of 64 factors on both sides, all errors with the same sign.
    step = rows.abs().max() / STEPS[integers] * weight.abs().max()
    steps = (step + rounded_weight(weight, integers)[1].max() * rows.abs().max()) / 2
    assert (found - expected).abs().max() < 64 * steps
    assert (found - expected).abs().mean() < 2 * steps


@of_integers
@pytest.mark.parametrize("width", [8, 768, 4096])
def test_sums_of_integers_are_exact(integers: torch.dtype, width: int) -> None:
    """Older instructions add pairs of int8 in 16 bits, and sums of int16 in 32, which large factors overflow."""
    rows, weight = torch.ones(40, width), torch.ones(600, width)
    weight[::2] = -1
    found = IntegerHead(weight, torch.zeros(600), integers)(rows, Packing((40,), CPU))
    rounded, scales = rounded_weight(weight, integers)
    torch.testing.assert_close(found[0, 1::2], (rounded.sum(1) * scales)[1::2], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0, 1::2], torch.full((300,), float(width)), rtol=0.005, atol=0)
    assert not found[0, ::2].any()


@of_integers
def test_each_document_has_its_own_scale(integers: torch.dtype) -> None:
    """A document in the same batch with hidden states 1,000 times as large changes no bit."""
    rows, weight, bias = random_inputs((9, 6), 64, 700)
    head = IntegerHead(weight, bias, integers)
    alone = head(rows[9:], Packing((6,), CPU))
    rows[:9] *= 1000
    assert torch.equal(head(rows, Packing((9, 6), CPU))[1:], alone)


@of_integers
def test_hidden_states_of_zero_give_the_bias(integers: torch.dtype) -> None:
    _, weight, bias = random_inputs((1,), 64, 700)
    found = IntegerHead(weight, bias, integers)(torch.zeros(5, 64), Packing((2, 3), CPU))
    torch.testing.assert_close(found, bias.relu().expand(2, -1))


# Lengths, width, vocabulary. In the fourth and fifth case several programs share documents; the last case is too wide
# to keep weights in shared memory, and its last step of the width is half empty.
CASES = [(RAGGED, 48, 200), ((1,), 64, 64), ((128, 64, 1), 130, 129), ((2,) * 40, 16, 65),
         ((70,) * 9 + (1300,) + (65,) * 7, 16, 65), ((300, 128, 1), 312, 129)]  # fmt: skip
# The interpreter uses numpy, which has no bfloat16; on a device the trial covers it.
DTYPES = ("float32", "float16")
INTERPRETED = f"""
import json, sys, torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_heads import CASES, CPU, DTYPES, plain, random_inputs, verdicts
from sparse_ingest.models.heads.triton_max import TritonHead
from sparse_ingest.models.packing import Packing

def compared(lengths, width, vocabulary, dtype):
    rows, weight, bias = random_inputs(lengths, width, vocabulary, dtype)
    packing = Packing(lengths, CPU)
    head = TritonHead(weight, bias, device=CPU, dtype=dtype)
    found, expected = head(rows, packing), plain(weight, bias)(rows.float(), packing)
    difference = (found - expected).abs().max().item() if found.shape == expected.shape else None
    return {{"difference": difference, "largest": expected.max().item(), "dtype": str(found.dtype),
            "padded": len(head._bias)}}

print(json.dumps({{
    "cases": {{f"{{place}} {{name}}": compared(*case, getattr(torch, name))
              for place, case in enumerate(CASES) for name in DTYPES}},
    "verdicts": verdicts(TritonHead),
}}))
"""  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict:
    """The kernel's results on the CPU, from a separate process: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", INTERPRETED]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def verdicts(triton_head: Any) -> list[bool]:
    """Return whether the trial accepts the kernel, and kernels with a wrong column, NaN or too few columns."""
    _, weight, bias = random_inputs((1,), 32, 70)
    head, reference = triton_head(weight, bias, device=CPU, dtype=torch.float32), plain(weight, bias)
    wrong = (
        lambda *given: _changed(head(*given), (3, 69), 0.01),
        lambda *given: _changed(head(*given), (0, 0), float("nan")),
        lambda *given: head(*given)[:, :-1],
    )
    return [passes(one, reference, width=32, device=CPU, dtype=torch.float32) for one in (head, *wrong)]


def _changed(weights: torch.Tensor, place: tuple[int, int], by: float) -> torch.Tensor:
    weights = weights.clone()
    weights[place] += by
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_kernel_matches_the_plain_head(interpreted: dict, case: int, dtype: str) -> None:
    found = interpreted["cases"][f"{case} {dtype}"]
    assert found["dtype"] == "torch.float32"
    # Sums are float32 for half precision too; only their order differs.
    assert found["largest"] > 1 and found["difference"] < 1e-5 * found["largest"]


def test_the_kernel_pads_the_vocabulary_to_full_tiles(interpreted: dict) -> None:
    padded = [interpreted["cases"][f"{case} float32"]["padded"] for case in range(len(CASES))]
    assert padded == [256, 128, 256, 128, 128, 256]


def test_the_trial_accepts_the_kernel_and_rejects_wrong_ones(interpreted: dict) -> None:
    assert interpreted["verdicts"] == [True, False, False, False]


def test_a_head_that_cannot_run_on_the_device_is_not_used_and_noted(monkeypatch, caplog) -> None:
    """Triton compiles nothing for the CPU."""
    from sparse_ingest.models.heads import selection

    pytest.importorskip("triton")
    from sparse_ingest.models.heads.triton_max import TritonHead

    _, weight, bias = random_inputs((1,), 16, 70)
    monkeypatch.setattr(selection, "Kernel", lambda *parts, **_: TritonHead(*parts, device=CPU, dtype=torch.float32))
    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: "avx512")
    with caplog.at_level(logging.WARNING):
        head = build_head(weight, bias, device=CPU, dtype=torch.float32)
    assert isinstance(head, TiledHead)
    assert "The compiled head on cpu is not used" in caplog.text
