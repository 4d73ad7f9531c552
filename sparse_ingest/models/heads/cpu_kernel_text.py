"""The CPU's kernel as LLVM IR: products of hidden states and vocabulary, and their maximum. cpu_kernel.py compiles it.

    found[document, column] = relu((max over the document's rows of row . column + before[column])
                                   * row_scales[document] * column_scales[column] + bias[column])

Two vectors of columns of the vocabulary are one panel: 32 columns, or 16 with AVX2. For each panel the kernel walks
over all documents, a block of rows at a time; products stay in registers and only their maximum is kept. A panel fits
the first- or second-level cache. The last block of a document ends with it: rows that are read twice do not change a
maximum. Factors are multiplied in groups of 4 bytes: four 8-bit numbers (unsigned times signed), two 16-bit numbers or
bfloat16, or one float32. A panel is `[width in groups][columns][4 bytes]`.

How to read the text: `%name` is a value that is set once, `name:` a label for `br label %name`, and `;` starts a
comment. `phi` is a loop variable with its initial value and its value in the previous round. `getelementptr i8, ptr %a,
i64 %n` is the address n bytes after a (with `i32` or `float`: n 4-byte numbers). `poison` is a value that is never
read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

LANES = 16  # 4-byte numbers of a vector of AVX512, rows of a tile
HALVES = (0, 1)  # of a panel, as a vector has half of its columns
GROUP_BYTES = 4
TILE_BYTES = 64  # of a tile's row
LINE_BYTES = 64  # of a CPU's cache


@dataclass(frozen=True)
class Form:
    """The parts of the text that differ between dtypes and instructions."""

    feature: str  # what LLVM calls the part of a CPU that multiplies
    # Rows of a block, largest first. AVX512 has 32 registers: 24 sums, two vectors of columns and one of a row. AMX has
    # 8 tiles: four sums, two of columns and two of rows. AVX2 has 16 registers: 12 sums, and factors as AVX512.
    blocks: tuple[int, ...]
    sums: str  # a vector of them
    factors: str  # a vector of them
    multiply: str  # of vectors
    larger: str  # of two vectors, lane by lane
    lowest: str  # a vector of it
    add: str
    to_float: str  # of a vector of sums
    multiply_tiles: str = ""  # of AMX
    lanes: int = LANES  # sums of a vector
    arguments: str = "{0}, {1}, {2}"  # of `multiply`: the sum and the factors
    # Steps from the prefetch of columns to their use, 0: without one. float32 is 4% faster at 128 wide, 8% at 256 and
    # 384 with AVX512; others were not measured.
    ahead: int = 0
    adds_products: bool = True  # `multiply` adds its products to the sums; otherwise it returns them

    @property
    def both(self) -> str:
        """The sums of a panel's two halves."""
        return f"{{ {self.sums}, {self.sums} }}"

    @property
    def panel(self) -> int:
        """Columns of a panel."""
        return len(HALVES) * self.lanes

    def added(self, name: str, total: str, left: str, right: str) -> str:
        """Return the code of `%<name>`: a vector of sums plus the products of two vectors of factors."""
        given = (f"{self.sums} {total}", f"{self.factors} {left}", f"{self.factors} {right}")
        if self.adds_products:
            return f"  %{name} = call {self.sums} {self.multiply}({self.arguments.format(*given)})"
        return f"""
      %{name}.products = call {self.sums} {self.multiply}({self.arguments.format(*given)})
      %{name} = {self.add} {self.sums} {total}, %{name}.products
        """

    @property
    def declaration(self) -> str:
        """The declaration of `multiply`."""
        return f"declare {self.sums} {self.multiply}({self.arguments.format(self.sums, self.factors, self.factors)})"


def _float32(feature: str, blocks: tuple[int, ...], lanes: int) -> Form:
    vector = f"<{lanes} x float>"
    # With `nnan` (inputs without NaN) a maximum is one instruction; vectors.py finds NaN in hidden states.
    return Form(
        feature, blocks, vector, vector, f"@llvm.fma.v{lanes}f32", f"call nnan {vector} @llvm.maxnum.v{lanes}f32",
        "splat (float 0xFFF0000000000000)", "fadd", f"bitcast {vector} {{}} to {vector}", lanes=lanes,
        arguments="{1}, {2}, {0}",
    )  # fmt: skip


