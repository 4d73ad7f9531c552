"""The compiled CPU kernel: real instructions where the CPU has them, emulated ones everywhere."""

from __future__ import annotations

import logging
import platform
import struct
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from support.emulated_cpu import compile_emulated

from sparse_ingest.models import linear
from sparse_ingest.models.heads import cpu_kernel, cpu_kernel_text, selection
from sparse_ingest.models.heads.cpu_kernel import Kernel, instructions_for
from sparse_ingest.models.heads.selection import build_head
from sparse_ingest.models.heads.tiles import IntegerHead, TiledHead
from sparse_ingest.models.integers import STEPS
from sparse_ingest.models.linear import has_avx2, has_vnni
from sparse_ingest.models.packing import Packing

llvm = pytest.importorskip("llvmlite.binding")
CPU = torch.device("cpu")
needs_vnni = pytest.mark.skipif(not has_vnni(), reason="this CPU has no VNNI, or ONEDNN_MAX_CPU_ISA forbids it")
needs_avx2 = pytest.mark.skipif(not has_avx2(), reason="this CPU has no AVX2, or ONEDNN_MAX_CPU_ISA forbids it")
# Every split of a document into blocks of 12, 8 and 4 rows, of 32 and 16, or of 6 and 4, and fewer rows than those.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 11, 12, 13, 15, 16, 17, 20, 23, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100)


def random_inputs(dtype: torch.dtype, width: int, vocabulary: int, lengths: tuple[int, ...]):
    """Return rows, weight, bias, scales of columns and scales of documents."""
    generator = torch.Generator().manual_seed(vocabulary)

    def factors(count: int) -> torch.Tensor:
        if dtype in STEPS:
            most = STEPS[dtype]
            return torch.randint(-most, most + 1, (count, width), generator=generator).to(dtype)
        return torch.randn(count, width, generator=generator).to(dtype)

    rows, weight = factors(sum(lengths)), factors(vocabulary)
    scale = STEPS[dtype] ** -2 if dtype in STEPS else 1.0
    scales = [torch.rand(count, generator=generator) * scale for count in (vocabulary, len(lengths))]
    return rows, weight, torch.randn(vocabulary, generator=generator), *scales


