"""Rounding to integers of 8 or 16 bits, whose products are summed exactly in 32 bits.

A number is an integer times a scale. Rows (hidden states) reach `STEPS` on each side of zero. Weights have as many bits
as the sums allow: 8, or about 12 of 16.
"""

from __future__ import annotations

import math

import torch

from sparse_ingest.models.integer_linear_text import ROUNDINGS

STEPS = {torch.int8: ROUNDINGS[8].steps, torch.int16: ROUNDINGS[16].steps}
MOST = {torch.int8: 127, torch.int16: 32767}  # of a weight
SUMS = 0.999 * 2**31  # largest size of a sum, less what float32 loses in the sums of weights


def scale_of(largest: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the step with which integers reach the largest value; 1 if all values are zero."""
    return torch.where(largest > 0, largest / steps, torch.ones_like(largest))


def rounded_weight(weight: torch.Tensor, integers: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight `[columns, width]` in integers, and the scale of each column."""
    weight = weight.to(torch.float32).contiguous()  # a file may have other strides
    largest, total = (torch.linalg.vector_norm(weight, order, dim=1) for order in (math.inf, 1))
    # Rounding adds at most half a step to each weight of a column.
    most = SUMS / STEPS[integers] - weight.shape[1] / 2
    scales = torch.maximum(scale_of(largest, MOST[integers]), total / most)
    return (weight / scales.unsqueeze(1)).round_().to(integers), scales


def exact_product(rows: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Write the product of rows and a weight `[width, columns]` to `out`, in int32, with torch. Return `out`."""
    if rows.dtype == torch.int8:
        return torch._int_mm(rows, weight, out=out)
    return out.copy_(rows.double() @ weight.double())  # torch has no product of int16
