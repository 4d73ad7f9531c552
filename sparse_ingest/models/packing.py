"""Documents packed one behind the other, without padding: their token ids, their positions, and attention within each.

In: token ids of a batch. Out: one row of all tokens for the linear layers, and an attention function that transformers
calls in place of its own, which lets a token see its own document only. On a GPU in half precision all documents are
one call of torch's variable-length attention; elsewhere each run of documents of one length is one call of the usual
one. Not covered: models that bring attention of their own (body.py pads those).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention

from sparse_ingest.models.tokenizer import TokenIds

# The name of the attention function in transformers' registry.
PACKED = "sparse_ingest_packed"
# Documents are padded to one length for a maximum where that adds at most this share of rows; one call for each
# document costs 4 microseconds, which is 3% of a small model's time.
PADDING = 1 / 16


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
    """Where each document of a batch lies in the packed rows."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def runs(self) -> list[LengthRun]:
        """Neighbours of one length together."""
        return list(_runs(self.lengths))

    @cached_property
    def starts(self) -> torch.Tensor:
        """First row of each document, and the number of rows at the end; int32, as attention wants it."""
        ends = np.cumsum(self.lengths, dtype=np.int32)
        return to_device(np.concatenate((np.zeros(1, np.int32), ends)), self.device)

    @cached_property
    def blocks(self) -> tuple[torch.Tensor | None, list[LengthRun]]:
        """Neighbours of almost one length as if of one: which row stands where, and the runs that this gives.

        Shorter documents repeat their last row, which changes no maximum over them. None: every row stands once.
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

    def at_least(self, rows: int) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Which row stands where if no document may have fewer than so many, and the `starts` that this gives.

        None: every row stands once.
        """
        if min(self.lengths) >= rows:
            return None, self.starts
        longer = np.maximum(self.lengths, rows)
        starts = np.concatenate(([0], np.cumsum(longer))).astype(np.int32)
        return to_device(_repeated(self.lengths, longer), self.device), to_device(starts, self.device)


def ordinal_positions(token_ids: Sequence[TokenIds]) -> npt.NDArray[np.int64]:
    """The position of each token in its document, from 0 on."""
    return np.concatenate([np.arange(len(ids)) for ids in token_ids])


def positions_behind(padding_id: int, token_ids: Sequence[TokenIds]) -> npt.NDArray[np.int64]:
    """As RoBERTa numbers them: the first behind the padding's id, and padding within a text is not counted."""
    counted = [ids != padding_id for ids in token_ids]
    return np.concatenate([np.cumsum(one) * one for one in counted]) + padding_id


def pack(token_ids: Sequence[TokenIds], device: torch.device) -> tuple[torch.Tensor, Packing]:
    """All tokens in one row, `[1, rows]`, and where each document lies."""
    row = np.concatenate(token_ids).astype(np.int64)
    packing = Packing(tuple(len(ids) for ids in token_ids), device)
    return to_device(row, device).unsqueeze(0), packing


def to_device(array: npt.NDArray[np.integer], device: torch.device) -> torch.Tensor:
    """The array on the device; a GPU is not waited for, which a copy from ordinary memory would do."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def register() -> None:
    """Tell transformers of the packed attention; done again it changes nothing."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED, packed_attention)


def packed_attention(
    module: torch.nn.Module,
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
    """Attention within each document; in `[1, heads, rows, width]`, out `[1, rows, heads, width]`.

    `sliding_window` is transformers' number: how far a token sees to each side, plus one.
    """
    reach = None if sliding_window is None else sliding_window - 1
    if query.is_cuda and query.dtype != torch.float32:
        return _one_call(query, key, value, packing, scaling, reach), None
    found = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for run in packing.runs:
        asking, asked, given = (_by_document(tensor[0, :, run.rows], run) for tensor in (query, key, value))
        mask = None if reach is None else _near(run.length, reach, query.device)
        seen = scaled_dot_product_attention(asking, asked, given, attn_mask=mask, scale=scaling)
        found[0, run.rows].view(run.documents, run.length, *found.shape[2:]).copy_(seen.transpose(1, 2))
    return found, None


def _one_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    scaling: float | None,
    reach: int | None,
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    longest = max(packing.lengths)
    found: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        packing.starts,
        packing.starts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, -1) if reach is None else (reach, reach),
        **_unsplit(varlen_attn),
    )
    return torch.as_tensor(found).unsqueeze(0)


@cache
def _unsplit(attention: Callable[..., Any]) -> dict[str, Any]:
    """With more splits the order of a sum would depend on what shares the batch; torch 2.11 knows no splits here."""
    return {"num_splits": 1} if "num_splits" in signature(attention).parameters else {}


def _repeated(lengths: Sequence[int], longer: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The rows of documents, the last one of each again until there are as many as `longer` says."""
    own, ends = np.array(lengths, dtype=np.int64), np.cumsum(longer)
    place = np.arange(ends[-1]) - np.repeat(ends - longer, longer)
    rows: npt.NDArray[np.int64] = np.repeat(np.cumsum(own) - own, longer) + np.minimum(
        place, np.repeat(own - 1, longer)
    )
    return rows


def _runs(lengths: Sequence[int]) -> Iterator[LengthRun]:
    row = document = 0
    for length, same in groupby(lengths):
        documents = sum(1 for _ in same)
        yield LengthRun(row, document, documents, length)
        row, document = row + documents * length, document + documents


def _by_document(rows: torch.Tensor, run: LengthRun) -> torch.Tensor:
    """`[heads, rows, width]` as `[documents, heads, length, width]`."""
    return rows.view(len(rows), run.documents, run.length, -1).transpose(0, 1)


def _near(length: int, reach: int, device: torch.device) -> torch.Tensor | None:
    """Which token sees which; None where all see all."""
    if length <= reach + 1:
        return None
    places = torch.arange(length, device=device)
    return (places.unsqueeze(0) - places.unsqueeze(1)).abs() <= reach
