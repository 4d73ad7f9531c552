"""When the memory of a device does not suffice: what that looks like, and what follows from it.

A batch that does not fit halves the encoder's budget of tokens, and `BudgetLowered` asks for the shard again: its
batches must all come from one budget, or the shard's bytes would tell where the memory ran out. A document that does
not fit by itself is `DocumentTooLarge`. Not covered: what ends the process at once, as the system's own killer does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sparse_ingest.errors import SparseIngestError

T = TypeVar("T")
# What torch's allocator for the CPU, oneDNN and the system say; on a GPU there is a class for it.
SIGNS = ("can't allocate memory", "cannot allocate memory", "out of memory", "could not create a memory")


class DidNotFit(Exception):
    """Memory ran out for a batch: for the inputs at these places, of which the longest has so many tokens."""

    def __init__(self, places: list[int], longest: int) -> None:
        super().__init__(f"No memory for {len(places)} inputs of up to {longest} tokens.")
        self.places, self.longest = places, longest


class BudgetLowered(Exception):
    """The encoder's `batch_tokens` is lower now: make the shard again from its first row."""

    def __init__(self, device: str, documents: int, batch_tokens: int, workers: int) -> None:
        super().__init__(
            f"{device} had no memory for a batch of {documents} documents; going on with at most {batch_tokens} tokens "
            f"a batch, {workers} at once."
        )
        self.batch_tokens = batch_tokens


class DocumentTooLarge(SparseIngestError):
    """One text does not fit into memory even by itself. `text` is its place among those that were given."""

    def __init__(self, text: int, tokens: int, device: str) -> None:
        self.text, self.tokens = text, tokens
        self.reason = f"its {tokens} tokens do not fit into the memory of {device}"
        super().__init__(f"Text {text}: {self.reason}. Encode with a smaller --max-length, or leave it out.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def until_it_fits(encode: Callable[[], T]) -> T:
    """The answer of an encoder, asked again as often as it lowers its budget; for texts that are in no shard."""
    while True:
        try:
            return encode()
        except BudgetLowered:
            continue
