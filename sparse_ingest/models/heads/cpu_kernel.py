"""The vocabulary projection and the maximum over each document's tokens as one kernel, compiled here for CPUs.

In: packed hidden states in int8, int16, bfloat16 or float32. Out: weights before the logarithm. Without llvmlite
(compiled.py) or the instructions other heads compute the same (selection.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch.nn.functional import pad

from sparse_ingest.models.compiled import ADDRESS, NUMBER, Compiled, compile_function, rows_in_cache
from sparse_ingest.models.heads.cpu_kernel_text import FORMS, TILE_BYTES, kernel_text
from sparse_ingest.models.linear import KERNEL_DTYPES, fastest_instructions
from sparse_ingest.models.packing import Packing
from sparse_ingest.models.threads import available

# Bytes of a row up to which a kernel is faster than torch's product, by dtype and instructions; others always are. With
# wider rows of bfloat16 a panel does not fit the cache that two threads of an AMX core share (speed relative to torch
# in a prototype: 0.9 at 768 wide, 1.2 at 256, 1.9 at 128). float32 with AVX512: 1.6 at 128 wide, 1.2 at 256, 1.0 at
# 512; with AVX2: 1.05 at 768 wide, 0.95 at 1024.
MOST_BYTES = {("bfloat16", "amx"): 1024, ("float32", "avx512"): 1536, ("float32", "avx2"): 3072}
PARTS_OF_THREAD = 2  # so that threads end at about the same time


class Kernel:
    """`relu(max over a document's rows of rows @ weight.T * scale of the document * scale of the column + bias)`.

    `weight` is `[vocabulary, width]` in int8, int16, bfloat16 or float32; the scales of columns and `bias` are
    `[vocabulary]` in float32. Sums of integers are exact; other sums are float32, in the order of the instructions.
    """

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor, scales: torch.Tensor | None = None, *, instructions: str
    ) -> None:
        self.name = f"compiled for {instructions}, by llvmlite"
        self._columns, self._width, self._dtype = len(bias), weight.shape[1], weight.dtype
        form = FORMS[KERNEL_DTYPES[self._dtype], instructions]
        self._least, self._panel = form.blocks[-1], form.panel
        missing, weight = -self._columns % self._panel, _full_tiles(weight).contiguous()
        groups = weight.view(torch.int32)  # of 4 bytes
        full, rest = divmod(self._columns, self._panel)
        self._panels = full + bool(rest)
        # Without a padded copy of the weight: it may have a gigabyte.
        self._weight = torch.zeros(self._panels, groups.shape[1], self._panel, dtype=torch.int32)
        whole = groups[: full * self._panel].view(full, self._panel, groups.shape[1])
        self._weight[:full] = whole.transpose(1, 2)
        self._weight[full:, :, :rest] = groups[full * self._panel :].T
        # One 8-bit factor must be unsigned, so 128 is added to the rows and subtracted here.
        before = torch.zeros_like(bias, dtype=torch.float32 if weight.dtype.is_floating_point else torch.int32)
        if weight.dtype == torch.int8:
            before = -128 * weight.sum(1, dtype=torch.int32)
        self._before = pad(before, (0, missing))
        self._scales = pad(torch.ones_like(bias, dtype=torch.float32) if scales is None else scales, (0, missing))
        self._bias = pad(bias.to(torch.float32), (0, missing))
        row_bytes = weight.shape[1] * weight.itemsize
        # Documents are computed in groups, as each panel is multiplied with all rows of a group. In float32 encoding is
        # 5% faster with AVX512 at 256 wide, and as fast at 128. CPUs that need int16 have smaller caches; rows of the
        # other dtypes are short.
        self._rows_at_once = rows_in_cache(row_bytes) if weight.dtype in (torch.float32, torch.int16) else None
        text = kernel_text(form, row_bytes)
        self._maxima = compile_kernel(text, form.feature)

    def __call__(self, rows: torch.Tensor, packing: Packing, scales: torch.Tensor | None = None) -> torch.Tensor:
        """Return weights before the logarithm of packed rows in the weight's dtype; `scales` is `[documents]`."""
        # The kernel gets addresses, and cannot check shapes.
        if rows.dtype != self._dtype or rows.shape != (sum(packing.lengths), self._width):
            raise TypeError(
                f"Hidden states are {rows.dtype} of {tuple(rows.shape)}; expected {self._dtype} of "
                f"{sum(packing.lengths), self._width}. The model changes its dtype: pass --dtype float32."
            )
        index, starts = packing.at_least(self._least)
        rows = _full_tiles(rows if index is None else rows[index])
        if rows.dtype == torch.int8:
            rows = rows.view(torch.uint8) ^ 128
        rows = rows.contiguous()
        # The default dtype is of the process: another thread may set it, as transformers does while it loads a model.
        scales = torch.ones(len(packing.lengths), dtype=torch.float32) if scales is None else scales.contiguous()
        threads = available()
        parts = min(PARTS_OF_THREAD * threads, self._panels) if threads > 1 else 1
        if parts == 1:
            return self._of_panels(slice(0, self._panels), rows, starts, scales)[:, : self._columns]
        borders = [self._panels * number // parts for number in range(parts + 1)]
        with ThreadPoolExecutor(threads) as pool:
            found = pool.map(lambda part: self._of_panels(part, rows, starts, scales), map(slice, borders, borders[1:]))
            return torch.cat(list(found), dim=1)[:, : self._columns]

    def _of_panels(self, panels: slice, rows: torch.Tensor, starts: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Return the weights of adjacent panels."""
        columns = slice(panels.start * self._panel, panels.stop * self._panel)
        found = torch.empty(len(scales), columns.stop - columns.start, dtype=torch.float32)
        before, of_columns, bias = self._before[columns], self._scales[columns], self._bias[columns]
        for group in self._groups(starts):
            addresses = (tensor.data_ptr() for tensor in (before, scales[group], of_columns, bias, found[group]))
            self._maxima(
                rows.data_ptr(), self._weight[panels].data_ptr(), starts[group].data_ptr(), group.stop - group.start,
                panels.stop - panels.start, *addresses,
            )  # fmt: skip
        return found

    def _groups(self, starts: torch.Tensor) -> Iterator[slice]:
        """Yield the documents that are computed together; `starts` has their first rows and the number of all rows."""
        documents, first = len(starts) - 1, 0
        while first < documents:
            behind = documents
            if self._rows_at_once is not None:
                border = starts[first] + self._rows_at_once
                behind = max(first + 1, int(torch.searchsorted(starts, border, right=True)) - 1)
            yield slice(first, behind)
            first = behind


def instructions_for(dtype: torch.dtype, width: int) -> str | None:
    """Return the instructions of this CPU for the fastest kernel of a dtype, or None if no kernel is faster."""
    instructions = fastest_instructions(dtype)
    most = MOST_BYTES.get((KERNEL_DTYPES.get(dtype, ""), instructions or ""), math.inf)
    return instructions if width * dtype.itemsize <= most else None


def compile_kernel(text: str, feature: str | None = None) -> Compiled:
    """Compile a module that needs a feature of this CPU, and return its function `maxima`; see `compile_function`."""
    return compile_function(text, "maxima", *[ADDRESS] * 3, *[NUMBER] * 2, *[ADDRESS] * 5, feature=feature)


def _full_tiles(rows: torch.Tensor) -> torch.Tensor:
    """Pad rows with zeros to a multiple of a tile's row."""
    missing = -rows.shape[1] % (TILE_BYTES // rows.itemsize)
    return pad(rows, (0, missing)) if missing else rows