_INT8 = Form(
    "avx512vnni", (12, 8, 4), "<16 x i32>", "<64 x i8>", "@llvm.x86.avx512.vpdpbusd.512",
    "call <16 x i32> @llvm.smax.v16i32", "splat (i32 -2147483648)", "add", "sitofp <16 x i32> {} to <16 x float>",
)  # fmt: skip
_FLOAT32 = replace(_float32("avx512f", (12, 8, 4), LANES), ahead=4)
_BFLOAT16 = replace(
    _FLOAT32, feature="avx512bf16", factors="<32 x bfloat>", multiply="@llvm.x86.avx512bf16.dpbf16ps.512",
    arguments=Form.arguments, ahead=0,
)  # fmt: skip
# Another instruction adds the products to the sums.
_INT16 = replace(
    _INT8, feature="avx2", blocks=(6, 4), lanes=8, sums="<8 x i32>", factors="<16 x i16>",
    multiply="@llvm.x86.avx2.pmadd.wd", arguments="{1}, {2}", adds_products=False,
    larger="call <8 x i32> @llvm.smax.v8i32", to_float="sitofp <8 x i32> {} to <8 x float>",
)  # fmt: skip
# By dtype and instructions.
FORMS = {
    ("int8", "avx512"): _INT8,
    ("int8", "amx"): replace(_INT8, feature="amx-int8", blocks=(32, 16), multiply_tiles="@llvm.x86.tdpbusd"),
    ("bfloat16", "avx512"): _BFLOAT16,
    ("bfloat16", "amx"): replace(_BFLOAT16, feature="amx-bf16", blocks=(32, 16), multiply_tiles="@llvm.x86.tdpbf16ps"),
    ("float32", "avx512"): _FLOAT32,
    ("float32", "avx2"): _float32("fma", (6, 4), 8),
    ("int16", "avx2"): _INT16,
}

# Eight tiles of 16 rows of 64 bytes: palette 1, then the bytes of a row of each, then the rows of each.
TILES = bytes([1, *[0] * 15, *[TILE_BYTES, 0] * 8, *[0] * 16, *[LANES] * 8, *[0] * 8])
# Declarations of every module: instructions of AMX, and the attributes of functions.
SHARED = f"""
    declare void @llvm.x86.ldtilecfg(ptr)
    declare void @llvm.x86.tilerelease()
    declare void @llvm.x86.tilezero(i8)
    declare void @llvm.x86.tileloadd64(i8, ptr, i64)
    declare void @llvm.x86.tilestored64(i8, ptr, i64)
    @tiles = private constant [{len(TILES)} x i8] [{", ".join(f"i8 {byte}" for byte in TILES)}], align 64
    attributes #0 = {{ nounwind "prefer-vector-width"="512" "min-legal-vector-width"="512" }}
"""


def kernel_text(form: Form, row_bytes: int) -> str:
    """Return a module with the function `maxima` for rows of `row_bytes` bytes, a multiple of `TILE_BYTES`."""
    block_body = _tile_block if form.multiply_tiles else _vector_block
    declarations = f"""
    {form.declaration}
    {f"declare void {form.multiply_tiles}(i8, i8, i8)" if form.multiply_tiles else ""}
    declare <16 x i32> @llvm.smax.v16i32(<16 x i32>, <16 x i32>)
    declare <8 x i32> @llvm.smax.v8i32(<8 x i32>, <8 x i32>)
    declare <16 x float> @llvm.maxnum.v16f32(<16 x float>, <16 x float>)
    declare <8 x float> @llvm.maxnum.v8f32(<8 x float>, <8 x float>)
    declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
    {SHARED}
    """
    functions = (part for rows in form.blocks for part in _block(form, rows, block_body(form, rows, row_bytes)))
    return "\n".join([declarations, *functions, *_maxima(form, row_bytes)])


