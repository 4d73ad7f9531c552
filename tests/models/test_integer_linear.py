"""Linear layers in integers: their numbers, with compiled functions and with torch, and models that use them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import checkpoints
from support.checkpoints import build_encoder, make_masked_lm
from support.emulated_cpu import failing_compiler, with_emulated_instructions

from sparse_ingest.errors import CheckpointError
from sparse_ingest.models import integer_linear as module
from sparse_ingest.models import integer_linear_text, threads
from sparse_ingest.models.compiled import compile_function
from sparse_ingest.models.integer_linear import (
    IntegerLinear,
    feed_forward,
    functions_of,
    integer_linear,
    tried_functions,
)
from sparse_ingest.models.integers import STEPS, rounded_weight
from sparse_ingest.models.linear import feed_forward_of, has_avx2, has_vnni, pack_linear_layers, product_of, sum_of

pytest.importorskip("llvmlite.binding")
COUNTS = (1, 3, 4, 5, 11, 12, 13, 15, 16, 17, 23, 24, 28, 29, 100)


@pytest.fixture(
    autouse=True,
    params=[
        torch.int8,
        pytest.param(torch.int16, marks=pytest.mark.skipif(not has_avx2(), reason="this CPU has no AVX2")),
    ],
    ids=str,
)
def integers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """The integers. The compiled functions are tested, not torch, which replaces wrong ones.

    Without VNNI its instruction is emulated; torch would add pairs in 16 bits there, which overflows.
    """
    integers: torch.dtype = request.param
    if integers == torch.int8 and not has_vnni():
        monkeypatch.setattr(
            module, "compile_function",
            lambda text, *given, **_: compile_function(with_emulated_instructions(text), *given),
        )  # fmt: skip
        monkeypatch.setattr(
            module, "exact_product", lambda rows, weight, out: out.copy_(rows.double() @ weight.double())
        )
    assert functions_of(64, integers)
    yield integers
    functions_of.cache_clear()


@pytest.fixture
def dtype(integers: torch.dtype) -> str:
    """The dtype of models with these layers."""
    if integers == torch.int8 and not has_vnni():
        pytest.skip("this CPU has no VNNI")
    return {torch.int8: "int8-int8", torch.int16: "int16"}[integers]


def layer(columns: int, width: int, *, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight and a bias; a column of the weight is zero, another one large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(columns, width, generator=generator) * 0.05
    weight[3], weight[5] = 0, weight[5] * 100
    return weight, torch.randn(columns, generator=generator)


def rows_of(count: int, width: int) -> torch.Tensor:
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(count))
    rows[0] *= 1000
    rows[-1] = 0
    return rows


@pytest.mark.parametrize("rows_at_once", [12, 10_000])
@pytest.mark.parametrize(("columns", "width"), [(64, 64), (96, 192), (32, 768), (512, 128)])
def test_compiled_functions_return_the_bits_of_torch(
    columns: int, width: int, rows_at_once: int, integers: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "rows_in_cache", lambda _: rows_at_once)
    weight, bias = layer(columns, width)
    for given in (bias, None):
        fast, plain = integer_linear(weight, given, integers), IntegerLinear(weight, given, integers, None)
        for count in COUNTS:
            rows, others = rows_of(count, width), torch.randn(count, columns)
            assert torch.equal(fast(rows), plain(rows))
            around = torch.full((count + 2, columns), 7.0)
            assert torch.equal(fast(rows, others, out=around[1:-1]), plain(rows, others))
            assert (around[0] == 7).all() and (around[-1] == 7).all()


def test_products_are_those_of_rounded_numbers(integers: torch.dtype) -> None:
    columns, width = 64, 128
    weight, bias = layer(columns, width)
    rows = rows_of(40, width)
    exact = rows.double() @ weight.double().T + bias
    # Half a step of each factor, times the other factor.
    step = rows.abs().amax(1, keepdim=True).double() / STEPS[integers]
    of_column = rounded_weight(weight, integers)[1].double()
    most = (step * weight.abs().sum(1) + of_column * rows.abs().sum(1, keepdim=True) + width * step * of_column) / 2
    far = (integer_linear(weight, bias, integers)(rows) - exact).abs()
    assert (far <= most + 1e-4 * exact.abs().amax()).all()
    assert far.mean() > 0.01 / STEPS[integers]  # they are rounded
    assert torch.equal(integer_linear(weight, bias, integers)(rows)[-1], bias)


def test_a_row_is_the_same_in_every_batch(integers: torch.dtype) -> None:
    weight, bias = layer(64, 128)
    computed, rows = integer_linear(weight, bias, integers), rows_of(100, 128)
    together = computed(rows)
    for start, end in ((0, 1), (1, 13), (20, 37), (99, 100)):
        assert torch.equal(together[start:end], computed(rows[start:end]))


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_not_finite_stay_so_in_their_row(number: float, integers: torch.dtype) -> None:
    weight, bias = layer(64, 128)
    up, down = integer_linear(*layer(192, 64), integers), integer_linear(*layer(64, 192), integers)
    rows = torch.randn(30, 128)
    rows[7, 77] = number
    for computed in (integer_linear(weight, bias, integers), IntegerLinear(weight, bias, integers, None)):
        finite = computed(rows).isfinite()
        assert not finite[7].any() and finite[:7].all() and finite[8:].all()
    finite = feed_forward(up, down)(rows[:, 64:].contiguous()).isfinite().all(1)
    assert finite.tolist() == [place != 7 for place in range(30)]


def test_the_compiled_gelu_is_as_close_as_that_of_torch(integers: torch.dtype) -> None:
    functions = functions_of(512, integers)
    assert functions
    given = torch.cat([torch.linspace(-14, 14, 512).repeat(2, 1), torch.randn(20, 512) * 3])
    found, scales = given.clone(), torch.empty(len(given))
    rounded = torch.empty(given.shape, dtype=torch.uint8 if integers == torch.int8 else torch.int16)
    functions.gelu_and_quantize(found.data_ptr(), len(given), rounded.data_ptr(), scales.data_ptr())
    exact, of_torch = (torch.nn.functional.gelu(each) for each in (given.double(), given))
    assert (found - exact).abs().amax() <= max(1e-6, float((of_torch - exact).abs().amax()))
    steps = rounded.double() - functions.rounding.offset
    torch.testing.assert_close(steps * scales.unsqueeze(1), exact, rtol=0, atol=7.1 / STEPS[integers])


@pytest.mark.parametrize("between", [1, 1 << 12, 1 << 30])
def test_feed_forward_layers_are_computed_some_rows_at_a_time(
    between: int, monkeypatch: pytest.MonkeyPatch, integers: torch.dtype
) -> None:
    monkeypatch.setattr(module, "BETWEEN_BYTES", between)
    up, down, rows = layer(256, 64), layer(64, 256, seed=1), rows_of(77, 64)
    fast = feed_forward(integer_linear(*up, integers), integer_linear(*down, integers))(rows)
    plain = feed_forward(IntegerLinear(*up, integers, None), IntegerLinear(*down, integers, None))(rows)
    # GELU differs in the last bits, which rarely moves a number to the next integer.
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().amax()))


def test_threads_compute_in_inference_mode_without_functions(
    monkeypatch: pytest.MonkeyPatch, integers: torch.dtype
) -> None:
    monkeypatch.setattr(threads, "LEAST_OPERATIONS", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    up, down = (IntegerLinear(*layer(*size), integers, None) for size in ((1024, 128), (128, 1024)))
    with torch.inference_mode():
        rows = rows_of(2000, 128)
        assert torch.equal(feed_forward(up, down)(rows)[-3:], feed_forward(up, down)(rows[-3:]))


def test_threads_share_the_columns_of_a_batch_that_is_alone(
    monkeypatch: pytest.MonkeyPatch, integers: torch.dtype
) -> None:
    weight, bias = layer(160, 128)
    computed, rows, others = integer_linear(weight, bias, integers), rows_of(50, 128), torch.randn(50, 160)
    alone = computed(rows, others)
    both = feed_forward(integer_linear(*layer(1024, 128), integers), integer_linear(*layer(128, 1024), integers))
    many = rows_of(2000, 128)
    expected = both(many)
    monkeypatch.setattr(threads, "LEAST_OPERATIONS", 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    started: list[int] = []
    monkeypatch.setattr(
        threads, "ThreadPoolExecutor", lambda workers: started.append(workers) or ThreadPoolExecutor(workers)
    )
    assert torch.equal(computed(rows, others), alone) and started == [3]
    assert torch.equal(both(many), expected) and started == [3, 3]
    assert torch.equal(both(many[:93]), expected[:93]) and started == [3, 3, 3]


@pytest.mark.parametrize("failure", ["wrong numbers", "no llvmlite", "broken llvmlite"])
def test_torch_is_used_if_the_functions_fail(
    failure: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, integers: torch.dtype
) -> None:
    weight, bias = layer(64, 64)
    rows = rows_of(20, 64)
    expected = integer_linear(weight, bias, integers)(rows)
    functions_of.cache_clear()
    monkeypatch.setattr(module, "compile_function", failing_compiler(failure))
    with caplog.at_level(logging.INFO):
        found = integer_linear(weight, bias, integers)(rows)
    assert functions_of(64, integers) is None and torch.equal(found, expected)
    assert "so encoding is slower: " in caplog.text


def test_the_trial_refuses_a_wrong_gelu(monkeypatch: pytest.MonkeyPatch, integers: torch.dtype) -> None:
    def square(way: int) -> Iterator[str]:
        yield f"%look{way} = fmul <16 x float> %before{way}, %before{way}"

    monkeypatch.setattr(integer_linear_text, "_gelu", square)
    assert tried_functions(64, integers) is None


def test_tensors_of_other_sizes_are_refused(integers: torch.dtype) -> None:
    weight, bias = layer(64, 128)
    computed, rows = integer_linear(weight, bias, integers), torch.randn(20, 128)
    for given in (
        (rows.double(),), (rows[:, :64],), (torch.randn(20, 256),), (rows, torch.randn(20, 32)),
        (rows, torch.randn(19, 64)),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match="expected float32"):
            computed(*given)
    wide = torch.zeros(20, 128)
    with pytest.raises(RuntimeError, match="not contiguous"):
        computed(rows, out=wide[:, :64])
    others = torch.randn(20, 128)[:, ::2]
    assert torch.equal(computed(rows, others), computed(rows, others.contiguous()))
    assert torch.equal(integer_linear(weight.T.contiguous().T, bias, integers)(rows), computed(rows))


@pytest.mark.parametrize("shape", [(64, 64), (64, 512), (128, 128)], ids=str)
def test_a_layer_of_another_size_is_reported(
    shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    monkeypatch.setattr(checkpoints, "WIDTH", 64)
    model = make_masked_lm(tmp_path, "bert")
    file = model / "model.safetensors"
    name, tensors = "bert.encoder.layer.0.output.dense.weight", load_file(file)
    assert tensors[name].shape != shape
    save_file({**tensors, name: torch.randn(shape)}, file, metadata={"format": "pt"})
    for name in ("float32", dtype):
        with pytest.raises(CheckpointError, match=r"output\.dense"):
            build_encoder(model, dtype=name)


def test_layers_of_other_sizes_compute_in_float32(integers: torch.dtype) -> None:
    for columns, width in ((50, 64), (64, 60)):
        (weight, bias), back = layer(columns, width), layer(width, columns)
        rows, others = rows_of(20, width), torch.randn(20, columns)
        assert torch.equal(product_of(weight, bias, integers=integers)(rows), product_of(weight, bias)(rows))
        assert torch.equal(sum_of(weight, bias, integers=integers)(rows, others), sum_of(weight, bias)(rows, others))
        found, expected = (feed_forward_of(back, (weight, bias), integers=kind)(rows) for kind in (integers, None))
        assert torch.equal(found, expected)


def test_linear_layers_of_a_module_keep_their_shapes(integers: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32, bias=False))
    given = torch.randn(2, 5, 64)
    with torch.inference_mode():
        expected = model(given)
        pack_linear_layers(model, integers=integers)
        found = model(given)
        assert model(given[:, :0]).shape == (2, 0, 32)
    assert found.shape == expected.shape == (2, 5, 32) and not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=6 / STEPS[integers] * float(expected.abs().amax()))


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "roberta", "gte", "modernbert"])
def test_models_give_nearly_the_weights_of_float32(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, integers: torch.dtype, dtype: str
) -> None:
    monkeypatch.setattr(checkpoints, "WIDTH", 64)
    model = make_masked_lm(tmp_path, architecture)
    texts = ["river stone lamp water " * 8, "water of the river", "lamp", "the stone"]
    names = ("float32", dtype, "int8") if integers == torch.int8 else ("float32", dtype)
    expected, found, *others = (build_encoder(model, dtype=name).encode(texts).vectors for name in names)
    assert abs(found.weights.sum() / expected.weights.sum() - 1) < 6 / STEPS[integers]
    assert all(not np.array_equal(found.weights, other.weights) for other in (expected, *others))
