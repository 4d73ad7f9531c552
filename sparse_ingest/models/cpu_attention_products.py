"""The products of the compiled attention as LLVM IR: queries with keys, and weights with values, on tiles of AMX.

cpu_attention_text.py puts them together. In a tile, columns are queries, and rows are keys or dimensions of values.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from sparse_ingest.models.heads.cpu_kernel_text import LANES, TILE_BYTES

BLOCK = LANES  # queries per block
KEYS = 2 * LANES  # per step: a row of a tile has 32 values of bfloat16
FLOATS, SHORTS = f"<{LANES} x float>", f"<{LANES} x bfloat>"
# Interleaves the lanes of two vectors.
BOTH = [lane for pair in zip(range(LANES), range(LANES, 2 * LANES), strict=True) for lane in pair]


def transpose_values(width: int) -> Iterator[str]:
    """Yield the function that transposes the values of a document to `[width, keys]`.

    Keys behind the document repeat its last value; their weights are zero.
    """
    yield """
    define internal void @transpose_values(ptr %value, i64 %row_bytes, i64 %length, i64 %keys, ptr %transposed) #0 {
    entry:
      %last = sub i64 %length, 1
      %transposed_bytes = mul i64 %keys, 2
      br label %next
    next:
      %at = phi i64 [ 0, %entry ], [ %behind, %next ]
      %transposed_skip = mul i64 %at, 2
      %transposed0 = getelementptr i8, ptr %transposed, i64 %transposed_skip
    """
    for row in range(KEYS):
        yield f"""
      %wanted{row} = add i64 %at, {row}
      %row{row} = call i64 @llvm.smin.i64(i64 %wanted{row}, i64 %last)
      %skip{row} = mul i64 %row{row}, %row_bytes
      %value{row} = getelementptr i8, ptr %value, i64 %skip{row}
        """
    for part in range(width // LANES):
        for row in range(KEYS):
            yield f"  %place{part}.{row} = getelementptr i8, ptr %value{row}, i64 {part * LANES * 2}"
            yield f"  %own{part}.{row} = load {SHORTS}, ptr %place{part}.{row}, align 2"
        pairs = []
        for row in range(0, KEYS, 2):
            yield shuffle(f"%both{part}.{row}", "bfloat", f"%own{part}.{row}", f"%own{part}.{row + 1}", BOTH)
            pairs.append(f"%pair{part}.{row}")
            yield f"  {pairs[-1]} = bitcast <{KEYS} x bfloat> %both{part}.{row} to <{LANES} x i32>"
        for row, name in enumerate((yield from transposed(f"t{part}", "i32", pairs)), part * LANES):
            yield f"  store <{LANES} x i32> {name}, ptr %transposed{row}, align 64"
            yield f"  %transposed{row + 1} = getelementptr i8, ptr %transposed{row}, i64 %transposed_bytes"
    yield repeat("keys", KEYS)


def scores(width: int) -> Iterator[str]:
    """Yield the function that writes the products of a document's keys and a block of queries, `[keys, queries]`."""
    yield """
    define internal void @scores(ptr %query0, i64 %row_bytes, ptr %key, i64 %last, ptr %scores, ptr %queries) #0 {
    entry:
    """
    steps = range(width // KEYS)
    for row in range(BLOCK):
        for step in steps:
            yield f"  %part{step}.{row} = getelementptr i8, ptr %query{row}, i64 {step * TILE_BYTES}"
            yield f"  %own{step}.{row} = load <{LANES} x i32>, ptr %part{step}.{row}, align 2"
        yield f"  %query{row + 1} = getelementptr i8, ptr %query{row}, i64 %row_bytes"
    for step in steps:
        names = yield from transposed(f"t{step}", "i32", [f"%own{step}.{row}" for row in range(BLOCK)])
        yield f"  %queries{step} = getelementptr i8, ptr %queries, i64 {step * LANES * TILE_BYTES}"
        for row, name in enumerate(names):
            yield f"  %transposed{step}.{row} = getelementptr i8, ptr %queries{step}, i64 {row * TILE_BYTES}"
            yield f"  store <{LANES} x i32> {name}, ptr %transposed{step}.{row}, align 64"
        yield f"  call void @llvm.x86.tileloadd64(i8 {4 + step}, ptr %queries{step}, i64 {TILE_BYTES})"
    yield f"""
      %length = add i64 %last, {LANES}
      br label %next
    next:
      %at = phi i64 [ 0, %entry ], [ %behind, %next ]
      %row = call i64 @llvm.smin.i64(i64 %at, i64 %last)
      %skip = mul i64 %row, %row_bytes
      %key0 = getelementptr i8, ptr %key, i64 %skip
      %score_skip = mul i64 %row, {TILE_BYTES}
      %score = getelementptr i8, ptr %scores, i64 %score_skip
      call void @llvm.x86.tilezero(i8 0)
    """
    for step in steps:
        yield f"""
      call void @llvm.x86.tileloadd64(i8 {6 + step}, ptr %key{step}, i64 %row_bytes)
      call void @llvm.x86.tdpbf16ps(i8 0, i8 {6 + step}, i8 {4 + step})
      %key{step + 1} = getelementptr i8, ptr %key{step}, i64 {TILE_BYTES}
        """
    yield f"  call void @llvm.x86.tilestored64(i8 0, ptr %score, i64 {TILE_BYTES})"
    yield repeat("length", LANES)


def sums(width: int) -> Iterator[str]:
    """Yield the function that writes the products of the values of a document and a block of weights."""
    parts = range(width // LANES)
    yield """
    define internal void @sums(ptr %values, ptr %weights, i64 %keys, ptr %sums) #0 {
    entry:
      %value_bytes = mul i64 %keys, 2
      %part_bytes = mul i64 %keys, 32
    """
    for part in parts:
        yield f"  call void @llvm.x86.tilezero(i8 {part})"
    yield f"""
      br label %next
    next:
      %at = phi i64 [ 0, %entry ], [ %behind, %next ]
      %weight_skip = mul i64 %at, {BLOCK * 2}
      %weight = getelementptr i8, ptr %weights, i64 %weight_skip
      call void @llvm.x86.tileloadd64(i8 4, ptr %weight, i64 {TILE_BYTES})
      %value_skip = mul i64 %at, 2
      %value0 = getelementptr i8, ptr %values, i64 %value_skip
    """
    for part in parts:
        yield f"""
      call void @llvm.x86.tileloadd64(i8 {5 + part % 3}, ptr %value{part}, i64 %value_bytes)
      call void @llvm.x86.tdpbf16ps(i8 {part}, i8 {5 + part % 3}, i8 4)
      %value{part + 1} = getelementptr i8, ptr %value{part}, i64 %part_bytes
        """
    stores = (
        f"%sum{part} = getelementptr i8, ptr %sums, i64 {part * LANES * TILE_BYTES}\n"
        f"call void @llvm.x86.tilestored64(i8 {part}, ptr %sum{part}, i64 {TILE_BYTES})\n"
        for part in parts
    )
    yield repeat("keys", KEYS, *stores)


def transposed(prefix: str, kind: str, rows: list[str]) -> Generator[str, None, list[str]]:
    """Yield the code that transposes 16 vectors of 16 lanes, and return their names: row r, lane l to row l, lane r.

    Each round moves the top bit of the row's index below the lowest bit of the lane's; four rounds swap the indices.
    """
    for turn in range(4):
        names = []
        for row in range(LANES // 2):
            for half, lanes in enumerate((BOTH[:LANES], BOTH[LANES:])):
                names.append(f"%{prefix}.{turn}.{2 * row + half}")
                yield shuffle(names[-1], kind, rows[row], rows[row + LANES // 2], lanes)
        rows = names
    return rows


def shuffle(name: str, kind: str, first: str, second: str, lanes: Sequence[int]) -> str:
    """Return the code of a vector with these lanes of two concatenated vectors."""
    vector, chosen = f"<{LANES} x {kind}>", ", ".join(f"i32 {lane}" for lane in lanes)
    return f"  {name} = shufflevector {vector} {first}, {vector} {second}, <{len(lanes)} x i32> <{chosen}>"


def repeat(limit: str, step: int, *then: str) -> str:
    """Return the end of a function: repeat `next` while `at` is below a limit, then return."""
    return f"""
      %behind = add i64 %at, {step}
      %more = icmp slt i64 %behind, %{limit}
      br i1 %more, label %next, label %end
    end:
    {"".join(then)}
      ret void
    }}
    """