def _block(form: Form, rows: int, body: Iterator[str]) -> Iterator[str]:
    """Yield a function: the maximum of each column over the products of a block of rows with a panel, and `before`."""
    yield f"""
    define internal {form.both} @block{rows}(ptr %rows, ptr %panel, ptr %scratch, {form.sums} %before0,
                                             {form.sums} %before1) noinline #0 {{
    """
    yield from body
    yield f"""
      %first = insertvalue {form.both} poison, {form.sums} %largest0, 0
      %both = insertvalue {form.both} %first, {form.sums} %largest1, 1
      ret {form.both} %both
    }}
    """


def _addresses(form: Form, *, groups: int) -> str:
    """Return the addresses of a step that multiplies this many groups: both halves of the panel, and the first row."""
    return f"""
      %done = mul i64 %number, {groups * form.panel * GROUP_BYTES}
      %columns0 = getelementptr i8, ptr %panel, i64 %done
      %columns1 = getelementptr i8, ptr %columns0, i64 {form.lanes * GROUP_BYTES}
      %inside = mul i64 %number, {groups * GROUP_BYTES}
      %left = getelementptr i8, ptr %rows, i64 %inside
    """


def _next_step(row_bytes: int, *, groups: int) -> str:
    """Return the jump that repeats the step while the width has more groups."""
    return f"""
      %next = add i64 %number, 1
      %more = icmp ult i64 %next, {row_bytes // (groups * GROUP_BYTES)}
      br i1 %more, label %step, label %end
    end:
    """


def _vector_block(form: Form, rows: int, row_bytes: int) -> Iterator[str]:
    """Yield the body for vectors."""
    yield from vector_products(form, rows, row_bytes)
    for half in HALVES:
        yield from _largest_of(form, half, [f"%added{row}.{half}" for row in range(rows)])


def vector_products(form: Form, rows: int, row_bytes: int) -> Iterator[str]:
    """Yield `%added<row>.<half>` for a block: a group of a row fills a vector, which is multiplied with the columns."""
    sums, numbers, align = form.sums, f"<{form.lanes} x i32>", form.lanes * GROUP_BYTES
    yield """
    entry:
      br label %step
    step: ; one group of the width
      %number = phi i64 [ 0, %entry ], [ %next, %step ]
    """
    for row in range(rows):
        for half in HALVES:
            yield f"  %sum{row}.{half} = phi {sums} [ zeroinitializer, %entry ], [ %added{row}.{half}, %step ]"
    yield f"""
      {_addresses(form, groups=1)}
      %right0 = load {form.factors}, ptr %columns0, align {align}
      %right1 = load {form.factors}, ptr %columns1, align {align}
    """
    step = len(HALVES) * align if form.ahead else 0
    for line in range(form.ahead * step, (form.ahead + 1) * step, LINE_BYTES):
        yield f"  %line{line} = getelementptr i8, ptr %columns0, i64 {line}"
        yield f"  call void @llvm.prefetch.p0(ptr %line{line}, i32 0, i32 3, i32 1)"
    for row in range(rows):
        yield f"""
      ; the 4 bytes of this row, in every lane
      %place{row} = getelementptr i8, ptr %left, i64 {row * row_bytes}
      %factor{row} = load i32, ptr %place{row}, align 4
      %lane{row} = insertelement {numbers} poison, i32 %factor{row}, i32 0
      %spread{row} = shufflevector {numbers} %lane{row}, {numbers} poison, {numbers} zeroinitializer
      %left{row} = bitcast {numbers} %spread{row} to {form.factors}
        """
        for half in HALVES:
            yield form.added(f"added{row}.{half}", f"%sum{row}.{half}", f"%left{row}", f"%right{half}")
    yield _next_step(row_bytes, groups=1)


