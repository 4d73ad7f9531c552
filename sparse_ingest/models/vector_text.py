"""Parts of LLVM IR that compiled functions share: vectors of 16 numbers, one register of AVX512 or two of AVX2."""

from __future__ import annotations

import math
import struct
from collections.abc import Generator, Iterator, Sequence

from sparse_ingest.models.heads.cpu_kernel_text import LANES

FLOATS, NUMBERS = f"<{LANES} x float>", f"<{LANES} x i32>"
# Interleaves the lanes of two vectors.
BOTH = [lane for pair in zip(range(LANES), range(LANES, 2 * LANES), strict=True) for lane in pair]
# A float32 of this size has a last bit of 1, so what is added to it is rounded to an integer, half to even.
ROUNDS = 3 << 22
# Of the Taylor series of 2**x for |x| <= 1/2, by the bytes of a number: the error is below 3e-6 and 1e-8.
TERMS = {2: 6, 4: 8}
# What `power_of_two` and `polynomial` call.
FUNCTIONS = f"""
    declare {FLOATS} @llvm.fma.v16f32({FLOATS}, {FLOATS}, {FLOATS})
"""


def constant(number: float) -> str:
    """Return a vector of one float32 in every lane."""
    (rounded,) = struct.unpack("f", struct.pack("f", number))
    return f"splat (float 0x{struct.unpack('Q', struct.pack('d', rounded))[0]:016X})"


def spread(name: str, value: str, kind: str = "float", *, lanes: int = LANES) -> str:
    """Return the code of `%<name>`, a vector with a value in every lane."""
    vector = f"<{lanes} x {kind}>"
    return f"""
      %{name}.lane = insertelement {vector} poison, {kind} {value}, i32 0
      %{name} = shufflevector {vector} %{name}.lane, {vector} poison, <{lanes} x i32> zeroinitializer
    """


def polynomial(name: str, x: str, factors: Sequence[float]) -> Iterator[str]:
    """Yield the code of `%<name>`: the first factor, plus the second times x, plus the third times x ** 2, ..."""
    series = constant(factors[-1])
    for power in range(len(factors) - 2, -1, -1):
        given = ", ".join(f"{FLOATS} {one}" for one in (series, x, constant(factors[power])))
        series = f"%{name}.{power}" if power else f"%{name}"
        yield f"  {series} = call {FLOATS} @llvm.fma.v16f32({given})"


def power_of_two(name: str, exponent: str, size: int) -> Iterator[str]:
    """Yield the code of `%<name>`: a series for the fraction of the exponent, times a power of two.

    `size`: the bytes of a number to which it will be rounded. The exponent must be below 128; the result is 0 below
    -126.5, and NaN for NaN.
    """
    # The last bits of the large number are the integer plus the bias of float32: shifted to the exponent, where
    # those of -127 are 0, which stands for the number 0.
    lowest, large = constant(-127), constant(ROUNDS + 127)
    yield f"""
      %{name}.is_low = fcmp ogt {FLOATS} {lowest}, {exponent}
      %{name}.exponent = select <{LANES} x i1> %{name}.is_low, {FLOATS} {lowest}, {FLOATS} {exponent}
      %{name}.large = fadd {FLOATS} %{name}.exponent, {large}
      %{name}.rounded = fsub {FLOATS} %{name}.large, {large}
      %{name}.fraction = fsub {FLOATS} %{name}.exponent, %{name}.rounded
      %{name}.biased = bitcast {FLOATS} %{name}.large to {NUMBERS}
      %{name}.bits = shl {NUMBERS} %{name}.biased, splat (i32 23)
      %{name}.power = bitcast {NUMBERS} %{name}.bits to {FLOATS}
    """
    factors = [math.log(2) ** term / math.factorial(term) for term in range(TERMS[size])]
    yield from polynomial(f"{name}.series", f"%{name}.fraction", factors)
    yield f"  %{name} = fmul {FLOATS} %{name}.series, %{name}.power"


def transposed(prefix: str, kind: str, rows: list[str]) -> Generator[str, None, list[str]]:
    """Yield the code that transposes 16 vectors of 16 lanes, and return their names: row r, lane l to row l, lane r.

    Each round transposes blocks of half the size, so blocks beside the diagonal change places. Each of its shuffles is
    one instruction or two, of AVX2 too.
    """
    lanes = range(LANES)
    for size in (8, 4, 2, 1):
        upper = [lane - size + LANES if lane & size else lane for lane in lanes]
        lower = [lane + LANES if lane & size else lane + size for lane in lanes]
        names = [f"%{prefix}.{size}.{row}" for row in lanes]
        for row in lanes:
            first = row & ~size
            yield shuffle(names[row], kind, rows[first], rows[first + size], lower if row & size else upper)
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
      %more = icmp slt i64 %behind, {limit}
      br i1 %more, label %next, label %end
    end:
    {"".join(then)}
      ret void
    }}
    """
