"""The Triton kernel compiled for other GPUs: it fits their shared memory, spills nothing, uses tensor cores."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from sparse_ingest.models.heads import triton_max  # noqa: E402
from sparse_ingest.models.heads.triton_max import WARPS, cheapest_row_tile, row_tiles, shape_of  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Compute capability -> maximum shared memory of a block (CUDA programming guide), and its matrix instruction in PTX.
GPUS = {
    80: (163 << 10, "mma.sync"),
    86: (99 << 10, "mma.sync"),
    89: (99 << 10, "mma.sync"),
    90: (227 << 10, "wgmma.mma_async"),
    100: (227 << 10, "tcgen05.mma"),
    120: (99 << 10, "mma.sync"),
}
WIDTHS = (128, 192, 256, 312, 384, 768, 1024)
# An H200 with the width of tiny, an A100 with that of mini; all combinations take a minute.
USUAL = [(90, 128), (80, 256)]
OTHERS = [(gpu, width) for gpu in GPUS for width in WIDTHS if (gpu, width) not in USUAL]
POINTERS = {"bias": "*fp32", "tiles": "*i32", "parts": "*i32", "found": "*fp32"}


def compiled(gpu: int, width: int, row_tile: int, dtype: str):
    """Compile the kernel for that GPU as a launch would."""
    shape = shape_of(width, GPUS[gpu][0])
    constants = {"WIDTH": width, "ROWS": row_tile, "COLUMNS": shape.columns, "DEPTH": shape.depth,
                 "STAGES": shape.stages, "RESIDENT": shape.resident}  # fmt: skip
    given = {"rows": f"*{dtype}", "weight": f"*{dtype}", **POINTERS, "vocabulary": "i32"}
    signature = {**given, **dict.fromkeys(constants, "constexpr")}
    aligned = {(place,): [["tt.divisibility", 16]] for place, name in enumerate(given) if given[name] != "i32"}
    source = ASTSource(triton_max._maxima, signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": WARPS, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)


@pytest.mark.parametrize(
    ("gpu", "width"), [*USUAL, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_the_kernel_fits_each_gpu_and_multiplies_on_its_tensor_cores(
    gpu: int, width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))
    shared_bytes, instruction = GPUS[gpu]
    for place, row_tile in enumerate(shape_of(width, shared_bytes).row_tiles):
        kernel = compiled(gpu, width, row_tile, ("fp16", "bf16")[place % 2])
        assert kernel.metadata.shared <= shared_bytes
        assert instruction in kernel.asm["ptx"]
        # Asynchronous copies in flight while a tile is multiplied.
        assert max(map(int, re.findall(r"cp\.async\.wait_group\s+(\d+)", kernel.asm["ptx"]))) > 0
        registers, stack, local = resources(kernel.asm["cubin"], tmp_path / "kernel.cubin")
        assert registers <= 65536 // (32 * WARPS) and not stack and not local


def resources(cubin: bytes, file: Path) -> tuple[int, int, int]:
    """Return the registers per thread, and the bytes spilled to stack and local memory."""
    file.write_bytes(cubin)
    output = subprocess.run(
        [CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", output)
    assert found, output
    return int(found[1]), int(found[2]), int(found[3])


def test_two_programs_of_a_small_model_share_a_multiprocessor(tmp_path: Path) -> None:
    """One multiplies while the other computes maxima."""
    kernel = compiled(90, 128, 64, "bf16")
    registers, _, _ = resources(kernel.asm["cubin"], tmp_path / "kernel.cubin")
    # Each block uses 1 KB more than it requests.
    assert 2 * (kernel.metadata.shared + 1024) <= 228 << 10 and 2 * registers * 32 * WARPS <= 65536


def test_weights_stay_in_shared_memory_if_they_fit() -> None:
    resident = {(width, gpu): shape_of(width, GPUS[gpu][0]).resident for width in (128, 256, 768) for gpu in (80, 89)}
    assert resident == {
        (128, 80): True, (128, 89): True, (256, 80): True, (256, 89): False, (768, 80): False, (768, 89): False
    }  # fmt: skip


@pytest.mark.parametrize("shared_bytes", [99 << 10, 227 << 10])
@pytest.mark.parametrize("width", [128, 768])
def test_the_row_tile_follows_the_lengths(width: int, shared_bytes: int) -> None:
    costs = shape_of(width, shared_bytes).row_tiles
    assert cheapest_row_tile((128,) * 9, costs) == cheapest_row_tile((1000, 900), costs) == max(costs)
    assert cheapest_row_tile((20,) * 9, costs) == 32


def test_row_tiles_cover_each_row_of_each_document() -> None:
    work, count = row_tiles((1, 64, 65, 130), 64)
    assert count == 7 and work[: 4 * count].reshape(-1, 4).tolist() == [
        [0, 0, 0, 1], [1, 64, 1, 1], [65, 129, 2, 1], [129, 129, 2, 0], [130, 259, 3, 1], [194, 259, 3, 0],
        [258, 259, 3, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("lengths", [(1,), (60,) * 16, (60,) * 17, (70,) * 40, (2000, 3, 3), (3, 2000, 3), (900,) * 5])
def test_a_program_gets_complete_documents(lengths: tuple[int, ...]) -> None:
    work, count = row_tiles(lengths, 64)
    tiles, parts = work[: 4 * count].reshape(-1, 4), work[4 * count :]
    assert parts[0] == 0 and parts[-1] == count and (np.diff(parts) > 0).all()
    assert tiles[parts[:-1], 3].all()
    longest = -(-max(lengths) // 64)
    assert (np.diff(parts) < triton_max.TOGETHER + longest).all()