def _tile_block(form: Form, rows: int, row_bytes: int) -> Iterator[str]:
    """Yield the body for AMX: tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 columns; sums are read back from `scratch`.

    A load or store has the tile, the address and the bytes from row to row; a product the sums, rows and columns.
    """
    downs = range(rows // LANES)
    yield "entry:"
    for tile in range(len(downs) * len(HALVES)):
        yield f"  call void @llvm.x86.tilezero(i8 {tile})"
    yield f"""
      br label %step
    step: ; 64 bytes of the width, which are 16 groups
      %number = phi i64 [ 0, %entry ], [ %next, %step ]
      {_addresses(form, groups=LANES)}
      call void @llvm.x86.tileloadd64(i8 6, ptr %columns0, i64 {form.panel * GROUP_BYTES})
      call void @llvm.x86.tileloadd64(i8 7, ptr %columns1, i64 {form.panel * GROUP_BYTES})
    """
    for down in downs:
        yield f"""
      %left{down} = getelementptr i8, ptr %left, i64 {down * LANES * row_bytes}
      call void @llvm.x86.tileloadd64(i8 {4 + down}, ptr %left{down}, i64 {row_bytes})
      call void {form.multiply_tiles}(i8 {2 * down}, i8 {4 + down}, i8 6)
      call void {form.multiply_tiles}(i8 {2 * down + 1}, i8 {4 + down}, i8 7)
        """
    yield _next_step(row_bytes, groups=LANES)
    for half in HALVES:
        found = []
        for tile in (2 * down + half for down in downs):
            yield f"  %stored{tile} = getelementptr i8, ptr %scratch, i64 {tile * LANES * TILE_BYTES}"
            yield f"  call void @llvm.x86.tilestored64(i8 {tile}, ptr %stored{tile}, i64 {TILE_BYTES})"
            for row in range(LANES):
                yield f"  %at{tile}.{row} = getelementptr i8, ptr %stored{tile}, i64 {row * TILE_BYTES}"
                yield f"  %sum{tile}.{row} = load {form.sums}, ptr %at{tile}.{row}, align 64"
                found.append(f"%sum{tile}.{row}")
        yield from _largest_of(form, half, found)


def _largest_of(form: Form, half: int, found: list[str]) -> Iterator[str]:
    """Yield `%largest<half>`, the maximum of these vectors and `%before<half>`."""
    before = f"%before{half}"
    for place, name in enumerate(found):
        after = f"%largest{half}" if place == len(found) - 1 else f"%larger{half}.{place}"
        yield f"  {after} = {form.larger}({form.sums} {before}, {form.sums} {name})"
        before = after


def _maxima(form: Form, row_bytes: int) -> Iterator[str]:
    """Yield the loops over panels and documents. A document has at least as many rows as the smallest block.

    Tiles belong to the thread: each call configures and releases them, as torch's products do.
    """
    yield f"""
    define void @maxima(ptr %rows, ptr %weight, ptr %starts, i64 %documents, i64 %panels, ptr %before,
                        ptr %row_scales, ptr %column_scales, ptr %bias, ptr %found) #0 {{
    entry:
      %scratch = alloca [{4 * LANES * TILE_BYTES} x i8], align 64
      {"call void @llvm.x86.ldtilecfg(ptr @tiles)" if form.multiply_tiles else ""}
      %stride = mul i64 %panels, {form.panel}
      br label %panel

    panel:
      %at_panel = phi i64 [ 0, %entry ], [ %next_panel, %panel_end ]
      %panel_bytes = mul i64 %at_panel, {row_bytes * form.panel}
      %columns = getelementptr i8, ptr %weight, i64 %panel_bytes
      %column0 = mul i64 %at_panel, {form.panel}
      %column1 = add i64 %column0, {form.lanes}
      br label %document

    document:
      %at = phi i64 [ 0, %panel ], [ %next, %store ]
      %at_start = getelementptr i32, ptr %starts, i64 %at
      %at_end = getelementptr i32, ptr %at_start, i64 1
      %start32 = load i32, ptr %at_start
      %end32 = load i32, ptr %at_end
      %start = sext i32 %start32 to i64
      %end = sext i32 %end32 to i64
      br label %try0
    """
    yield from _document_blocks(form, row_bytes)
    yield from _store(form)
    yield f"""
      %next = add i64 %at, 1
      %more = icmp ult i64 %next, %documents
      br i1 %more, label %document, label %panel_end

    panel_end:
      %next_panel = add i64 %at_panel, 1
      %more_panels = icmp ult i64 %next_panel, %panels
      br i1 %more_panels, label %panel, label %done

    done:
      {"call void @llvm.x86.tilerelease()" if form.multiply_tiles else ""}
      ret void
    }}
    """


def _document_blocks(form: Form, row_bytes: int) -> Iterator[str]:
    """Yield `try0` to `store`: a loop for each block size, largest first, while it fits; then the remaining rows."""
    row, largest, before = "%start", [form.lowest, form.lowest], "document"
    for place, rows in enumerate(form.blocks):
        yield f"""
    try{place}:
      %row{place} = phi i64 [ {row}, %{before} ], [ %behind{place}, %do{place} ]
        """
        for half in HALVES:
            yield (
                f"  %largest{place}.{half} = phi {form.sums} [ {largest[half]}, %{before} ], "
                f"[ %larger{place}.{half}, %do{place} ]"
            )
        row, largest, before = f"%row{place}", [f"%largest{place}.0", f"%largest{place}.1"], f"try{place}"
        yield f"""
      %behind{place} = add i64 {row}, {rows}
      %fits{place} = icmp sle i64 %behind{place}, %end
      br i1 %fits{place}, label %do{place}, label %{f"try{place + 1}" if place + 1 < len(form.blocks) else "left"}
    do{place}:
        """
        yield _call(form, str(place), row, rows, row_bytes, largest)
        yield f"  br label %try{place}"
    yield f"""
    left:
      %is_left = icmp slt i64 {row}, %end
      br i1 %is_left, label %last, label %store
    last: ; ends with the document, and may begin with rows that were seen
      %last_row = sub i64 %end, {form.blocks[-1]}
    """
    yield _call(form, "last", "%last_row", form.blocks[-1], row_bytes, largest)
    yield """
      br label %store
    store:
    """
    for half in HALVES:
        yield f"  %all{half} = phi {form.sums} [ {largest[half]}, %left ], [ %largerlast.{half}, %last ]"


def _call(form: Form, name: str, row: str, rows: int, row_bytes: int, largest: list[str]) -> str:
    """Return the code of `%larger<name>.0` and `.1`, the maxima with one block more."""
    before = ", ".join(f"{form.sums} {one}" for one in largest)
    return f"""
      %bytes{name} = mul i64 {row}, {row_bytes}
      %block{name} = getelementptr i8, ptr %rows, i64 %bytes{name}
      %both{name} = call {form.both} @block{rows}(ptr %block{name}, ptr %columns, ptr %scratch, {before})
      %larger{name}.0 = extractvalue {form.both} %both{name}, 0
      %larger{name}.1 = extractvalue {form.both} %both{name}, 1
    """


def _store(form: Form) -> Iterator[str]:
    """Yield the code that scales the maxima of a document, adds the bias, applies the relu and writes them."""
    floats, align = f"<{form.lanes} x float>", form.lanes * GROUP_BYTES
    yield f"""
      ; the document's scale, in every lane
      %at_scale = getelementptr float, ptr %row_scales, i64 %at
      %row_scale = load float, ptr %at_scale
      %scale_lane = insertelement {floats} poison, float %row_scale, i32 0
      %scale = shufflevector {floats} %scale_lane, {floats} poison, <{form.lanes} x i32> zeroinitializer
      %document_place = mul i64 %at, %stride
    """
    for half in HALVES:
        for name, kind in (("before", form.sums), ("column_scales", floats), ("bias", floats)):
            yield f"  %at_{name}{half} = getelementptr i32, ptr %{name}, i64 %column{half}"
            yield f"  %{name}{half} = load {kind}, ptr %at_{name}{half}, align {align}"
        yield f"""
      %sum{half} = {form.add} {form.sums} %all{half}, %before{half}
      %float{half} = {form.to_float.format(f"%sum{half}")}
      %by_row{half} = fmul {floats} %float{half}, %scale
      %by_column{half} = fmul {floats} %by_row{half}, %column_scales{half}
      %logit{half} = fadd {floats} %by_column{half}, %bias{half}
      %weight{half} = call nnan {floats} @llvm.maxnum.v{form.lanes}f32({floats} %logit{half}, {floats} zeroinitializer)
      %place{half} = add i64 %document_place, %column{half}
      %at_found{half} = getelementptr float, ptr %found, i64 %place{half}
      store {floats} %weight{half}, ptr %at_found{half}, align {align}
        """
