"""Handling of out-of-memory errors of a device.

A batch that does not fit halves the encoder's budget of tokens, and `BudgetLowered` makes the caller start its shard
again: all its batches must have one budget, or the shard's bytes would depend on where memory ran out. A document that
does not fit alone raises `DocumentTooLarge`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from sparse_ingest.errors import SparseIngestError

T = TypeVar("T")
# In messages of torch's CPU allocator, of oneDNN, of the system, and of cuBLAS and cuDNN; for GPU memory torch
# has an exception class.
SIGNS = re.compile(
    "can't allocate memory|cannot allocate memory|out of memory|could not create a memory|alloc_failed|"
    "could not create a primitive(?! descriptor)",  # that of a descriptor is for unsupported shapes
    re.IGNORECASE,
)


class DidNotFit(Exception):
    """Memory ran out for a batch: for the inputs at `places`; the longest one has `longest` tokens."""

    def __init__(self, places: list[int], longest: int) -> None:
        super().__init__(f"No memory for {len(places)} inputs of up to {longest} tokens.")
        self.places, self.longest = places, longest


class BudgetLowered(Exception):
    """The encoder's `batch_tokens` is lower now: encode the shard again from its first row."""

    def __init__(self, device: str, documents: int, batch_tokens: int, workers: int) -> None:
        super().__init__(
            f"{device} had no memory for a batch of {documents} documents; continuing with at most {batch_tokens} "
            f"tokens per batch, {workers} batches at a time."
        )
        self.batch_tokens = batch_tokens


class DocumentTooLarge(SparseIngestError):
    """One text does not fit into memory even alone. `text` is its place among the texts of the call."""

    def __init__(self, text: int, tokens: int, device: str) -> None:
        self.text, self.tokens = text, tokens
        self.reason = f"its {tokens} tokens do not fit into the memory of {device}"
        super().__init__(f"Text {text}: {self.reason}. Pass a smaller --max-length, or omit the text.")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and SIGNS.search(str(error)) is not None


def until_it_fits(encode: Callable[[], T]) -> T:
    """Call an encoder until it no longer lowers its budget, and return its result; not for shards."""
    while True:
        try:
            return encode()
        except BudgetLowered:
            continue
