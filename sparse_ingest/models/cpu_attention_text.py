"""Attention for AMX as LLVM IR; cpu_attention.py compiles it, and heads/cpu_kernel_text.py explains how to read it.

    output[query] = sum over the document's keys of weight[key] * value[key] / sum of the weights
    weight[key] = 2 ** (scale * (query . key - maximum of the document))

Each vector holds one value for each of 16 queries: a score, maximum, weight or sum. In a tile, columns are queries, and
rows are keys or dimensions of values. The last block of queries and the last tile of keys end with the document. One of
fewer than 16 tokens is read with rows of the next ones; what is written to those is overwritten by their own attention.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Generator, Iterator, Sequence

from sparse_ingest.models.heads.cpu_kernel_text import LANES, SHARED, TILE_BYTES

BLOCK = LANES  # queries per block
KEYS = 2 * LANES  # per step: a row of a tile has 32 values of bfloat16
TERMS = 6  # of the Taylor series of 2**x for |x| <= 1/2: the error is below 3e-6


def _float(number: float) -> str:
    """Return a float32 as a constant of LLVM."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return f"0x{struct.unpack('Q', struct.pack('d', rounded))[0]:016X}"


FLOATS, SHORTS = f"<{LANES} x float>", f"<{LANES} x bfloat>"
# The score of a key behind the document: its weight is zero, and its difference from the maximum is finite.
NOTHING = f"splat (float {_float(-(2.0**127))})"
# Interleaves the lanes of two vectors.
BOTH = [lane for pair in zip(range(LANES), range(LANES, 2 * LANES), strict=True) for lane in pair]


def attention_text(width: int) -> Iterator[str]:
    """Yield a module with the function `attend` for heads of `width` numbers."""
    yield f"""
    declare void @llvm.x86.tdpbf16ps(i8, i8, i8)
    declare i64 @llvm.smin.i64(i64, i64)
    declare i64 @llvm.smax.i64(i64, i64)
    declare {FLOATS} @llvm.maxnum.v16f32({FLOATS}, {FLOATS})
    declare {FLOATS} @llvm.fma.v16f32({FLOATS}, {FLOATS}, {FLOATS})
    declare {FLOATS} @llvm.roundeven.v16f32({FLOATS})
    declare {FLOATS} @llvm.x86.avx512.mask.scalef.ps.512({FLOATS}, {FLOATS}, {FLOATS}, i16, i32)
    {SHARED}
    """
    yield _attend(width)
    yield from _transpose_values(width)
    yield from _scores(width)
    yield from _weights()
    yield from _sums(width)
    yield from _write(width)


def _attend(width: int) -> str:
    """Return the loops over documents, heads and blocks of queries."""
    return f"""
    define void @attend(ptr %query, ptr %key, ptr %value, ptr %places, i64 %documents, i64 %heads, i64 %row_bytes,
                        i64 %head_bytes, float %scale, ptr %scratch, ptr %output) #0 {{
    entry:
      call void @llvm.x86.ldtilecfg(ptr @tiles)
      %output_bytes = mul i64 %heads, {width * 2}
      %queries = getelementptr i8, ptr %scratch, i64 {TILE_BYTES}
      %sums = getelementptr i8, ptr %queries, i64 {width * BLOCK * 2}
      %values = getelementptr i8, ptr %sums, i64 {width * BLOCK * 4}
      br label %document
    document:
      %at = phi i64 [ 0, %entry ], [ %next, %document_end ]
      %at_place = mul i64 %at, 16
      %start_place = getelementptr i8, ptr %places, i64 %at_place
      %end_place = getelementptr i8, ptr %start_place, i64 8
      %start = load i64, ptr %start_place
      %end = load i64, ptr %end_place
      %length = sub i64 %end, %start
      %longer = add i64 %length, {KEYS - 1}
      %keys = and i64 %longer, {-KEYS}
      %values_bytes = mul i64 %keys, {width * 2}
      %scores = getelementptr i8, ptr %values, i64 %values_bytes
      %scores_bytes = mul i64 %keys, {BLOCK * 4}
      %weights = getelementptr i8, ptr %scores, i64 %scores_bytes
      %document_skip = mul i64 %start, %row_bytes
      %output_skip = mul i64 %start, %output_bytes
      %document_output = getelementptr i8, ptr %output, i64 %output_skip
      %without_block = sub i64 %length, {BLOCK}
      %last_block = call i64 @llvm.smax.i64(i64 %without_block, i64 0)
      br label %head
    head:
      %at_head = phi i64 [ 0, %document ], [ %next_head, %head_end ]
      %head_only = mul i64 %at_head, %head_bytes
      %head_skip = add i64 %head_only, %document_skip
      %head_query = getelementptr i8, ptr %query, i64 %head_skip
      %head_key = getelementptr i8, ptr %key, i64 %head_skip
      %head_value = getelementptr i8, ptr %value, i64 %head_skip
      %head_output_skip = mul i64 %at_head, {width * 2}
      %head_output = getelementptr i8, ptr %document_output, i64 %head_output_skip
      call void @transpose_values(ptr %head_value, i64 %row_bytes, i64 %length, i64 %keys, ptr %values)
      br label %block
    block:
      %wanted = phi i64 [ 0, %head ], [ %behind, %block ]
      %row = call i64 @llvm.smin.i64(i64 %wanted, i64 %last_block)
      %row_skip = mul i64 %row, %row_bytes
      %block_query = getelementptr i8, ptr %head_query, i64 %row_skip
      call void @scores(ptr %block_query, i64 %row_bytes, ptr %head_key, i64 %last_block, ptr %scores, ptr %queries)
      call void @weights(ptr %scores, i64 %length, i64 %keys, float %scale, ptr %weights, ptr %scratch)
      call void @sums(ptr %values, ptr %weights, i64 %keys, ptr %sums)
      %block_skip = mul i64 %row, %output_bytes
      %block_output = getelementptr i8, ptr %head_output, i64 %block_skip
      call void @write(ptr %sums, ptr %scratch, ptr %block_output, i64 %output_bytes)
      %behind = add i64 %row, {BLOCK}
      %more_blocks = icmp slt i64 %behind, %length
      br i1 %more_blocks, label %block, label %head_end
    head_end:
      %next_head = add i64 %at_head, 1
      %more_heads = icmp ult i64 %next_head, %heads
      br i1 %more_heads, label %head, label %document_end
    document_end:
      %next = add i64 %at, 1
      %more = icmp ult i64 %next, %documents
      br i1 %more, label %document, label %done
    done:
      call void @llvm.x86.tilerelease()
      ret void
    }}
    """


