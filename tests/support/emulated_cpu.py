"""Emulated instructions of the CPU kernel, so that every CPU can run a kernel written for another.

The kernel is unchanged: names of instructions are replaced by functions in plain LLVM IR that follow Intel's manual.
Tiles are kept in memory.
"""

import re
from collections.abc import Callable

from sparse_ingest.models.compiled import Compiled
from sparse_ingest.models.heads.cpu_kernel import compile_kernel

LANES = range(16)


def compile_emulated(text: str, _: str = "") -> Compiled:
    """Compile like `compile_kernel`, for a CPU without the instructions."""
    return compile_kernel(with_emulated_instructions(text))


def with_emulated_instructions(text: str) -> str:
    """Replace all instructions of a module that LLVM has no words of its own for."""
    calls = re.sub(r"^ *declare [^\n]*@llvm\.x86[^\n]*$", "", text, flags=re.MULTILINE)
    return calls.replace("@llvm.x86.", "@emulated.") + INSTRUCTIONS


def with_emulated_bfloat16(text: str) -> str:
    """Replace the instructions and the rounding to bfloat16, for which LLVM would call a function that is not here."""
    text = re.sub(r"fptrunc (<16 x float> %[^ ]+) to <16 x bfloat>", r"call <16 x bfloat> @emulated.round(\1)", text)
    return with_emulated_instructions(text)


def failing_compiler(failure: str) -> Callable[..., Compiled]:
    """Return a `compile_function` that fails as named, or whose functions compute nothing."""

    def compile_function(*_: object, **__: object) -> Compiled:
        if failure == "no llvmlite":
            raise ImportError("No module named 'llvmlite'")
        if failure == "broken llvmlite":
            raise OSError("Could not find/load shared object file")
        return lambda *_: None

    return compile_function


def _every(count: int, start: int, step: int) -> str:
    return ", ".join(f"i32 {start + step * lane}" for lane in range(count))


def _sums_of_four() -> str:
    """Add four products of 8-bit integers, unsigned times signed, to each 32-bit sum (VPDPBUSD)."""
    lines = ["%a = zext <64 x i8> %left to <64 x i32>", "%b = sext <64 x i8> %right to <64 x i32>",
             "%p = mul <64 x i32> %a, %b"]  # fmt: skip
    for part in range(4):
        places = _every(16, part, 4)
        lines.append(f"%p{part} = shufflevector <64 x i32> %p, <64 x i32> poison, <16 x i32> <{places}>")
        before = f"%s{part - 1}" if part else "%sums"
        lines.append(f"%s{part} = add <16 x i32> {before}, %p{part}")
    return "\n".join([*lines, "ret <16 x i32> %s3"])


def _sums_of_two() -> str:
    """Add two products of bfloat16 to each float32 sum (VDPBF16PS: odd ones first)."""
    lines = ["%a = fpext <32 x bfloat> %left to <32 x float>", "%b = fpext <32 x bfloat> %right to <32 x float>",
             "%p = fmul <32 x float> %a, %b"]  # fmt: skip
    for part, before in ((1, "%sums"), (0, "%s1")):
        places = _every(16, part, 2)
        lines.append(f"%p{part} = shufflevector <32 x float> %p, <32 x float> poison, <16 x i32> <{places}>")
        lines.append(f"%s{part} = fadd <16 x float> {before}, %p{part}")
    return "\n".join([*lines, "ret <16 x float> %s0"])


def _sums_of_pairs() -> str:
    """Multiply 16-bit integers, and add adjacent products to 32-bit sums (VPMADDWD)."""
    lines = ["%a = sext <16 x i16> %left to <16 x i32>", "%b = sext <16 x i16> %right to <16 x i32>",
             "%p = mul <16 x i32> %a, %b"]  # fmt: skip
    for part in range(2):
        places = _every(8, part, 2)
        lines.append(f"%p{part} = shufflevector <16 x i32> %p, <16 x i32> poison, <8 x i32> <{places}>")
    return "\n".join([*lines, "%s = add <8 x i32> %p0, %p1", "ret <8 x i32> %s"])


def _copy_tile(name: str, *, load: bool) -> str:
    """Copy 16 rows of 64 bytes between a tile and strided memory (TILELOADD, TILESTORED)."""
    lines = [f"define internal void @emulated.{name}(i8 %tile, ptr %memory, i64 %stride) {{",
             "%t = zext i8 %tile to i64", "%o = mul i64 %t, 1024",
             "%at = getelementptr i8, ptr @state, i64 %o"]  # fmt: skip
    for row in LANES:
        lines += [
            f"%i{row} = getelementptr i8, ptr %at, i64 {64 * row}",
            f"%j{row} = mul i64 %stride, {row}",
            f"%m{row} = getelementptr i8, ptr %memory, i64 %j{row}",
        ]
        source, target = (f"%m{row}", f"%i{row}") if load else (f"%i{row}", f"%m{row}")
        lines += [f"%v{row} = load <64 x i8>, ptr {source}, align 1", f"store <64 x i8> %v{row}, ptr {target}, align 1"]
    return "\n".join([*lines, "ret void", "}"])


