"""Linear layers in 8-bit integers, for CPUs with AVX512 VNNI: twice the rate of bfloat16, four times that of float32.

In: rows in float32. Out: rows in float32. Each row has a scale of its own, and so has each column of the weight; sums
are exact. With llvmlite (compiled.py) rows are rounded and multiplied by compiled functions, otherwise by torch, which
is slower and returns the same bits, except that the last bits of GELU differ.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sparse_ingest.models.compiled import ADDRESS, NUMBER, Compiled, compile_function, tried_or_none
from sparse_ingest.models.int8_linear_text import BLOCKS, FORM, NUMBERS_AT_ONCE, STEPS, multiply_text, quantize_text
from sparse_ingest.models.threads import on_threads

TRIED = (sum(BLOCKS) + 1, 2 * FORM.panel)  # rows and columns in the trial
# Largest differences of GELU, and of products of it: a number may be rounded to another integer.
CLOSE_GELU, CLOSE = 1e-5, 1e-2
# Bytes of what is between the products of a feed-forward layer, so that it stays in the cache: 170 rows of the 3,072
# numbers of DistilBERT, in complete blocks. There all 2,048 rows of a batch take 6% longer, and 48 rows 5%; 48 rows of
# BERT-mini take 40% longer.
BETWEEN_BYTES = 1 << 21


class Functions(NamedTuple):
    """Compiled for one width of rows."""

    quantize: Compiled
    gelu_and_quantize: Compiled
    multiply: Compiled
    multiply_and_add: Compiled


class Int8Linear:
    """`rows @ weight.T + bias + others`, with rows and weight rounded to 8-bit integers."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, functions: Functions | None) -> None:
        (self.columns, self._width), self._functions = weight.shape, functions
        weight = weight.to(torch.float32).contiguous()  # a file may have other strides
        self._scales = scale_of(weight.abs().amax(1))
        self._bias = torch.zeros(self.columns, dtype=torch.float32) if bias is None else bias.contiguous()
        rounded = (weight / self._scales.unsqueeze(1)).round_().to(torch.int8)
        # One factor must be unsigned, so 128 is added to the rows and subtracted here.
        self._before = -128 * rounded.sum(1, dtype=torch.int32)
        panels = rounded.view(torch.int32).view(-1, FORM.panel, weight.shape[1] // 4) if functions else None
        self._weight = rounded.T if panels is None else panels.transpose(1, 2).contiguous()

    def __call__(
        self, rows: torch.Tensor, others: torch.Tensor | None = None, *, out: torch.Tensor | None = None,
        gelu: bool = False, alone: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """Return the products of packed rows, written to `out` if that is given.

        `gelu`: of the GELU of `rows`, which may replace them. `alone`: no other thread computes other rows.
        """
        count = len(rows)
        found = torch.empty(count, self.columns, dtype=torch.float32) if out is None else out
        # The functions get addresses, and cannot check shapes.
        for given, columns in ((rows, self._width), (others, self.columns), (found, self.columns)):
            if given is not None and (given.dtype != torch.float32 or given.shape != (count, columns)):
                raise RuntimeError(f"{given.dtype} of {tuple(given.shape)}; expected float32 of {count, columns}")
        if not found.is_contiguous():
            raise RuntimeError("out is not contiguous")
        if self._functions is None:
            return found.copy_(self._of_torch(torch.ops.aten.gelu_(rows) if gelu else rows, others))
        if count < BLOCKS[-1]:
            missing = (0, 0, 0, BLOCKS[-1] - count)
            padded = None if others is None else pad(others, missing)
            return found.copy_(self(pad(rows, missing), padded, gelu=gelu)[:count])
        rows, others = rows.contiguous(), None if others is None else others.contiguous()
        integers, scales = torch.empty(rows.shape, dtype=torch.uint8), torch.empty(count, dtype=torch.float32)
        quantize = self._functions.gelu_and_quantize if gelu else self._functions.quantize
        quantize(rows.data_ptr(), count, integers.data_ptr(), scales.data_ptr())
        multiply = self._functions.multiply if others is None else self._functions.multiply_and_add

        def of_panels(panels: slice) -> None:
            columns = slice(panels.start * FORM.panel, panels.stop * FORM.panel)
            of_columns = (one[columns].data_ptr() for one in (self._before, self._scales, self._bias))
            multiply(
                integers.data_ptr(), self._weight[panels].data_ptr(), count, panels.stop - panels.start, self.columns,
                scales.data_ptr(), *of_columns, None if others is None else others[:, columns].data_ptr(),
                found[:, columns].data_ptr(),
            )  # fmt: skip

        on_threads(of_panels, len(self._weight), operations=2 * rows.numel() * self.columns if alone else 0)
        return found

    def _of_torch(self, rows: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
        largest = rows.abs().amax(1, keepdim=True)
        largest = torch.where(largest == 0, 1, largest)
        integers = (rows * (STEPS / largest)).round_().to(torch.int8)
        found = torch._int_mm(integers, self._weight).to(torch.float32)
        found.mul_(largest / STEPS).mul_(self._scales).add_(self._bias)
        return found if others is None else found.add_(others)


def scale_of(largest: torch.Tensor) -> torch.Tensor:
    """Return the step with which integers reach the largest value; 1 if all values are zero."""
    return torch.where(largest > 0, largest / STEPS, torch.ones_like(largest))


def int8_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
    """Return a linear layer in integers, with compiled functions if there are any for its sizes."""
    columns, width = weight.shape
    fits = width % NUMBERS_AT_ONCE == 0 and columns % FORM.panel == 0
    return Int8Linear(weight, bias, functions_of(width) if fits else None)


def feed_forward(
    up: Int8Linear, down: Int8Linear, gate: Int8Linear | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from rows to `down(gelu(up(rows))) + rows`; a gate makes it `gelu(gate(rows)) * up(rows)`."""
    step = max(1, BETWEEN_BYTES // (up.columns * 4) // BLOCKS[0]) * BLOCKS[0]

    def compute(rows: torch.Tensor) -> torch.Tensor:
        found = torch.empty_like(rows)

        def of_pieces(pieces: slice) -> None:
            for start in range(pieces.start * step, min(pieces.stop * step, len(rows)), step):
                piece = rows[start : start + step]
                raised = up(piece, alone=False)
                if gate:
                    raised.mul_(torch.ops.aten.gelu_(gate(piece, alone=False)))
                down(raised, piece, out=found[start : start + step], gelu=gate is None, alone=False)

        on_threads(of_pieces, -(-len(rows) // step), operations=4 * rows.numel() * up.columns)
        return found

    return compute


@cache
def functions_of(width: int) -> Functions | None:
    """Return the functions for rows of this width; None without llvmlite, or if their results differ from torch's."""
    return tried_or_none(lambda: tried_functions(width), "int8 product")


def tried_functions(width: int) -> Functions | None:
    """Compile the functions for rows of this width. Return None if their results differ from torch's.

    llvmlite may be missing, or raise any exception.
    """
    text = "\n".join(quantize_text(width))
    rounding = (
        compile_function(text, name, ADDRESS, NUMBER, ADDRESS, ADDRESS, feature="avx512f")
        for name in ("quantize", "gelu_and_quantize")
    )
    given = (ADDRESS, ADDRESS, NUMBER, NUMBER, NUMBER, *[ADDRESS] * 6)
    products = (
        compile_function("\n".join(multiply_text(width, adds=adds)), "multiply", *given, feature=FORM.feature)
        for adds in (False, True)
    )
    functions = Functions(*rounding, *products)
    return functions if _agree(functions, width) else None


def _agree(functions: Functions, width: int) -> bool:
    """Return whether the functions and torch give the same bits for random numbers."""
    generator = torch.Generator().manual_seed(0)
    count, columns = TRIED
    rows, weight, bias, others = (
        torch.randn(size, generator=generator, dtype=torch.float32)
        for size in ((count, width), (columns, width), (columns,), (count, columns))
    )
    rows[0] = 0
    fast, plain = Int8Linear(weight, bias, functions), Int8Linear(weight, bias, None)
    if not all(torch.equal(fast(rows, one), plain(rows, one)) for one in (None, others)):
        return False
    replaced, expected_rows = rows.clone(), rows.clone()
    found, expected = fast(replaced, gelu=True), plain(expected_rows, gelu=True)
    far, far_rows = (found - expected).abs().amax(), (replaced - expected_rows).abs().amax()
    return bool(far_rows <= CLOSE_GELU and far <= CLOSE * expected.abs().amax())