def _transpose_values(width: int) -> Iterator[str]:
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
            yield _shuffle(f"%both{part}.{row}", "bfloat", f"%own{part}.{row}", f"%own{part}.{row + 1}", BOTH)
            pairs.append(f"%pair{part}.{row}")
            yield f"  {pairs[-1]} = bitcast <{KEYS} x bfloat> %both{part}.{row} to <{LANES} x i32>"
        for row, name in enumerate((yield from _transposed(f"t{part}", "i32", pairs)), part * LANES):
            yield f"  store <{LANES} x i32> {name}, ptr %transposed{row}, align 64"
            yield f"  %transposed{row + 1} = getelementptr i8, ptr %transposed{row}, i64 %transposed_bytes"
    yield _repeat("keys", KEYS)


def _scores(width: int) -> Iterator[str]:
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
        names = yield from _transposed(f"t{step}", "i32", [f"%own{step}.{row}" for row in range(BLOCK)])
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
    yield _repeat("length", LANES)


def _weights() -> Iterator[str]:
    """Yield the function for the scores of a block: it writes `2 ** (scale * (score - maximum))` and 1 / their sum.

    The weights of two adjacent keys are interleaved, as TDPBF16PS needs them.
    """
    yield f"""
    define internal void @weights(ptr %scores, i64 %length, i64 %keys, float %scale, ptr %weights, ptr %inverse) #0 {{
    entry:
      %scale_lane = insertelement {FLOATS} poison, float %scale, i32 0
      {_shuffle("%scales", "float", "%scale_lane", "poison", [0] * LANES)}
      br label %fill
    """
    yield from _maximum()
    yield """
      br label %next
    next:
      %at = phi i64 [ 0, %compared ], [ %behind, %next ]
    """
    for key in (0, 1):
        yield f"  %sum{key} = phi {FLOATS} [ zeroinitializer, %compared ], [ %added{key}, %next ]"
    for key in (0, 1):
        yield f"""
      %key{key} = add i64 %at, {key}
      %place{key} = getelementptr {FLOATS}, ptr %scores, i64 %key{key}
      %own{key} = load {FLOATS}, ptr %place{key}, align 64
        """
        yield from _power(str(key), f"%own{key}")
        yield f"""
      %added{key} = fadd {FLOATS} %sum{key}, %weight{key}
      %short{key} = fptrunc {FLOATS} %weight{key} to {SHORTS}
        """
    yield f"""
      {_shuffle("%both", "bfloat", "%short0", "%short1", BOTH)}
      %bytes = mul i64 %at, {BLOCK * 2}
      %written = getelementptr i8, ptr %weights, i64 %bytes
      store <{KEYS} x bfloat> %both, ptr %written, align 64
    """
    inverse = f"""
      %sum = fadd {FLOATS} %added0, %added1
      %divided = fdiv {FLOATS} splat (float 1.0), %sum
      store {FLOATS} %divided, ptr %inverse, align 64
    """
    yield _repeat("keys", 2, inverse)


