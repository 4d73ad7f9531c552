"""The products of the compiled attention as LLVM IR: queries with keys, and weights with values.

cpu_attention_text.py puts them together. Factors are multiplied in groups of 4 bytes, two bfloat16 or one float32. On
tiles of AMX, columns are queries, and rows are keys or dimensions of values. With vectors, whose lanes are queries, a
group of a key or of a dimension of values is spread to all lanes. LLVM splits each vector in two for AVX2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from sparse_ingest.models.heads.cpu_kernel_text import GROUP_BYTES, LANES, TILE_BYTES
from sparse_ingest.models.vector_text import BOTH, FLOATS, NUMBERS, repeat, shuffle, spread, transposed

BLOCK = LANES  # queries per block
KEYS = 2 * LANES  # most keys at a time: a row of a tile has 32 values of bfloat16
AT_ONCE = 4  # groups that are multiplied in one round of a loop


@dataclass(frozen=True)
class Form:
    """The parts of the text that differ between dtypes and instructions."""

    feature: str  # what LLVM calls the part of a CPU that multiplies
    kind: str  # of a number, in LLVM
    bytes: int  # of it
    multiply: str = ""  # of vectors; empty: tiles
    arguments: str = "{0}, {1}, {2}"  # of `multiply`: the sum and the factors
    rows: int = LANES  # keys or dimensions of values that are multiplied in one loop: 16 registers or a tile of sums
    keys: int = KEYS  # the number of keys is rounded up to a multiple of this

    @property
    def numbers(self) -> int:
        """Numbers of a group."""
        return GROUP_BYTES // self.bytes

    @property
    def factors(self) -> str:
        """A vector of groups."""
        return f"<{LANES * self.numbers} x {self.kind}>"

    @property
    def short(self) -> str:
        """A vector of one number for each query."""
        return f"<{LANES} x {self.kind}>"


_FLOAT32 = Form("avx512f", "float", 4, "@llvm.fma.v16f32", "{1}, {2}, {0}")
# By dtype and instructions.
FORMS = {
    ("bfloat16", "amx"): Form("amx-bf16", "bfloat", 2),
    ("bfloat16", "avx512"): Form("avx512bf16", "bfloat", 2, "@llvm.x86.avx512bf16.dpbf16ps.512"),
    ("float32", "avx512"): _FLOAT32,
    # A CPU starts two products a cycle, and each takes 4 cycles: the 8 sums of 4 rows keep it busy. Relative times on
    # Zen 3: 1.4 with 2 rows; 1.8 to 2.1 with 8, whose sums do not fit the 16 registers.
    ("float32", "avx2"): replace(_FLOAT32, feature="fma", rows=4, keys=LANES),
}


def values_text(form: Form, width: int) -> Iterator[str]:
    """Yield the function that lays out the values of a document for `sums`.

    Keys behind the document repeat its last value; their weights are zero.
    """
    yield """
    define internal void @values(ptr %value, i64 %row_bytes, i64 %length, i64 %keys, ptr %values) #0 {
    entry:
      %last = sub i64 %length, 1
      %value_bytes = mul i64 %keys, 2
      br label %next
    next:
      %at = phi i64 [ 0, %entry ], [ %behind, %next ]
    """
    keys = form.numbers if form.multiply else KEYS
    for row in range(keys):
        yield from _row(form, row, width)
    yield from _value_groups(form, width) if form.multiply else _transposed_values(width)
    yield repeat("%keys", keys)
    if form.multiply:
        yield from _copy(form, width)


def _copy(form: Form, width: int) -> Iterator[str]:
    """Yield the function that copies the keys of a document, as those of many heads share the sets of a cache.

    Keys behind the document repeat its last one.
    """
    yield """
    define internal void @copy(ptr %value, i64 %row_bytes, i64 %length, i64 %keys, ptr %rows) #0 {
    entry:
      %last = sub i64 %length, 1
      br label %next
    next:
      %at = phi i64 [ 0, %entry ], [ %behind, %next ]
    """
    yield from _row(form, 0, width)
    yield f"  %skip = mul i64 %at, {width * form.bytes}"
    yield "  %copied = getelementptr i8, ptr %rows, i64 %skip"
    for part in range(width // LANES):
        yield f"""
      %written{part} = getelementptr i8, ptr %copied, i64 {part * LANES * form.bytes}
      store {form.short} %own{part}.0, ptr %written{part}, align {LANES * form.bytes}
        """
    yield repeat("%keys", 1)


def _row(form: Form, row: int, width: int) -> Iterator[str]:
    """Yield the code that reads the parts of a row, of the last one if it is behind the document."""
    yield f"""
      %wanted{row} = add i64 %at, {row}
      %row{row} = call i64 @llvm.smin.i64(i64 %wanted{row}, i64 %last)
      %skip{row} = mul i64 %row{row}, %row_bytes
      %value{row} = getelementptr i8, ptr %value, i64 %skip{row}
    """
    for part in range(width // LANES):
        yield f"  %place{part}.{row} = getelementptr i8, ptr %value{row}, i64 {part * LANES * form.bytes}"
        yield f"  %own{part}.{row} = load {form.short}, ptr %place{part}.{row}, align {form.bytes}"


def _value_groups(form: Form, width: int) -> Iterator[str]:
    """Yield the code that writes the values of one group of keys, `[keys in groups][width][4 bytes]`."""
    yield f"  %values_skip = mul i64 %at, {width * form.bytes}"
    yield "  %values0 = getelementptr i8, ptr %values, i64 %values_skip"
    for part in range(width // LANES):
        name = f"%own{part}.0"
        if form.numbers == 2:
            name = f"%both{part}"
            yield shuffle(name, form.kind, f"%own{part}.0", f"%own{part}.1", BOTH)
        yield f"""
      %written{part} = getelementptr i8, ptr %values0, i64 {part * TILE_BYTES}
      store {form.factors} {name}, ptr %written{part}, align 64
        """


def _transposed_values(width: int) -> Iterator[str]:
    """Yield the code that writes the values of `KEYS` keys to `[width, keys]`."""
    yield "  %values_skip = mul i64 %at, 2"
    yield "  %values0 = getelementptr i8, ptr %values, i64 %values_skip"
    for part in range(width // LANES):
        pairs = []
        for row in range(0, KEYS, 2):
            yield shuffle(f"%both{part}.{row}", "bfloat", f"%own{part}.{row}", f"%own{part}.{row + 1}", BOTH)
            pairs.append(f"%pair{part}.{row}")
            yield f"  {pairs[-1]} = bitcast <{KEYS} x bfloat> %both{part}.{row} to {NUMBERS}"
        for row, name in enumerate((yield from transposed(f"t{part}", "i32", pairs)), part * LANES):
            yield f"  store {NUMBERS} {name}, ptr %values{row}, align 64"
            yield f"  %values{row + 1} = getelementptr i8, ptr %values{row}, i64 %value_bytes"


def scores_text(form: Form, width: int) -> Iterator[str]:
    """Yield the function that writes the products of a document's keys and a block of queries, `[keys, queries]`."""
    yield """
    define internal void @scores(ptr %query0, i64 %row_bytes, ptr %key, i64 %last, ptr %scores, ptr %queries) #0 {
    entry:
      br label %query
    """
    steps = width * form.bytes // TILE_BYTES
    yield from _transposed_queries(form, steps)
    for step in () if form.multiply else range(steps):
        yield f"  %queries{step} = getelementptr i8, ptr %queries, i64 {step * LANES * TILE_BYTES}"
        yield f"  call void @llvm.x86.tileloadd64(i8 {4 + step}, ptr %queries{step}, i64 {TILE_BYTES})"
    yield f"""
      %length = add i64 %last, {LANES}
      %last_rows = sub i64 %length, {form.rows}
      br label %next
    next:
      %at = phi i64 [ 0, %transposed ], [ %behind, %{"stored" if form.multiply else "next"} ]
      %row = call i64 @llvm.smin.i64(i64 %at, i64 %last_rows)
      %skip = mul i64 %row, {width * form.bytes if form.multiply else "%row_bytes"}
      %key0 = getelementptr i8, ptr %key, i64 %skip
      %score_skip = mul i64 %row, {TILE_BYTES}
      %score = getelementptr i8, ptr %scores, i64 %score_skip
    """
    yield from _vector_scores(form, width) if form.multiply else _tile_scores(steps)
    yield repeat("%length", form.rows)