def expected_of(rows, weight, bias, of_columns, of_documents, lengths) -> torch.Tensor:
    """Compute the formula step by step. Sums are float64, which is exact for integers."""
    products = (rows.double() @ weight.double().T).split(lengths)
    largest = torch.stack([part.amax(0) for part in products]).float()
    return ((largest * of_documents.unsqueeze(1)) * of_columns + bias).relu()


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Emulate the instructions on one thread: all threads share the emulated tiles."""
    monkeypatch.setattr(cpu_kernel, "compile_kernel", compile_emulated)
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(usual)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("dtype", "instructions"), [(getattr(torch, dtype), instructions) for dtype, instructions in cpu_kernel_text.FORMS]
)
@pytest.mark.parametrize(
    ("width", "vocabulary"),
    [(100, 33), (8, 1), *(pytest.param(*one, marks=pytest.mark.slow) for one in ((64, 32), (768, 50)))],
)
def test_emulated_instructions_match_the_formula(instructions, dtype, width, vocabulary) -> None:
    rows, weight, bias, of_columns, of_documents = random_inputs(dtype, width, vocabulary, LENGTHS)
    head = Kernel(weight, bias, of_columns, instructions=instructions)
    found = head(rows, Packing(LENGTHS, CPU), of_documents)
    expected = expected_of(rows, weight, bias, of_columns, of_documents, LENGTHS)
    assert found.shape == expected.shape and found.dtype == torch.float32
    if dtype in STEPS:
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("rows_at_once", [1, 33, 200, sum(LENGTHS)])
def test_groups_of_documents_have_the_bits_of_all_together(rows_at_once: int) -> None:
    rows, weight, bias, of_columns, of_documents = random_inputs(torch.float32, 100, 33, LENGTHS)
    head = Kernel(weight, bias, of_columns, instructions="avx512")
    head._rows_at_once = None
    together = head(rows, Packing(LENGTHS, CPU), of_documents)
    head._rows_at_once = rows_at_once
    assert torch.equal(head(rows, Packing(LENGTHS, CPU), of_documents), together)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("threads", "vocabulary"), [(2, 33), (3, 500), (16, 500)])
def test_threads_divide_the_columns_with_the_bits_of_one(threads: int, vocabulary: int) -> None:
    rows, weight, bias, of_columns, of_documents = random_inputs(torch.float32, 100, vocabulary, LENGTHS)
    head = Kernel(weight, bias, of_columns, instructions="avx512")
    expected = head(rows, Packing(LENGTHS, CPU), of_documents)
    torch.set_num_threads(threads)
    assert torch.equal(head(rows, Packing(LENGTHS, CPU), of_documents), expected)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.bfloat16, torch.float32])
def test_the_instructions_of_this_cpu_match_the_formula(dtype) -> None:
    if (instructions := instructions_for(dtype, 128)) is None:
        pytest.skip("this CPU lacks the instructions, or ONEDNN_MAX_CPU_ISA forbids them")
    rows, weight, bias, of_columns, of_documents = random_inputs(dtype, 128, 1000, LENGTHS)
    found = Kernel(weight, bias, of_columns, instructions=instructions)(rows, Packing(LENGTHS, CPU), of_documents)
    expected = expected_of(rows, weight, bias, of_columns, of_documents, LENGTHS)
    torch.testing.assert_close(found, expected, rtol=0, atol=0 if dtype in STEPS else 1e-4)


@pytest.mark.parametrize(
    ("dtype", "instructions", "words"),
    [
        ("int8", "amx", ("ldtilecfg", "tileloadd", "tdpbusd", "tilestored", "tilerelease")),
        ("bfloat16", "amx", ("ldtilecfg", "tileloadd", "tdpbf16ps", "tilestored", "tilerelease")),
        ("int8", "avx512", ("vpdpbusd", "vpmaxsd")),
        ("bfloat16", "avx512", ("vdpbf16ps", "vmaxps")),
        ("float32", "avx512", ("vfmadd", "vmaxps", "%zmm")),
        ("float32", "avx2", ("vfmadd", "vmaxps")),
        ("int16", "avx2", ("vpmaddwd", "vpmaxsd", "vpaddd")),
    ],
)
def test_the_kernel_is_compiled_to_the_expected_instructions(dtype, instructions, words) -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    form = cpu_kernel_text.FORMS[dtype, instructions]
    module = llvm.parse_assembly(cpu_kernel_text.kernel_text(form, 256))
    module.verify()
    target = llvm.Target.from_triple("x86_64-unknown-linux-gnu")
    cpu = "haswell" if instructions == "avx2" else "sapphirerapids"
    assembly = target.create_target_machine(cpu=cpu, opt=3).emit_assembly(module)
    assert [word for word in words if word not in assembly] == []
    if instructions != "amx":
        # Each step multiplies the rows of a block by two vectors of columns, without spilling registers.
        step = max(assembly.split(".LBB"), key=lambda part: part.count(words[0]))
        assert step.count(words[0]) == 2 * form.blocks[0]
        assert "(%rsp)" not in step


def test_tiles_are_16_rows_of_64_bytes() -> None:
    """LDTILECFG layout in Intel's manual: palette, first row, 14 reserved bytes, bytes per row, rows."""
    palette, first, *of_rows = struct.unpack("<BB14x16H16B", cpu_kernel_text.TILES)
    assert (palette, first) == (1, 0)
    assert of_rows[:16] == [64] * 8 + [0] * 8
    assert of_rows[16:] == [16] * 8 + [0] * 8


@pytest.mark.parametrize(
    ("integers", "rows_in"),
    [
        pytest.param(torch.int8, torch.float32, marks=needs_vnni),
        pytest.param(torch.int8, torch.bfloat16, marks=needs_vnni),
        pytest.param(torch.int16, torch.float32, marks=needs_avx2),
    ],
)
def test_weights_of_integers_are_bit_identical_with_and_without_the_kernel(integers, rows_in) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(sum(LENGTHS), 96, generator=generator).to(rows_in)
    weight, bias = torch.randn(700, 96, generator=generator), torch.randn(700, generator=generator)
    packing = Packing(LENGTHS, CPU)
    instructions = instructions_for(integers, 96)
    assert instructions
    compiled = IntegerHead(weight, bias, integers, instructions=instructions)
    assert torch.equal(compiled(rows, packing), IntegerHead(weight, bias, integers)(rows, packing))


