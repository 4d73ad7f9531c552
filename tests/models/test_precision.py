"""The choice of `--dtype auto`: measured on documents, in a fixed order, with reasons."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import PACKAGED, TEXTS, build_encoder, make_masked_lm

from sparse_ingest.errors import UsageError
from sparse_ingest.models import linear, precision
from sparse_ingest.models.documents import Encoded
from sparse_ingest.models.heads.selection import refuse_integers
from sparse_ingest.models.linear import has_amx, has_fast_bfloat16, has_vnni, vendor
from sparse_ingest.models.memory import DocumentTooLarge
from sparse_ingest.models.precision import SAMPLE, choose_dtype, faster_dtypes
from sparse_ingest.models.tokenizer import FirstWindow
from sparse_ingest.records import SparseRows


class FixedEncoder:
    """An encoder that returns a given row of token id to weight."""

    def __init__(self, row: dict[int, float], tokens: int = 1) -> None:
        self.row, self.tokens = row, tokens

    def tokenize(self, texts) -> list[FirstWindow]:
        return [FirstWindow(np.zeros(self.tokens, np.int32), False)] * len(texts)

    def encode(self, texts) -> Encoded:
        ids, weights = np.array(list(self.row), np.int32), np.array(list(self.row.values()), np.float32)
        vectors = SparseRows([""], np.array([0, len(ids)]), ids, weights)
        return Encoded(vectors, 1, 0, np.zeros(1, np.int64), np.ones(1, np.int64))


FLOAT32 = {place: 1.0 for place in range(200)} | {500: 0.05}


def choose(**rows: dict[int, float]) -> dict:
    return choose_dtype(lambda dtype: FixedEncoder(rows[dtype]), "cuda", ["a text"])  # type: ignore[arg-type, return-value]


def test_the_first_dtype_that_keeps_enough_is_chosen() -> None:
    choice = choose(float32=FLOAT32, float16={**FLOAT32, 900: 0.3})
    assert choice == {
        "dtype": "float16", "device": "cuda", "documents": 1, "tried": {"float16": {"mass": 1.0, "terms": 1.0}},
    }  # fmt: skip


def test_a_dtype_that_loses_a_heavy_term_is_skipped() -> None:
    lost = {place: 1.0 for place in range(197)}
    choice = choose(float32=FLOAT32, float16=lost, bfloat16=FLOAT32)
    assert choice["dtype"] == "bfloat16" and choice["tried"]["float16"]["terms"] == 0.985
    assert choose(float32=FLOAT32, float16=lost, bfloat16=lost)["dtype"] == "float32"


def test_light_terms_count_only_by_their_mass() -> None:
    light = {**FLOAT32, **{place: 0.01 for place in range(1000, 1010)}}
    assert choose(float32=light, float16=FLOAT32)["dtype"] == "float16"
    heavier = {**FLOAT32, **{place: 0.09 for place in range(1000, 1010)}}
    assert choose(float32=heavier, float16=FLOAT32, bfloat16=FLOAT32)["dtype"] == "float32"


@pytest.mark.parametrize(("tokens", "documents"), [(1, 256), (64, 256), (65, 252), (512, 32), (8192, 2), (20_000, 1)])
def test_the_sample_is_bounded_by_its_tokens(tokens: int, documents: int) -> None:
    seen = []

    class Noted(FixedEncoder):
        def encode(self, texts) -> Encoded:
            seen.append(texts)
            return super().encode(texts)

    texts = [str(place) for place in range(SAMPLE)]
    choice = choose_dtype(lambda dtype: Noted(FLOAT32, tokens), "cuda", texts)  # type: ignore[arg-type, return-value]
    assert choice["documents"] == documents and seen == [texts[:documents]] * 2


def test_a_document_that_does_not_fit_in_memory_is_omitted_from_the_sample() -> None:
    class Small(FixedEncoder):
        def encode(self, texts) -> Encoded:
            if "long" in texts:
                raise DocumentTooLarge(texts.index("long"), 9, "cuda")
            return super().encode(texts)

    choice = choose_dtype(lambda dtype: Small(FLOAT32), "cuda", ["a", "long", "b"])  # type: ignore[arg-type, return-value]
    assert choice["dtype"] == "float16" and choice["documents"] == 2
    assert choose_dtype(lambda dtype: Small(FLOAT32), "cuda", ["long"])["dtype"] == "float32"  # type: ignore[arg-type, return-value]


def test_a_dtype_in_which_the_model_overflows_is_skipped(tmp_path: Path) -> None:
    model = make_masked_lm(tmp_path)
    weights, layer = load_file(model / "model.safetensors"), "bert.encoder.layer.0.intermediate.dense"
    weights[f"{layer}.bias"] += 65_000.0  # float16 ends at 65,504
    weights[f"{layer}.weight"] *= 1000
    save_file(weights, model / "model.safetensors")
    choice = choose_dtype(lambda dtype: build_encoder(model, dtype=dtype), "cuda", TEXTS)
    assert choice["tried"]["float16"] == {"mass": 0.0, "terms": 0.0} and "bfloat16" in choice["tried"]


def test_without_documents_no_dtype_is_tried() -> None:
    assert choose_dtype(lambda dtype: 1 / 0, "cuda", [])["dtype"] == "float32"  # type: ignore[arg-type, return-value]


def test_half_precision_is_measured_on_a_real_model(checkpoints: dict[str, str]) -> None:
    built = []

    def build(dtype: str):
        built.append(dtype)
        return build_encoder(checkpoints["plain-bert"], dtype=dtype)

    choice = choose_dtype(build, "cuda", TEXTS)
    assert built == ["float32", "float16"][: len(built)] + ["bfloat16"][: len(built) - 2]
    assert choice["documents"] == len(TEXTS)
    assert all(0.9 < share <= 1 for kept in choice["tried"].values() for share in kept.values())


def test_bfloat16_works_on_this_machine(checkpoints: dict[str, str]) -> None:
    expected = build_encoder(checkpoints["plain-bert"]).encode(TEXTS).vectors
    found = build_encoder(checkpoints["plain-bert"], dtype="bfloat16").encode(TEXTS).vectors
    assert found.weights.dtype == np.float32
    assert abs(found.weights.sum() / expected.weights.sum() - 1) < 0.05


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [("AVX2", False), ("avx512_core_bf16", False), ("AVX512_CORE_AMX", True), ("avx512_core_amx", True),
     ("DEFAULT", True), ("default", True), (None, True)],
)  # fmt: skip
def test_amx_can_be_forbidden_by_the_environment(monkeypatch: pytest.MonkeyPatch, limit, allowed: bool) -> None:
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert has_amx() == (allowed and torch.cpu._is_amx_tile_supported())
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert has_amx() == allowed


def test_a_gpu_tries_bfloat16_and_float16() -> None:
    assert faster_dtypes("cuda:1") == ("float16", "bfloat16")


@pytest.mark.parametrize(
    ("bfloat16", "vnni", "amx", "expected"),
    [(True, True, True, ("int8-bfloat16", "bfloat16", "int8")), (True, False, False, ("bfloat16",)),
     (True, True, False, ("int8-int8", "int8-bfloat16", "bfloat16", "int8")),
     (False, True, False, ("int8-int8", "int8")), (False, False, False, ())],
)  # fmt: skip
def test_dtypes_tried_on_a_cpu_depend_on_its_instructions(
    monkeypatch: pytest.MonkeyPatch, bfloat16, vnni, amx, expected
) -> None:
    monkeypatch.setattr(precision, "has_amx", lambda: amx)
    monkeypatch.setattr(precision, "has_fast_bfloat16", lambda: bfloat16)
    monkeypatch.setattr(precision, "has_vnni", lambda: vnni)
    monkeypatch.setattr(precision, "has_fast_int16", lambda: False)
    assert faster_dtypes("cpu") == expected


def test_int16_is_tried_with_avx2_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    functions: list[object] = [object(), None]
    monkeypatch.setattr(linear, "find_spec", lambda _: object())
    monkeypatch.setattr(linear, "functions_of", lambda *_: functions[0])
    assert faster_dtypes("cpu") == faster_dtypes("cpu", projects=False) == ("int16",)
    functions.reverse()  # they cannot be compiled
    assert faster_dtypes("cpu") == ()
    functions.reverse()
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert faster_dtypes("cpu") == ()
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(linear, "find_spec", lambda _: None)
    assert faster_dtypes("cpu") == ()


@pytest.mark.parametrize(
    ("amx", "avx512", "cpu_vendor", "limit", "fast"),
    [(False, True, "AuthenticAMD", "DEFAULT", True), (False, True, "AuthenticAMD", "avx512_core_bf16", True),
     (False, True, "AuthenticAMD", "AVX512_CORE_VNNI", False), (False, True, "GenuineIntel", "DEFAULT", False),
     (False, True, "", "DEFAULT", False), (False, False, "AuthenticAMD", "DEFAULT", False),
     (True, True, "GenuineIntel", "DEFAULT", True), (True, True, "GenuineIntel", "AVX512_CORE_BF16", False)],
)  # fmt: skip
def test_bfloat16_is_fast_with_amx_and_on_amd(
    monkeypatch: pytest.MonkeyPatch, amx, avx512, cpu_vendor, limit, fast
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(linear, "vendor", lambda: cpu_vendor)
    assert has_fast_bfloat16() == fast


def test_int8_is_refused_where_it_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    for dtype in ("int8", "int8-bfloat16", "int8-int8"):
        with pytest.raises(UsageError, match="AVX512 VNNI, .* Continue an int8 run on a CPU"):
            build_encoder(PACKAGED, dtype=dtype)
    with pytest.raises(UsageError, match="int8 needs a CPU, but the device is cuda:0"):
        refuse_integers(torch.int8, torch.device("cuda:0"))


def test_int16_is_refused_without_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX")
    with pytest.raises(UsageError, match="int16 needs AVX2, .* Continue an int16 run on a CPU"):
        build_encoder(PACKAGED, dtype="int16")
    with pytest.raises(UsageError, match="int16 needs a CPU, but the device is cuda:0"):
        refuse_integers(torch.int16, torch.device("cuda:0"))


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="not a Linux")
def test_the_cpu_vendor_matches_linux() -> None:
    assert vendor() in Path("/proc/cpuinfo").read_text() and "\n" not in vendor()


@pytest.mark.parametrize(
    ("limit", "allowed"),
    [("AVX2", False), ("AVX512_CORE", False), ("avx512_core_vnni", True), ("AVX512_CORE_BF16", True), (None, True)],
)
def test_vnni_can_be_forbidden_by_the_environment(monkeypatch: pytest.MonkeyPatch, limit, allowed: bool) -> None:
    if limit is None:
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    else:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert has_vnni() == allowed
