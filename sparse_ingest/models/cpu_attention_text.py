"""Attention as LLVM IR; cpu_attention.py compiles it, and heads/cpu_kernel_text.py explains how to read it.

    output[query] = sum over the document's keys of weight[key] * value[key] / sum of the weights
    weight[key] = 2 ** (scale * (query . key - maximum of the document))

Each vector holds one value for each of 16 queries: a score, maximum, weight or sum. The last block of queries and the
last 16 keys end with the document. One of fewer than 16 tokens is read with rows of the next ones; what is written to
those is overwritten by their own attention.
"""

from __future__ import annotations

from collections.abc import Iterator

from sparse_ingest.models.cpu_attention_products import BLOCK, Form, scores_text, sums_text, values_text
from sparse_ingest.models.heads.cpu_kernel_text import LANES, SHARED, TILE_BYTES
from sparse_ingest.models.vector_text import (
    BOTH,
    FLOATS,
    FUNCTIONS,
    constant,
    power_of_two,
    repeat,
    shuffle,
    spread,
    transposed,
)

# The score of a key behind the document: its weight is zero, and its difference from the maximum is finite.
NOTHING = constant(-(2.0**127))


def attention_text(form: Form, width: int) -> Iterator[str]:
    """Yield a module with the function `attend` for heads of `width` numbers."""
    product = f"declare {FLOATS} {form.multiply}({FLOATS}, {form.factors}, {form.factors})"
    if not form.multiply:
        product = "declare void @llvm.x86.tdpbf16ps(i8, i8, i8)"
    yield f"""
    declare i64 @llvm.smin.i64(i64, i64)
    declare i64 @llvm.smax.i64(i64, i64)
    declare {FLOATS} @llvm.maxnum.v16f32({FLOATS}, {FLOATS})
    {product if form.kind != "float" else "; its product is one of these functions"}
    {FUNCTIONS}
    {SHARED}
    """
    yield _attend(form, width)
    yield from values_text(form, width)
    yield from scores_text(form, width)
    yield from _weights(form)
    yield from sums_text(form, width)
    yield from _write(form, width)


def _attend(form: Form, width: int) -> str:
    """Return the loops over documents, heads and blocks of queries."""
    row, key, copied = width * form.bytes, "%head_key", ""
    if form.multiply:
        key = "%rows"
        copied = "call void @copy(ptr %head_key, i64 %row_bytes, i64 %length, i64 %keys, ptr %rows)"
    return f"""
    define void @attend(ptr %query, ptr %key, ptr %value, ptr %places, i64 %documents, i64 %heads, i64 %output_bytes,
                        i64 %row_bytes, i64 %head_bytes, float %scale, ptr %scratch, ptr %output) #0 {{
    entry:
      {"" if form.multiply else "call void @llvm.x86.ldtilecfg(ptr @tiles)"}
      %queries = getelementptr i8, ptr %scratch, i64 {TILE_BYTES}
      %sums = getelementptr i8, ptr %queries, i64 {row * BLOCK}
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
      %longer = add i64 %length, {form.keys - 1}
      %keys = and i64 %longer, {-form.keys}
      %values_bytes = mul i64 %keys, {row}
      %scores = getelementptr i8, ptr %values, i64 %values_bytes
      %scores_bytes = mul i64 %keys, {BLOCK * 4}
      %weights = getelementptr i8, ptr %scores, i64 %scores_bytes
      %weights_bytes = mul i64 %keys, {BLOCK * form.bytes}
      %rows = getelementptr i8, ptr %weights, i64 %weights_bytes
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
      %head_output_skip = mul i64 %at_head, {row}
      %head_output = getelementptr i8, ptr %document_output, i64 %head_output_skip
      call void @values(ptr %head_value, i64 %row_bytes, i64 %length, i64 %keys, ptr %values)
      {copied}
      br label %block
    block:
      %wanted = phi i64 [ 0, %head ], [ %behind, %block ]
      %row = call i64 @llvm.smin.i64(i64 %wanted, i64 %last_block)
      %row_skip = mul i64 %row, %row_bytes
      %block_query = getelementptr i8, ptr %head_query, i64 %row_skip
      call void @scores(ptr %block_query, i64 %row_bytes, ptr {key}, i64 %last_block, ptr %scores, ptr %queries)
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
      {"" if form.multiply else "call void @llvm.x86.tilerelease()"}
      ret void
    }}
    """


def _weights(form: Form) -> Iterator[str]:
    """Yield the function for the scores of a block: it writes `2 ** (scale * (score - maximum))` and 1 / their sum.

    Those of the keys of a group are interleaved.
    """
    yield f"""
    define internal void @weights(ptr %scores, i64 %length, i64 %keys, float %scale, ptr %weights, ptr %inverse) #0 {{
    entry:
      {spread("scales", "%scale")}
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
        yield f"  %below{key} = fsub {FLOATS} %own{key}, %top"
        yield f"  %exponent{key} = fmul {FLOATS} %below{key}, %scales"
        yield from power_of_two(f"weight{key}", f"%exponent{key}", form.bytes)
        yield f"  %added{key} = fadd {FLOATS} %sum{key}, %weight{key}"
    yield f"  %bytes = mul i64 %at, {BLOCK * form.bytes}"
    yield "  %written0 = getelementptr i8, ptr %weights, i64 %bytes"
    if form.numbers > 1:
        for key in (0, 1):
            yield f"  %short{key} = fptrunc {FLOATS} %weight{key} to {form.short}"
        yield shuffle("%both", form.kind, "%short0", "%short1", BOTH)
        yield f"  store {form.factors} %both, ptr %written0, align 64"
    else:
        yield f"  %written1 = getelementptr i8, ptr %written0, i64 {TILE_BYTES}"
        for key in (0, 1):
            yield f"  store {FLOATS} %weight{key}, ptr %written{key}, align 64"
    inverse = f"""
      %sum = fadd {FLOATS} %added0, %added1
      %divided = fdiv {FLOATS} splat (float 1.0), %sum
      store {FLOATS} %divided, ptr %inverse, align 64
    """
    yield repeat("%keys", 2, inverse)


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


def _write(form: Form, width: int) -> Iterator[str]:
    """Yield the function that divides the sums of a block by those of the weights, and writes one row per query."""
    yield f"""
    define internal void @write(ptr %sums, ptr %inverse, ptr %output, i64 %row_bytes) #0 {{
    entry:
      %divided = load {FLOATS}, ptr %inverse, align 64
      br label %next
    next: ; 16 dimensions
      %at = phi i64 [ 0, %entry ], [ %behind, %next ]
      %sums_skip = mul i64 %at, {TILE_BYTES}
      %part = getelementptr i8, ptr %sums, i64 %sums_skip
      %skip = mul i64 %at, {form.bytes}
      %row0 = getelementptr i8, ptr %output, i64 %skip
    """
    for number in range(LANES):
        yield f"""
      %place{number} = getelementptr i8, ptr %part, i64 {number * TILE_BYTES}
      %sum{number} = load {FLOATS}, ptr %place{number}, align 64
      %own{number} = fmul {FLOATS} %sum{number}, %divided
        """
    for row, name in enumerate((yield from transposed("t", "float", [f"%own{lane}" for lane in range(LANES)]))):
        if form.short != FLOATS:
            yield f"  %short{row} = fptrunc {FLOATS} {name} to {form.short}"
            name = f"%short{row}"
        yield f"  store {form.short} {name}, ptr %row{row}, align {form.bytes}"
        yield f"  %row{row + 1} = getelementptr i8, ptr %row{row}, i64 %row_bytes"
    yield repeat(str(width), LANES)