@needs_vnni
def test_the_kernel_runs_on_several_threads() -> None:
    rows, weight, bias, of_columns, of_documents = random_inputs(torch.int8, 128, 3000, LENGTHS)
    head = Kernel(weight, bias, of_columns, instructions=instructions_for(torch.int8, 128) or "avx512")
    expected = head(rows, Packing(LENGTHS, CPU), of_documents)
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: head(rows, Packing(LENGTHS, CPU), of_documents), range(40))
        assert all(torch.equal(one, expected) for one in found)


@pytest.mark.usefixtures("emulated")
def test_a_document_in_a_batch_gets_the_same_bits_as_alone() -> None:
    rows, weight, bias, *_ = random_inputs(torch.bfloat16, 64, 100, LENGTHS)
    head = Kernel(weight, bias, instructions="avx512")
    together = head(rows, Packing(LENGTHS, CPU))
    starts = np.cumsum((0, *LENGTHS))
    for place in (0, 5, len(LENGTHS) - 1):
        alone = head(rows[starts[place] : starts[place + 1]], Packing(LENGTHS[place : place + 1], CPU))
        assert torch.equal(alone[0], together[place])


@pytest.mark.usefixtures("emulated")
def test_weights_and_rows_may_be_column_major() -> None:
    rows, weight, bias, *_ = random_inputs(torch.bfloat16, 64, 64, LENGTHS)
    packing, heads = Packing(LENGTHS, CPU), []
    for one in (weight, weight.T.contiguous().T):
        heads.append(Kernel(one, bias, instructions="avx512"))
    assert torch.equal(heads[0](rows, packing), heads[1](rows.T.contiguous().T, packing))


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("rows", [torch.ones(5, 8), torch.ones(5, 9).bfloat16(), torch.ones(4, 8).bfloat16()])
def test_rows_of_unsupported_layout_are_refused(rows: torch.Tensor) -> None:
    head = Kernel(torch.ones(3, 8).bfloat16(), torch.zeros(3), instructions="avx512")
    with pytest.raises(TypeError, match=r"expected torch.bfloat16 of \(5, 8\)"):
        head(rows, Packing((2, 3), CPU))


@pytest.fixture
def parts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(100, 32, generator=generator), torch.randn(100, generator=generator)


@pytest.mark.parametrize(("dtype", "instructions"), [(torch.bfloat16, "avx512"), (torch.float32, "avx2")])
def test_floating_point_uses_the_kernel(dtype, instructions, parts, monkeypatch) -> None:
    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: instructions)
    monkeypatch.setattr(cpu_kernel, "compile_kernel", compile_emulated)
    assert isinstance(build_head(*parts, device=CPU, dtype=dtype), Kernel)


def test_a_large_vocabulary_is_complete_although_the_trial_has_a_part_of_it(monkeypatch) -> None:
    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: "avx2")
    monkeypatch.setattr(cpu_kernel, "compile_kernel", compile_emulated)
    rows, weight, bias, *_ = random_inputs(torch.float32, 64, 2 * selection.TRIED + 9, LENGTHS)
    found = build_head(weight, bias, device=CPU, dtype=torch.float32)
    expected = TiledHead(weight, bias, device=CPU, dtype=torch.float32)
    packing = Packing(LENGTHS, CPU)
    assert isinstance(found, Kernel)
    torch.testing.assert_close(found(rows, packing), expected(rows, packing), rtol=1e-5, atol=1e-4)


def test_without_llvm_the_plain_head_is_used(parts, monkeypatch) -> None:
    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: "avx512")
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert isinstance(build_head(*parts, device=CPU, dtype=torch.bfloat16), TiledHead)


@pytest.mark.parametrize("mistake", ["a sum is larger", "LLVM does not know it"])
def test_a_kernel_with_wrong_results_is_not_used_and_noted(parts, monkeypatch, caplog, mistake) -> None:
    def compiled(text: str, _: str):
        wrong = text.replace("fadd", "fsub") if mistake == "a sum is larger" else text.replace("fadd", "fplus")
        return compile_emulated(wrong)

    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: "amx")
    monkeypatch.setattr(cpu_kernel, "compile_kernel", compiled)
    with caplog.at_level(logging.WARNING):
        assert isinstance(build_head(*parts, device=CPU, dtype=torch.bfloat16), TiledHead)
    assert "The compiled head on cpu is not used, so encoding is slower" in caplog.text