def _transposed_queries(form: Form, steps: int) -> Iterator[str]:
    """Yield the loop that writes a block of queries, `[width in groups][queries][4 bytes]`, 64 bytes of each a time."""
    yield f"""
    query:
      %query_step = phi i64 [ 0, %entry ], [ %next_query_step, %query ]
      %query_inside = mul i64 %query_step, {TILE_BYTES}
      %part0 = getelementptr i8, ptr %query0, i64 %query_inside
    """
    for row in range(BLOCK):
        yield f"  %own{row} = load {NUMBERS}, ptr %part{row}, align {form.bytes}"
        yield f"  %part{row + 1} = getelementptr i8, ptr %part{row}, i64 %row_bytes"
    names = yield from transposed("t", "i32", [f"%own{row}" for row in range(BLOCK)])
    yield f"  %written_skip = mul i64 %query_step, {LANES * TILE_BYTES}"
    yield "  %written = getelementptr i8, ptr %queries, i64 %written_skip"
    for row, name in enumerate(names):
        yield f"  %written{row} = getelementptr i8, ptr %written, i64 {row * TILE_BYTES}"
        yield f"  store {NUMBERS} {name}, ptr %written{row}, align 64"
    yield f"""
      %next_query_step = add i64 %query_step, 1
      %more_queries = icmp ult i64 %next_query_step, {steps}
      br i1 %more_queries, label %query, label %transposed
    transposed:
    """


