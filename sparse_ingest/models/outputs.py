"""The output of a model: from hidden states to the weights of a vector, and the name of each of its columns.

In: a side of a checkpoint, and its model on a device. Out: a head, which computes `[documents, columns]`. Which head it
is depends on the class of the side alone (checkpoints/sides.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from sparse_ingest.checkpoints.sides import ModelSide
from sparse_ingest.models.body import Body
from sparse_ingest.models.heads.selection import build_head, lacks_kernel
from sparse_ingest.models.heads.tiles import Head
from sparse_ingest.models.tokenizer import Tokenizer


class Output(NamedTuple):
    """A head, the string of each of its columns (None: no index can store it), and columns that never have a weight.

    `lacks_kernel`: it would be faster if llvmlite were installed.
    """

    head: Head
    vocabulary: list[str | None]
    dropped: Sequence[int] = ()
    lacks_kernel: bool = False


def build_output(
    side: ModelSide, body: Body, tokenizer: Tokenizer, *, device: torch.device, dtype: torch.dtype, int8: bool
) -> Output:
    """Build the output of a side for hidden states of this device and dtype; `int8`: compute it in integers."""
    assert body.projection is not None
    weight, bias = body.projection
    head = build_head(weight, bias, device=device, dtype=dtype, int8=int8)
    slow = lacks_kernel(weight.shape[1], device=device, dtype=dtype, int8=int8)
    return Output(head, tokenizer.vocabulary(body.outputs), lacks_kernel=slow)