def test_running_out_of_memory_does_not_switch_the_head(parts, monkeypatch) -> None:
    """The plain head gives other last bits, and another process of the run may have had enough memory."""

    def compiled(text: str, _: str):
        raise MemoryError

    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: "avx512")
    monkeypatch.setattr(cpu_kernel, "compile_kernel", compiled)
    with pytest.raises(MemoryError):
        build_head(*parts, device=CPU, dtype=torch.bfloat16)


def test_instructions_unknown_to_llvm_are_not_used_and_noted(parts, monkeypatch, caplog) -> None:
    """Compiling them anyway would crash the process instead of raising."""
    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: "amx")
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: {"avx512bf16": True, "amx-bf16": False})
    with caplog.at_level(logging.WARNING):
        assert isinstance(build_head(*parts, device=CPU, dtype=torch.bfloat16), TiledHead)
    assert "slower: LLVM sees no amx-bf16 in this CPU." in caplog.text


def test_an_llvm_that_is_too_old_is_not_used_and_noted(parts, monkeypatch, caplog) -> None:
    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: "avx512")
    monkeypatch.setattr(llvm, "llvm_version_info", (20, 1, 8))
    with caplog.at_level(logging.WARNING):
        assert isinstance(build_head(*parts, device=CPU, dtype=torch.bfloat16), TiledHead)
    assert "LLVM 20.1.8, but 22 is needed (llvmlite 0.50 or newer)." in caplog.text


@pytest.mark.parametrize(
    ("amx", "tiles", "dtype", "width", "expected"),
    [
        (True, True, torch.int8, 1024, "amx"),
        (True, True, torch.bfloat16, 512, "amx"),
        (True, True, torch.bfloat16, 768, None),
        (True, True, torch.float32, 384, "avx512"),
        (True, True, torch.float32, 512, None),
        (True, True, torch.int16, 1024, "avx2"),
        (True, False, torch.int8, 1024, "avx512"),
        (True, False, torch.bfloat16, 768, "avx512"),
        (False, True, torch.int8, 1024, "avx512"),
        (False, True, torch.bfloat16, 768, "avx512"),
        (False, True, torch.float16, 128, None),
    ],
)
def test_the_best_instructions_for_a_dtype_are_chosen(monkeypatch, amx, tiles, dtype, width, expected) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(linear, "has_amx", lambda: amx)
    monkeypatch.setattr(linear, "may_use_tiles", lambda: tiles)
    for name in ("has_vnni", "has_avx2", "has_avx512", "has_avx512_bfloat16"):
        monkeypatch.setattr(linear, name, lambda: True)
    assert instructions_for(dtype, width) == expected


def test_other_systems_and_forbidden_instructions_disable_the_kernel(monkeypatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    for limit in ("AVX2", "AVX2_VNNI"):
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        assert instructions_for(torch.int8, 128) is instructions_for(torch.bfloat16, 128) is None
        assert instructions_for(torch.int16, 128) == "avx2"
        assert (instructions_for(torch.float32, 768), instructions_for(torch.float32, 1024)) == ("avx2", None)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX")
    assert instructions_for(torch.float32, 128) is instructions_for(torch.int16, 128) is None
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert instructions_for(torch.int8, 128) is None


@pytest.mark.usefixtures("emulated")
def test_the_kernel_needs_no_compiler(tmp_path: Path, monkeypatch) -> None:
    """With nothing on PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    weight, rows = torch.ones(3, 8, dtype=torch.int8), torch.ones(5, 8, dtype=torch.int8)
    head = Kernel(weight, torch.zeros(3), instructions="avx512")
    assert head(rows, Packing((5,), CPU)).tolist() == [[8.0, 8.0, 8.0]]


def test_the_trial_has_columns_of_the_complete_vocabulary(monkeypatch) -> None:
    rows, weight, bias, *_ = random_inputs(torch.float32, 64, 2 * selection.TRIED + 9, LENGTHS)
    bias[: selection.TRIED] = -1000  # as of tokens that no text has
    monkeypatch.setattr(selection, "instructions_for", lambda dtype, width: "avx2")
    monkeypatch.setattr(cpu_kernel, "compile_kernel", lambda text, _: compile_emulated(text.replace("fadd", "fsub")))
    assert isinstance(build_head(weight, bias, device=CPU, dtype=torch.float32), TiledHead)
