"""Linear layers in integers: of 8 bits for AVX512 VNNI, with four times the rate of float32; of 16 bits for AVX2.

In: rows in float32. Out: rows in float32. Each row has a scale of its own, and so has each column of the weight; sums
are exact. With llvmlite (compiled.py) rows are rounded and multiplied by compiled functions, in 16 bits at 1.6 times
the rate of float32 on Zen 3. Otherwise torch does it, with the same bits except the last ones of GELU; in 16 bits that
is slower than float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from sparse_ingest.models.compiled import ADDRESS, NUMBER, Compiled, compile_function, rows_in_cache, tried_or_none
from sparse_ingest.models.integer_linear_text import ROUNDINGS, Rounding, multiply_text, quantize_text
from sparse_ingest.models.integers import STEPS, exact_product, rounded_weight
from sparse_ingest.models.threads import available, on_threads

STORED = {torch.int8: torch.uint8, torch.int16: torch.int16}  # rows with their offset
# Largest differences of GELU, and of products of it: a number may be rounded to another integer.
CLOSE_GELU, CLOSE = 1e-5, 1e-2
# Bytes of what is between the products of a feed-forward layer, so that it stays in the cache: 170 rows of the 3,072
# numbers of DistilBERT, in complete blocks. There all 2,048 rows of a batch take 6% longer, and 48 rows 5%; 48 rows of
# BERT-mini take 40% longer.
BETWEEN_BYTES = 1 << 21
BLOCK = 12  # a multiple of the blocks of both roundings


class Functions(NamedTuple):
    """Compiled for one width of rows."""

    rounding: Rounding
    quantize: Compiled
    gelu_and_quantize: Compiled
    multiply: Compiled
    multiply_and_add: Compiled


class IntegerLinear:
    """`rows @ weight.T + bias + others`, with rows and weight rounded to integers."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, integers: torch.dtype, functions: Functions | None
    ) -> None:
        (self.columns, self._width), self._integers, self._functions = weight.shape, integers, functions
        self._bias = torch.zeros(self.columns, dtype=torch.float32) if bias is None else bias.contiguous()
        rounded, self._scales = rounded_weight(weight, integers)
        self._weight = rounded.T
        if functions:
            form, offset = functions.rounding.form, functions.rounding.offset
            self._panel, self._least = form.panel, functions.rounding.blocks[-1]
            # Each panel is multiplied with all rows of a piece.
            self._rows_at_once = max(1, rows_in_cache(self._width * integers.itemsize) // BLOCK) * BLOCK
            self._before = -offset * rounded.sum(1, dtype=torch.int32)
            groups = rounded.view(torch.int32)  # of 4 bytes
            self._weight = groups.view(-1, form.panel, groups.shape[1]).transpose(1, 2).contiguous()

    def __call__(
        self, rows: torch.Tensor, others: torch.Tensor | None = None, *, out: torch.Tensor | None = None,
        gelu: bool = False, alone: bool = True,
    ) -> torch.Tensor:  # fmt: skip
        """Return the products of packed rows, written to `out` if that is given.

        `gelu`: of the GELU of `rows`, which may replace them. `alone`: no other thread computes other rows. `out` must
        not be `others`: the last rows may be computed twice.
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
        if count < self._least:
            missing = (0, 0, 0, self._least - count)
            padded = None if others is None else pad(others, missing)
            return found.copy_(self(pad(rows, missing), padded, gelu=gelu)[:count])
        rows, others = rows.contiguous(), None if others is None else others.contiguous()
        rounded = torch.empty(rows.shape, dtype=STORED[self._integers])
        scales = torch.empty(count, dtype=torch.float32)
        quantize = self._functions.gelu_and_quantize if gelu else self._functions.quantize
        quantize(rows.data_ptr(), count, rounded.data_ptr(), scales.data_ptr())
        multiply = self._functions.multiply if others is None else self._functions.multiply_and_add

        def of_panels(panels: slice) -> None:
            columns = slice(panels.start * self._panel, panels.stop * self._panel)
            of_columns = [one[columns].data_ptr() for one in (self._before, self._scales, self._bias)]
            for wanted in range(0, count, self._rows_at_once):
                start = min(wanted, count - self._least)
                piece = slice(start, min(wanted + self._rows_at_once, count))
                multiply(
                    rounded[piece].data_ptr(), self._weight[panels].data_ptr(), piece.stop - start,
                    panels.stop - panels.start, self.columns, scales[piece].data_ptr(), *of_columns,
                    None if others is None else others[piece, columns].data_ptr(), found[piece, columns].data_ptr(),
                )  # fmt: skip

        on_threads(of_panels, len(self._weight), operations=2 * rows.numel() * self.columns if alone else 0)
        return found

    def _of_torch(self, rows: torch.Tensor, others: torch.Tensor | None) -> torch.Tensor:
        largest = rows.abs().amax(1, keepdim=True)
        largest, steps = torch.where(largest == 0, 1, largest), STEPS[self._integers]
        # torch computes a Python number divided by a tensor as a product with 1 / tensor, which has other last bits.
        rounded = (rows * (largest.new_tensor(steps) / largest)).round_().to(self._integers)
        sums = torch.empty(len(rows), self.columns, dtype=torch.int32)
        found = exact_product(rounded, self._weight, out=sums).to(torch.float32)
        found.mul_(largest / steps).mul_(self._scales).add_(self._bias)
        return found if others is None else found.add_(others)


def fits(weight: torch.Tensor, integers: torch.dtype) -> bool:
    """Return whether there are functions for a weight of this size. Other layers compute in float32."""
    (columns, width), rounding = weight.shape, ROUNDINGS[integers.itemsize * 8]
    return width % rounding.at_once == 0 and columns % rounding.form.panel == 0


def integer_linear(weight: torch.Tensor, bias: torch.Tensor | None, integers: torch.dtype) -> IntegerLinear:
    """Return a linear layer in int8 or int16, for a weight that `fits`."""
    return IntegerLinear(weight, bias, integers, functions_of(weight.shape[1], integers))


def feed_forward(
    up: IntegerLinear, down: IntegerLinear, gate: IntegerLinear | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from rows to `down(gelu(up(rows))) + rows`; a gate makes it `gelu(gate(rows)) * up(rows)`."""
    most = max(1, BETWEEN_BYTES // (up.columns * 4) // BLOCK)

    def compute(rows: torch.Tensor) -> torch.Tensor:
        found = torch.empty_like(rows)
        # The same number of pieces for each thread, of at most `most` blocks.
        blocks_of_thread = max(1, -(-len(rows) // (BLOCK * available())))
        pieces_of_thread = -(-blocks_of_thread // most)
        step = -(-blocks_of_thread // pieces_of_thread) * BLOCK

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
def functions_of(width: int, integers: torch.dtype) -> Functions | None:
    """Return the functions for rows of this width; None without llvmlite, or if their results differ from torch's."""
    return tried_or_none(lambda: tried_functions(width, integers), "product of integers")


def tried_functions(width: int, integers: torch.dtype) -> Functions | None:
    """Compile the functions for rows of this width. Return None if their results differ from torch's.

    llvmlite may be missing, or raise any exception.
    """
    rounding = ROUNDINGS[integers.itemsize * 8]
    feature, text = rounding.form.feature, "\n".join(quantize_text(width, rounding))
    quantize, gelu_and_quantize = (
        compile_function(text, name, ADDRESS, NUMBER, ADDRESS, ADDRESS, feature=feature)
        for name in ("quantize", "gelu_and_quantize")
    )
    given = (ADDRESS, ADDRESS, NUMBER, NUMBER, NUMBER, *[ADDRESS] * 6)
    products = (
        compile_function("\n".join(multiply_text(width, rounding, adds=adds)), "multiply", *given, feature=feature)
        for adds in (False, True)
    )
    functions = Functions(rounding, quantize, gelu_and_quantize, *products)
    return functions if _agree(functions, width, integers) else None


def _agree(functions: Functions, width: int, integers: torch.dtype) -> bool:
    """Return whether the functions and torch give the same bits for random numbers."""
    generator = torch.Generator().manual_seed(0)
    count, columns = sum(functions.rounding.blocks) + 1, 2 * functions.rounding.form.panel
    rows, weight, bias, others = (
        torch.randn(size, generator=generator, dtype=torch.float32)
        for size in ((count, width), (columns, width), (columns,), (count, columns))
    )
    rows[0] = 0
    fast, plain = (IntegerLinear(weight, bias, integers, one) for one in (functions, None))
    if not all(torch.equal(fast(rows, one), plain(rows, one)) for one in (None, others)):
        return False
    replaced, expected_rows = rows.clone(), rows.clone()
    found, expected = fast(replaced, gelu=True), plain(expected_rows, gelu=True)
    far, far_rows = (found - expected).abs().amax(), (replaced - expected_rows).abs().amax()
    return bool(far_rows <= CLOSE_GELU and far <= CLOSE * expected.abs().amax())