def _multiply_tiles(name: str, of_vectors: str, sums: str, factors: str) -> str:
    """Add to each row of sums its row of the left tile times all rows of the right one (TDPBUSD, TDPBF16PS)."""
    lines = [f"define internal void @emulated.{name}(i8 %sums, i8 %left, i8 %right) {{"]
    for tile in ("sums", "left", "right"):
        lines += [f"%{tile}.n = zext i8 %{tile} to i64", f"%{tile}.o = mul i64 %{tile}.n, 1024",
                  f"%{tile}.at = getelementptr i8, ptr @state, i64 %{tile}.o"]  # fmt: skip
    lines += ["br label %row", "row:", "%r = phi i64 [ 0, %0 ], [ %r.next, %row.end ]", "%r.o = mul i64 %r, 64",
              "%sum.at = getelementptr i8, ptr %sums.at, i64 %r.o", f"%before = load {sums}, ptr %sum.at",
              "%a.at = getelementptr i8, ptr %left.at, i64 %r.o", "br label %group",
              "group:", "%g = phi i64 [ 0, %row ], [ %g.next, %group ]",
              f"%sum = phi {sums} [ %before, %row ], [ %added, %group ]",
              "%a.g = getelementptr i32, ptr %a.at, i64 %g", "%a = load i32, ptr %a.g",
              "%a.lane = insertelement <16 x i32> poison, i32 %a, i32 0",
              "%a.spread = shufflevector <16 x i32> %a.lane, <16 x i32> poison, <16 x i32> zeroinitializer",
              f"%a.vector = bitcast <16 x i32> %a.spread to {factors}", "%g.o = mul i64 %g, 64",
              "%b.at = getelementptr i8, ptr %right.at, i64 %g.o", f"%b = load {factors}, ptr %b.at",
              f"%added = call {sums} @emulated.{of_vectors}({sums} %sum, {factors} %a.vector, {factors} %b)",
              "%g.next = add i64 %g, 1", "%g.more = icmp ult i64 %g.next, 16",
              "br i1 %g.more, label %group, label %row.end", "row.end:", f"store {sums} %added, ptr %sum.at",
              "%r.next = add i64 %r, 1", "%r.more = icmp ult i64 %r.next, 16",
              "br i1 %r.more, label %row, label %done", "done:", "ret void", "}"]  # fmt: skip
    return "\n".join(lines)


INSTRUCTIONS = f"""
@state = internal global [8192 x i8] zeroinitializer, align 64
define internal <16 x i32> @emulated.avx512.vpdpbusd.512(<16 x i32> %sums, <64 x i8> %left, <64 x i8> %right) {{
{_sums_of_four()}
}}
define internal <16 x float> @emulated.avx512bf16.dpbf16ps.512(
  <16 x float> %sums, <32 x bfloat> %left, <32 x bfloat> %right) {{
{_sums_of_two()}
}}
; to the nearest, to even ones between two: VCVTNEPS2BF16
define internal <16 x bfloat> @emulated.round(<16 x float> %x) {{
  %bits = bitcast <16 x float> %x to <16 x i32>
  %high = lshr <16 x i32> %bits, splat (i32 16)
  %odd = and <16 x i32> %high, splat (i32 1)
  %half = add <16 x i32> %odd, splat (i32 32767)
  %rounded = add <16 x i32> %bits, %half
  %kept = lshr <16 x i32> %rounded, splat (i32 16)
  %short = trunc <16 x i32> %kept to <16 x i16>
  %found = bitcast <16 x i16> %short to <16 x bfloat>
  ret <16 x bfloat> %found
}}
define internal <8 x i32> @emulated.avx2.pmadd.wd(<16 x i16> %left, <16 x i16> %right) {{
{_sums_of_pairs()}
}}
define internal void @emulated.ldtilecfg(ptr %tiles) {{
  ret void
}}
define internal void @emulated.tilerelease() {{
  ret void
}}
define internal void @emulated.tilezero(i8 %tile) {{
  %t = zext i8 %tile to i64
  %o = mul i64 %t, 1024
  %at = getelementptr i8, ptr @state, i64 %o
  store [1024 x i8] zeroinitializer, ptr %at
  ret void
}}
{_copy_tile("tileloadd64", load=True)}
{_copy_tile("tilestored64", load=False)}
{_multiply_tiles("tdpbusd", "avx512.vpdpbusd.512", "<16 x i32>", "<64 x i8>")}
{_multiply_tiles("tdpbf16ps", "avx512bf16.dpbf16ps.512", "<16 x float>", "<32 x bfloat>")}
"""