def _maximum() -> Iterator[str]:
    """Yield the code of `%top`, after it has filled the scores of keys behind the document."""
    yield f"""
    fill: ; the scores of keys behind the document
      %filled = phi i64 [ %length, %entry ], [ %next_filled, %filling ]
      %is_left = icmp slt i64 %filled, %keys
      br i1 %is_left, label %filling, label %compare
    filling:
      %empty = getelementptr {FLOATS}, ptr %scores, i64 %filled
      store {FLOATS} {NOTHING}, ptr %empty, align 64
      %next_filled = add i64 %filled, 1
      br label %fill
    compare:
      %from = phi i64 [ 0, %fill ], [ %next_from, %compare ]
    """
    ways = range(4)
    for way in ways:
        yield f"  %top{way} = phi {FLOATS} [ {NOTHING}, %fill ], [ %higher{way}, %compare ]"
    for way in ways:
        yield f"""
      %number{way} = add i64 %from, {way}
      %scored{way} = getelementptr {FLOATS}, ptr %scores, i64 %number{way}
      %score{way} = load {FLOATS}, ptr %scored{way}, align 64
      %higher{way} = call {FLOATS} @llvm.maxnum.v16f32({FLOATS} %top{way}, {FLOATS} %score{way})
        """
    yield f"""
      %next_from = add i64 %from, {len(ways)}
      %again = icmp slt i64 %next_from, %keys
      br i1 %again, label %compare, label %compared
    compared:
      %top01 = call {FLOATS} @llvm.maxnum.v16f32({FLOATS} %higher0, {FLOATS} %higher1)
      %top23 = call {FLOATS} @llvm.maxnum.v16f32({FLOATS} %higher2, {FLOATS} %higher3)
      %top = call {FLOATS} @llvm.maxnum.v16f32({FLOATS} %top01, {FLOATS} %top23)
    """


def _power(name: str, score: str) -> Iterator[str]:
    """Yield the code of `%weight<name>`: a series for the fraction of the exponent, times a power of two."""
    factors = [f"splat (float {_float(math.log(2) ** term / math.factorial(term))})" for term in range(TERMS)]
    yield f"""
      %below{name} = fsub {FLOATS} {score}, %top
      %exponent{name} = fmul {FLOATS} %below{name}, %scales
      %whole{name} = call {FLOATS} @llvm.roundeven.v16f32({FLOATS} %exponent{name})
      %x{name} = fsub {FLOATS} %exponent{name}, %whole{name}
    """
    series = factors.pop()
    while factors:
        result = f"%series{name}.{len(factors)}"
        given = ", ".join(f"{FLOATS} {one}" for one in (series, f"%x{name}", factors.pop()))
        yield f"  {result} = call {FLOATS} @llvm.fma.v16f32({given})"
        series = result
    given = f"{FLOATS} {series}, {FLOATS} %whole{name}, {FLOATS} zeroinitializer, i16 -1, i32 4"  # all lanes, rounded
    yield f"  %weight{name} = call {FLOATS} @llvm.x86.avx512.mask.scalef.ps.512({given})"


def _sums(width: int) -> Iterator[str]:
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
    yield _repeat("keys", KEYS, *stores)


def _write(width: int) -> Iterator[str]:
    """Yield the function that divides the sums of a block by those of the weights, and writes one row per query."""
    yield f"""
    define internal void @write(ptr %sums, ptr %inverse, ptr %output, i64 %row_bytes) #0 {{
      %divided = load {FLOATS}, ptr %inverse, align 64
    """
    for row in range(BLOCK):
        yield f"  %skip{row} = mul i64 %row_bytes, {row}"
        yield f"  %row{row} = getelementptr i8, ptr %output, i64 %skip{row}"
    for part in range(width // LANES):
        for number in range(part * LANES, part * LANES + LANES):
            yield f"""
      %place{number} = getelementptr i8, ptr %sums, i64 {number * TILE_BYTES}
      %sum{number} = load {FLOATS}, ptr %place{number}, align 64
      %own{number} = fmul {FLOATS} %sum{number}, %divided
            """
        own = [f"%own{part * LANES + lane}" for lane in range(LANES)]
        for row, name in enumerate((yield from _transposed(f"t{part}", "float", own))):
            yield f"""
      %short{part}.{row} = fptrunc {FLOATS} {name} to {SHORTS}
      %at{part}.{row} = getelementptr i8, ptr %row{row}, i64 {part * LANES * 2}
      store {SHORTS} %short{part}.{row}, ptr %at{part}.{row}, align 2
            """
    yield "  ret void\n}"


def _transposed(prefix: str, kind: str, rows: list[str]) -> Generator[str, None, list[str]]:
    """Yield the code that transposes 16 vectors of 16 lanes, and return their names: row r, lane l to row l, lane r.

    Each round moves the top bit of the row's index below the lowest bit of the lane's; four rounds swap the indices.
    """
    for turn in range(4):
        names = []
        for row in range(LANES // 2):
            for half, lanes in enumerate((BOTH[:LANES], BOTH[LANES:])):
                names.append(f"%{prefix}.{turn}.{2 * row + half}")
                yield _shuffle(names[-1], kind, rows[row], rows[row + LANES // 2], lanes)
        rows = names
    return rows


def _shuffle(name: str, kind: str, first: str, second: str, lanes: Sequence[int]) -> str:
    """Return the code of a vector with these lanes of two concatenated vectors."""
    vector, chosen = f"<{LANES} x {kind}>", ", ".join(f"i32 {lane}" for lane in lanes)
    return f"  {name} = shufflevector {vector} {first}, {vector} {second}, <{len(lanes)} x i32> <{chosen}>"


def _repeat(limit: str, step: int, *then: str) -> str:
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