def _tile_scores(steps: int) -> Iterator[str]:
    """Yield the code that multiplies a tile of keys with the queries in tiles 4 and 5."""
    yield "  call void @llvm.x86.tilezero(i8 0)"
    for step in range(steps):
        yield f"""
      call void @llvm.x86.tileloadd64(i8 {6 + step}, ptr %key{step}, i64 %row_bytes)
      call void @llvm.x86.tdpbf16ps(i8 0, i8 {6 + step}, i8 {4 + step})
      %key{step + 1} = getelementptr i8, ptr %key{step}, i64 {TILE_BYTES}
        """
    yield f"  call void @llvm.x86.tilestored64(i8 0, ptr %score, i64 {TILE_BYTES})"


def _vector_scores(form: Form, width: int) -> Iterator[str]:
    """Yield the code that multiplies some keys with the queries, `AT_ONCE` groups of each in a step."""
    yield "  br label %step\nstep:"
    yield "  %number = phi i64 [ 0, %next ], [ %next_number, %step ]"
    for row in range(form.rows):
        yield f"  %sum{row}.0 = phi {FLOATS} [ zeroinitializer, %next ], [ %sum{row}.{AT_ONCE}, %step ]"
    yield f"""
      %inside = mul i64 %number, {AT_ONCE * GROUP_BYTES}
      %query_skip = mul i64 %number, {AT_ONCE * TILE_BYTES}
      %step_queries = getelementptr i8, ptr %queries, i64 %query_skip
      %step_keys = getelementptr i8, ptr %key0, i64 %inside
    """
    for group in range(AT_ONCE):
        yield f"""
      %at_query{group} = getelementptr i8, ptr %step_queries, i64 {group * TILE_BYTES}
      %of_queries{group} = load {form.factors}, ptr %at_query{group}, align 64
        """
        for row in range(form.rows):
            skip = row * width * form.bytes + group * GROUP_BYTES
            yield f"  %at_key{row}.{group} = getelementptr i8, ptr %step_keys, i64 {skip}"
            yield _add_product(form, row, group, f"%at_key{row}.{group}", f"%of_queries{group}")
    yield f"""
      %next_number = add i64 %number, 1
      %more_steps = icmp ult i64 %next_number, {width * form.bytes // (AT_ONCE * GROUP_BYTES)}
      br i1 %more_steps, label %step, label %stored
    stored:
    """
    for row in range(form.rows):
        yield f"  %at_score{row} = getelementptr i8, ptr %score, i64 {row * TILE_BYTES}"
        yield f"  store {FLOATS} %sum{row}.{AT_ONCE}, ptr %at_score{row}, align 64"


