"""Documents packed one after another without padding: their rows, their positions, and attention within each.

In: lengths and token ids of a batch. Out: rows and positions of the tokens, and an attention function for transformers
in which a token sees its own document only. On a GPU in half precision all documents are one call of torch's flash
attention, on a CPU with AVX2, AVX512 or AMX one of cpu_attention.py; otherwise each run of documents of one length is
one call of the usual attention. Models with attention of their own are padded (body.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_ingest.models.cpu_attention import attention_of
from sparse_ingest.models.cpu_attention_products import BLOCK
from sparse_ingest.models.tokenizer import TokenIds

# The name of the attention function in transformers' registry.
PACKED = "sparse_ingest_packed"
# Documents are padded to one length for a maximum if that adds at most this share of rows. One call per document would
# cost 4 microseconds each, 3% of a small model's time.
PADDING = 1 / 16
# Numbers of rows on a CPU are rounded up to these steps, each up to a limit: oneDNN compiles a product for each number
# of rows, which takes up to 10 times as long as computing it. The layers of a BERT-tiny take 3 ms a batch instead of 32
# with AMX, 8 instead of 14 in float32; padding adds 2% of the rows.
STEPS = {64: 16, 256: 32, math.inf: 64}
# Tokens of a sliding window's attention at a time, with those in reach. A layer of ModernBERT-base takes 80 ms for
# 4,096 tokens, and 1,250 ms if all pairs are computed; 256 at a time take 114 ms.
PIECE = 128


class LengthRun(NamedTuple):
    """`documents` documents of `length` tokens each, from row `row` and document `document` on."""

    row: int
    document: int
    documents: int
    length: int

    @property
    def rows(self) -> slice:
        """Its rows of the packed tokens."""
        return slice(self.row, self.row + self.documents * self.length)


@dataclass(frozen=True)
class Packing:
    """The place of each document of a batch in the packed rows, and its token ids, for heads that need them."""

    lengths: tuple[int, ...]
    device: torch.device
    token_ids: Sequence[TokenIds] = field(default=(), compare=False, repr=False)
    _splits: dict[tuple[int | None, int], tuple[npt.NDArray[np.int64], list[LengthRun]]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    @cached_property
    def ids(self) -> torch.Tensor:
        """The token id of each row."""
        return self.of_rows(np.concatenate(self.token_ids).astype(np.int64))

    def of_rows(self, numbers: npt.NDArray[np.int64]) -> torch.Tensor:
        """Copy one number per token to the device, padded with zeros."""
        rows = len(numbers)
        if self.device.type == "cpu":  # the compiled attention reads `BLOCK` rows from the start of each document on
            rows += max(0, BLOCK - self.lengths[-1])
        rows += row_padding(rows, self.device)
        return to_device(np.pad(numbers, (0, rows - len(numbers))), self.device)

    def without_padding(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows without the padding at the end."""
        return rows[: sum(self.lengths)]

    @cached_property
    def runs(self) -> list[LengthRun]:
        """Adjacent documents of one length together."""
        runs: list[LengthRun] = []
        row = document = 0
        for length, same in groupby(self.lengths):
            runs.append(LengthRun(row, document, sum(1 for _ in same), length))
            row, document = runs[-1].rows.stop, document + runs[-1].documents
        return runs

    @cached_property
    def starts(self) -> torch.Tensor:
        """First row of each document, and the number of all rows; int32, as attention needs it."""
        return to_device(np.cumsum([0, *self.lengths], dtype=np.int32), self.device)

    @cached_property
    def blocks(self) -> tuple[torch.Tensor | None, list[LengthRun]]:
        """Runs of adjacent documents of similar length, and the index of each row, None if no row is repeated.

        Shorter documents repeat their last row, which does not change a maximum over them.
        """
        blocks: list[LengthRun] = []
        for run in self.runs:
            last = blocks[-1] if blocks else None
            if last and run.length <= last.length <= run.length * (1 + PADDING):
                blocks[-1] = last._replace(documents=last.documents + run.documents)
            else:
                row = last.rows.stop if last else 0
                blocks.append(LengthRun(row, run.document, run.documents, run.length))
        if blocks == self.runs:
            return None, blocks
        longest = np.repeat([block.length for block in blocks], [block.documents for block in blocks])
        return to_device(_repeated(self.lengths, longest), self.device), blocks

    def split(self, reach: int | None, rows: int) -> tuple[npt.NDArray[np.int64], list[LengthRun]]:
        """Return the first and the end row of each document that a compiled attention computes, and the other runs.

        It reads at least `BLOCK` of the `rows` from the first one on, and computes no sliding windows.
        """
        if (reach, rows) not in self._splits:
            places: list[tuple[int, int]] = []
            others: list[LengthRun] = []
            for run in self.runs:
                is_seen = reach is None or run.length <= reach + 1
                fitting = min(run.documents, max(0, (rows - BLOCK - run.row) // run.length + 1)) if is_seen else 0
                border = run.row + fitting * run.length
                places += [(row, row + run.length) for row in range(run.row, border, run.length)]
                if fitting < run.documents:
                    others.append(LengthRun(border, run.document + fitting, run.documents - fitting, run.length))
            self._splits[reach, rows] = np.array(places, dtype=np.int64).reshape(-1, 2), others
        return self._splits[reach, rows]

    def at_least(self, rows: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Pad documents to `rows` rows. Return the index of each row, None if all are long enough, and the `starts`."""
        if min(self.lengths) >= rows:
            return None, self.starts
        longer = np.maximum(self.lengths, rows)
        starts = np.cumsum([0, *longer], dtype=np.int32)
        return to_device(_repeated(self.lengths, longer), self.device), to_device(starts, self.device)


def ordinal_positions(token_ids: Sequence[TokenIds]) -> npt.NDArray[np.int64]:
    """Return the position of each token in its document, from 0 on."""
    return np.concatenate([np.arange(len(ids)) for ids in token_ids])


def positions_behind(padding_id: int, token_ids: Sequence[TokenIds]) -> npt.NDArray[np.int64]:
    """Return positions as RoBERTa numbers them: from `padding_id + 1`, not counting padding within a text."""
    counted = [ids != padding_id for ids in token_ids]
    return np.concatenate([np.cumsum(one) * one for one in counted]) + padding_id


def row_padding(rows: int, device: torch.device) -> int:
    """Return the number of padding rows, so that a CPU sees few numbers of rows."""
    return -rows % next(step for limit, step in STEPS.items() if rows <= limit) if device.type == "cpu" else 0


def to_device(array: npt.NDArray[np.integer], device: torch.device) -> torch.Tensor:
    """Copy an array to the device, to a GPU from pinned memory, so that the host does not wait."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def register() -> str:
    """Register the packed attention with transformers, and return its name there; may be called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)
    return PACKED


def packed_attention(
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: Packing,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention within each document: `[1, heads, rows, width]` to `[1, rows, heads, width]`.

    `sliding_window` is, as in transformers, the number of tokens seen on each side, plus one.
    """
    reach = None if sliding_window is None else sliding_window - 1
    if query.is_cuda and query.dtype != torch.float32:
        # The operator of torch.nn.attention.varlen, whose import takes 2 s for torch's compiler. It shares heads.
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        starts, longest = packing.starts, max(packing.lengths)
        left = right = -1 if reach is None else reach
        options = {"scale": scaling, "window_size_left": left, "window_size_right": right, **_one_split()}
        attend = torch.ops.aten._flash_attention_forward
        seen = attend(*rows, starts, starts, longest, longest, 0.0, False, False, **options)
        return torch.as_tensor(seen[0]).unsqueeze(0), None
    # Several heads of a language model share a head of keys and values.
    shared = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    found = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    found[:, sum(packing.lengths) :] = 0
    for run in _attend_compiled(query, key, value, scaling, reach, packing=packing, output=found):
        shape = (run.documents, run.length)
        # `[heads, rows, width]` as `[documents, heads, length, width]`.
        q, k, v = (tensor[0, :, run.rows].unflatten(1, shape).transpose(0, 1) for tensor in (query, key, value))  # type: ignore[no-untyped-call]
        of_run = found[0, run.rows].unflatten(0, shape)  # type: ignore[no-untyped-call]
        for own, near, mask in _pieces(run.length, reach, query.device):
            seen = scaled_dot_product_attention(
                q[:, :, own], k[:, :, near], v[:, :, near], attn_mask=mask, scale=scaling, **shared
            )
            of_run[:, own].copy_(seen.transpose(1, 2))
    return found, None


def _attend_compiled(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, reach: int | None, *,
    packing: Packing, output: torch.Tensor,
) -> list[LengthRun]:  # fmt: skip
    """Write the attention of most documents with a compiled function, if there is one. Return the remaining runs."""
    rows, width = query.shape[2:]
    scale = width**-0.5 if scaling is None else scaling
    # The function gets addresses, and cannot check shapes.
    alike = all(other.shape == query.shape and other.dtype == query.dtype for other in (key, value))
    if not alike or query.device.type != "cpu" or scale <= 0 or sum(packing.lengths) > rows:
        return packing.runs
    compiled = attention_of(width, query.dtype)
    if compiled is None:
        return packing.runs
    places, left = packing.split(reach, rows)
    if len(places):
        compiled(query[0], key[0], value[0], places, scale, output[0])
    return left


def _pieces(length: int, reach: int | None, device: torch.device) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """Yield tokens of a document, those that they see, and which of them each sees; None: all."""
    if reach is None or length <= reach + 1:
        yield slice(length), slice(length), None
        return
    places = torch.arange(length, device=device)
    for start in range(0, length, PIECE):
        own = slice(start, start + PIECE)
        near = slice(max(0, start - reach), start + PIECE + reach)
        yield own, near, (places[own].unsqueeze(1) - places[near]).abs() <= reach


@cache
def _one_split() -> dict[str, int]:
    """Return the option without which sums could depend on the batch; torch 2.11 has none, and never splits."""
    schema = torch.ops.aten._flash_attention_forward.default._schema
    return {"num_splits": 1} if any(argument.name == "num_splits" for argument in schema.arguments) else {}


def _repeated(lengths: Sequence[int], longer: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the rows of documents, the last one of each repeated up to the length in `longer`."""
    own, ends = np.array(lengths, dtype=np.int64), np.cumsum(longer)
    place = np.arange(ends[-1]) - np.repeat(ends - longer, longer)
    return np.asarray(np.repeat(np.cumsum(own) - own, longer) + np.minimum(place, np.repeat(own - 1, longer)))
