"""Linear layers in integers as LLVM IR; integer_linear.py compiles them.

    quantize: found[row] = round(row / scale[row]) + offset, with scale[row] = largest size of a number / steps;
              `gelu_and_quantize` first replaces each number of the row by its GELU
    multiply: found[row, column] = (row . column + before[column]) * row_scales[row] * column_scales[column]
                                   + bias[column] + others[row, column]

heads/cpu_kernel_text.py explains how to read the text, and has the products of a block of rows with a panel of columns.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from sparse_ingest.models.heads.cpu_kernel_text import FORMS, HALVES, LANES, SHARED, Form, vector_products
from sparse_ingest.models.vector_text import (
    FLOATS,
    FUNCTIONS,
    NUMBERS,
    ROUNDS,
    constant,
    polynomial,
    power_of_two,
    spread,
)

BYTES = 4  # of a float
(ROUNDS_BITS,) = struct.unpack("i", struct.pack("f", ROUNDS))
# erf(x) = 1 - t * (1st + 2nd * t + ...) * exp(-x ** 2) for x >= 0, with t = 1 / (1 + ERF * x), up to 1.5e-7: Abramowitz
# and Stegun, Handbook of Mathematical Functions, 7.1.26.
ERF = 0.3275911
ERF_TERMS = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)


@dataclass(frozen=True)
class Rounding:
    """Integers of one size, and the products of the CPUs that multiply them."""

    form: Form
    bits: int
    steps: int  # of a row on each side of zero
    offset: int  # added to a row

    @property
    def blocks(self) -> tuple[int, int]:
        """Rows of a block, most and least."""
        return self.form.blocks[0], self.form.blocks[-1]

    @property
    def ways(self) -> range:
        """Vectors of 16 numbers in one round of a loop over a row: as many as there are registers for."""
        return range(self.form.lanes // 4)

    @property
    def at_once(self) -> int:
        """The numbers of these vectors."""
        return len(self.ways) * LANES


# VPDPBUSD needs an unsigned factor, so rows of 8 bits get an offset. Rows of 16 bits use 13, or sums would overflow.
ROUNDINGS = {8: Rounding(FORMS["int8", "avx512"], 8, 127, 128), 16: Rounding(FORMS["int16", "avx2"], 16, 4095, 0)}


def quantize_text(width: int, rounding: Rounding) -> Iterator[str]:
    """Yield a module with both functions for rows of `width` numbers, a multiple of `rounding.at_once`."""
    yield f"""
    declare {FLOATS} @llvm.fabs.v16f32({FLOATS})
    declare {FLOATS} @llvm.maxnum.v16f32({FLOATS}, {FLOATS})
    declare float @llvm.vector.reduce.fmax.v16f32({FLOATS})
    declare float @llvm.vector.reduce.fadd.v16f32(float, {FLOATS})
    {FUNCTIONS}
    {SHARED}
    """
    for gelu in (False, True):
        yield from _quantize(width, rounding, gelu=gelu)


def _quantize(width: int, rounding: Rounding, *, gelu: bool) -> Iterator[str]:
    yield f"""
    define void @{"gelu_and_quantize" if gelu else "quantize"}(ptr %rows, i64 %count, ptr %found, ptr %scales) #0 {{
    entry:
      br label %row
    row:
      %at_row = phi i64 [ 0, %entry ], [ %next_row, %row_end ]
      %skip = mul i64 %at_row, {width * BYTES}
      %own = getelementptr i8, ptr %rows, i64 %skip
      %found_skip = mul i64 %at_row, {width * rounding.bits // 8}
      %found_row = getelementptr i8, ptr %found, i64 %found_skip
      %at_scale = getelementptr float, ptr %scales, i64 %at_row
      br label %look
    """
    yield from _scale(width, rounding, gelu=gelu)
    yield from _steps(width, rounding)
    yield """
    row_end:
      %next_row = add i64 %at_row, 1
      %more_rows = icmp ult i64 %next_row, %count
      br i1 %more_rows, label %row, label %done
    done:
      ret void
    }
    """


def _scale(width: int, rounding: Rounding, *, gelu: bool) -> Iterator[str]:
    """Yield the code of a row's scale, and of `%inverses`, one over it.

    The scale is NaN if a number is not finite: a maximum would hide it, its product with zero does not.
    """
    yield "look:\n  %seen = phi i64 [ 0, %row ], [ %next_seen, %look ]"
    for name, after in (("top", "higher"), ("zero", "zeros")):
        for way in rounding.ways:
            yield f"  %{name}{way} = phi {FLOATS} [ zeroinitializer, %row ], [ %{after}{way}, %look ]"
    for way in rounding.ways:
        yield f"""
      %seen{way} = add i64 %seen, {way * LANES}
      %at_seen{way} = getelementptr float, ptr %own, i64 %seen{way}
      %{"before" if gelu else "look"}{way} = load {FLOATS}, ptr %at_seen{way}, align {BYTES}
        """
        if gelu:
            yield from _gelu(way)
            yield f"  store {FLOATS} %look{way}, ptr %at_seen{way}, align {BYTES}"
        yield f"""
      %size{way} = call {FLOATS} @llvm.fabs.v16f32({FLOATS} %look{way})
      %higher{way} = call {FLOATS} @llvm.maxnum.v16f32({FLOATS} %top{way}, {FLOATS} %size{way})
      %zeros{way} = call {FLOATS} @llvm.fma.v16f32({FLOATS} %look{way}, {FLOATS} zeroinitializer, {FLOATS} %zero{way})
        """
    yield f"""
      %next_seen = add i64 %seen, {rounding.at_once}
      %more_seen = icmp ult i64 %next_seen, {width}
      br i1 %more_seen, label %look, label %looked
    looked:
    """
    top, zeros = "%higher0", "%zeros0"
    for way in rounding.ways[1:]:
        yield f"  %top.{way} = call {FLOATS} @llvm.maxnum.v16f32({FLOATS} {top}, {FLOATS} %higher{way})"
        yield f"  %zeros.{way} = fadd {FLOATS} {zeros}, %zeros{way}"
        top, zeros = f"%top.{way}", f"%zeros.{way}"
    yield f"""
      %largest = call float @llvm.vector.reduce.fmax.v16f32({FLOATS} {top})
      %zero = call reassoc float @llvm.vector.reduce.fadd.v16f32(float 0.0, {FLOATS} {zeros})
      %is_empty = fcmp oeq float %largest, 0.0
      %divisor = select i1 %is_empty, float 1.0, float %largest
      %step = fdiv float %divisor, {rounding.steps}.0
      %scale = fadd float %step, %zero
      store float %scale, ptr %at_scale
      %inverse = fdiv float {rounding.steps}.0, %divisor
      {spread("inverses", "%inverse")}
      br label %write
    """


def _gelu(way: int) -> Iterator[str]:
    """Yield the code of `%look<way>`, the GELU of `%before<way>`: `x * (1 + erf(x / sqrt(2))) / 2`."""
    yield f"""
      %distance{way} = call {FLOATS} @llvm.fabs.v16f32({FLOATS} %before{way})
      %below{way} = call {FLOATS} @llvm.fma.v16f32({FLOATS} %distance{way}, {FLOATS} {constant(ERF / math.sqrt(2))},
                                                   {FLOATS} {constant(1)})
      %t{way} = fdiv {FLOATS} {constant(1)}, %below{way}
      %square{way} = fmul {FLOATS} %before{way}, %before{way}
      %exponent{way} = fmul {FLOATS} %square{way}, {constant(-math.log2(math.e) / 2)}
    """
    yield from power_of_two(f"power{way}", f"%exponent{way}", BYTES)
    yield from polynomial(f"series{way}", f"%t{way}", [term / 2 for term in ERF_TERMS])
    yield f"""
      %tail{way} = fmul {FLOATS} %series{way}, %t{way}
      %share{way} = fmul {FLOATS} %tail{way}, %power{way}
      ; the normal distribution is `share` below zero, and 1 - `share` above
      %is_positive{way} = fcmp ogt {FLOATS} %before{way}, zeroinitializer
      %above{way} = fsub {FLOATS} {constant(1)}, %share{way}
      %normal{way} = select <{LANES} x i1> %is_positive{way}, {FLOATS} %above{way}, {FLOATS} %share{way}
      %look{way} = fmul {FLOATS} %before{way}, %normal{way}
    """


def _steps(width: int, rounding: Rounding) -> Iterator[str]:
    """Yield the code that writes the integers of a row."""
    short = f"<{LANES} x i{rounding.bits}>"
    yield "write:\n  %at = phi i64 [ 0, %looked ], [ %next, %write ]"
    for way in rounding.ways:
        yield f"""
      %at{way} = add i64 %at, {way * LANES}
      %at_number{way} = getelementptr float, ptr %own, i64 %at{way}
      %number{way} = load {FLOATS}, ptr %at_number{way}, align {BYTES}
      %steps{way} = fmul {FLOATS} %number{way}, %inverses
      %rounded{way} = fadd {FLOATS} %steps{way}, {constant(ROUNDS)}
      %bits{way} = bitcast {FLOATS} %rounded{way} to {NUMBERS}
      %integer{way} = add {NUMBERS} %bits{way}, splat (i32 {rounding.offset - ROUNDS_BITS})
      %short{way} = trunc {NUMBERS} %integer{way} to {short}
      %at_found{way} = getelementptr i{rounding.bits}, ptr %found_row, i64 %at{way}
      store {short} %short{way}, ptr %at_found{way}, align 1
        """
    yield f"""
      %next = add i64 %at, {rounding.at_once}
      %more = icmp ult i64 %next, {width}
      br i1 %more, label %write, label %row_end
    """


def multiply_text(width: int, rounding: Rounding, *, adds: bool) -> Iterator[str]:
    """Yield a module with the function `multiply` for rows of `width` integers; `adds`: it adds `others`."""
    form, row_bytes = rounding.form, width * rounding.bits // 8
    yield f"""
    {form.declaration}
    {SHARED}
    """
    for rows in rounding.blocks:
        yield f"""
    define internal void @block{rows}(ptr %rows, ptr %panel, ptr %scales, ptr %before, ptr %column_scales, ptr %bias,
                                      ptr %others, ptr %found, i64 %row_bytes) noinline #0 {{
        """
        yield from vector_products(form, rows, row_bytes)
        yield from _scaled(form, rows, adds=adds)
        yield "  ret void\n}"
    yield from _multiply(rounding, row_bytes)


def _scaled(form: Form, rows: int, *, adds: bool) -> Iterator[str]:
    """Yield the code that scales the sums of a block, adds the bias and the others, and writes them."""
    floats, half_bytes = f"<{form.lanes} x float>", form.lanes * BYTES
    for half in HALVES:
        for name, kind in (("before", form.sums), ("column_scales", floats), ("bias", floats)):
            yield f"  %at_{name}{half} = getelementptr i8, ptr %{name}, i64 {half * half_bytes}"
            yield f"  %{name}{half} = load {kind}, ptr %at_{name}{half}, align {BYTES}"
    for row in range(rows):
        yield f"""
      %at_scale{row} = getelementptr float, ptr %scales, i64 {row}
      %scale{row} = load float, ptr %at_scale{row}
      {spread(f"scales{row}", f"%scale{row}", lanes=form.lanes)}
      %row_skip{row} = mul i64 %row_bytes, {row}
        """
        for half in HALVES:
            name = f"{row}.{half}"
            yield f"""
      %skip{name} = add i64 %row_skip{row}, {half * half_bytes}
      %sum{name}.all = add {form.sums} %added{name}, %before{half}
      %float{name} = {form.to_float.format(f"%sum{name}.all")}
      %by_row{name} = fmul {floats} %float{name}, %scales{row}
      %by_column{name} = fmul {floats} %by_row{name}, %column_scales{half}
      %product{name} = fadd {floats} %by_column{name}, %bias{half}
      %at_found{name} = getelementptr i8, ptr %found, i64 %skip{name}
            """
            result = f"%product{name}"
            if adds:
                result = f"%result{name}"
                yield f"""
      %at_other{name} = getelementptr i8, ptr %others, i64 %skip{name}
      %other{name} = load {floats}, ptr %at_other{name}, align {BYTES}
      {result} = fadd {floats} %product{name}, %other{name}
                """
            yield f"  store {floats} {result}, ptr %at_found{name}, align {BYTES}"


def _multiply(rounding: Rounding, row_bytes: int) -> Iterator[str]:
    """Yield the loops over panels and blocks of rows. The last block ends with the rows, and may repeat some."""
    panel, blocks = rounding.form.panel, rounding.blocks
    yield f"""
    define void @multiply(ptr %rows, ptr %weight, i64 %count, i64 %panels, i64 %columns, ptr %row_scales,
                          ptr %before, ptr %column_scales, ptr %bias, ptr %others, ptr %found) #0 {{
    entry:
      %row_bytes = mul i64 %columns, {BYTES}
      br label %panel
    panel:
      %at_panel = phi i64 [ 0, %entry ], [ %next_panel, %panel_end ]
      %panel_skip = mul i64 %at_panel, {row_bytes * panel}
      %panel_weight = getelementptr i8, ptr %weight, i64 %panel_skip
      %column_skip = mul i64 %at_panel, {panel * BYTES}
    """
    for name in ("before", "column_scales", "bias", "others", "found"):
        yield f"  %{name}_panel = getelementptr i8, ptr %{name}, i64 %column_skip"
    yield "  br label %try0"
    before, at = "panel", "0"
    for place, rows in enumerate(blocks):
        yield f"""
    try{place}:
      %row{place} = phi i64 [ {at}, %{before} ], [ %behind{place}, %do{place} ]
      %behind{place} = add i64 %row{place}, {rows}
      %fits{place} = icmp sle i64 %behind{place}, %count
      br i1 %fits{place}, label %do{place}, label %{f"try{place + 1}" if place + 1 < len(blocks) else "left"}
    do{place}:
      {_call(str(place), f"%row{place}", rows, row_bytes)}
      br label %try{place}
        """
        before, at = f"try{place}", f"%row{place}"
    yield f"""
    left:
      %is_left = icmp slt i64 {at}, %count
      br i1 %is_left, label %last, label %panel_end
    last:
      %last_row = sub i64 %count, {blocks[-1]}
      {_call("last", "%last_row", blocks[-1], row_bytes)}
      br label %panel_end
    panel_end:
      %next_panel = add i64 %at_panel, 1
      %more = icmp ult i64 %next_panel, %panels
      br i1 %more, label %panel, label %done
    done:
      ret void
    }}
    """


def _call(name: str, row: str, rows: int, row_bytes: int) -> str:
    """Return the code of a block from a row on."""
    return f"""
      %skip{name} = mul i64 {row}, {row_bytes}
      %rows{name} = getelementptr i8, ptr %rows, i64 %skip{name}
      %scales{name} = getelementptr float, ptr %row_scales, i64 {row}
      %found_skip{name} = mul i64 {row}, %row_bytes
      %others{name} = getelementptr i8, ptr %others_panel, i64 %found_skip{name}
      %found{name} = getelementptr i8, ptr %found_panel, i64 %found_skip{name}
      call void @block{rows}(ptr %rows{name}, ptr %panel_weight, ptr %scales{name}, ptr %before_panel,
                             ptr %column_scales_panel, ptr %bias_panel, ptr %others{name}, ptr %found{name},
                             i64 %row_bytes)
    """