def _add_product(form: Form, row: int, turn: int, place: str, factors: str) -> str:
    """Return the code of `%sum<row>.<turn + 1>`: `%sum<row>.<turn>` and the product of a group with factors."""
    name = f"{row}.{turn}"
    given = (f"{FLOATS} %sum{name}", f"{form.factors} {factors}", f"{form.factors} %spread{name}")
    return f"""
      %group{name} = load i32, ptr {place}, align {form.bytes}
      {spread(f"lanes{name}", f"%group{name}", "i32")}
      %spread{name} = bitcast {NUMBERS} %lanes{name} to {form.factors}
      %sum{row}.{turn + 1} = call {FLOATS} {form.multiply}({form.arguments.format(*given)})
    """


def sums_text(form: Form, width: int) -> Iterator[str]:
    """Yield the function that writes the products of the values of a document and a block of weights."""
    yield """
    define internal void @sums(ptr %values, ptr %weights, i64 %keys, ptr %sums) #0 {
    entry:
    """
    yield from _vector_sums(form, width) if form.multiply else _tile_sums(width)


def _vector_sums(form: Form, width: int) -> Iterator[str]:
    """Yield the loops over parts of the values, some dimensions each, and over groups of keys."""
    yield """
      br label %part
    part:
      %number = phi i64 [ 0, %entry ], [ %next_number, %end ]
    """
    yield f"""
      %part_skip = mul i64 %number, {form.rows * GROUP_BYTES}
      %part_values = getelementptr i8, ptr %values, i64 %part_skip
      br label %next
    next:
      %at = phi i64 [ 0, %part ], [ %behind, %next ]
    """
    for row in range(form.rows):
        yield f"  %sum{row}.0 = phi {FLOATS} [ zeroinitializer, %part ], [ %sum{row}.1, %next ]"
    yield f"""
      %weight_skip = mul i64 %at, {BLOCK * form.bytes}
      %at_weights = getelementptr i8, ptr %weights, i64 %weight_skip
      %of_queries = load {form.factors}, ptr %at_weights, align 64
      %value_skip = mul i64 %at, {width * form.bytes}
      %value = getelementptr i8, ptr %part_values, i64 %value_skip
    """
    for row in range(form.rows):
        yield f"  %at_value{row} = getelementptr i8, ptr %value, i64 {row * GROUP_BYTES}"
        yield _add_product(form, row, 0, f"%at_value{row}", "%of_queries")
    stores = [
        f"%at_sum{row} = getelementptr i8, ptr %part_sums, i64 {row * TILE_BYTES}\n"
        f"store {FLOATS} %sum{row}.1, ptr %at_sum{row}, align 64\n"
        for row in range(form.rows)
    ]
    yield f"""
      %behind = add i64 %at, {form.numbers}
      %more = icmp slt i64 %behind, %keys
      br i1 %more, label %next, label %end
    end:
      %sums_skip = mul i64 %number, {form.rows * TILE_BYTES}
      %part_sums = getelementptr i8, ptr %sums, i64 %sums_skip
      {"".join(stores)}
      %next_number = add i64 %number, 1
      %more_parts = icmp ult i64 %next_number, {width // form.rows}
      br i1 %more_parts, label %part, label %done
    done:
      ret void
    }}
    """


def _tile_sums(width: int) -> Iterator[str]:
    """Yield the loop over tiles of weights, and of values."""
    parts = range(width // LANES)
    yield """
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
    yield repeat("%keys", KEYS, *stores)
