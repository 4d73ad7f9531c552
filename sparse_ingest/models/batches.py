"""Which documents share a forward pass: a pure function of their token lengths and the token budget.

Documents are taken longest first, so a batch holds documents of almost the same length, which attention computes
together; equal lengths keep corpus order. Nothing here depends on time, threads or devices, so a run that is continued
elsewhere makes the same batches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Tokens of a batch on a CPU: larger batches fall out of the cache.
CPU_TOKENS = 2048
# On a GPU the host takes some 0.3 ms a layer to launch a batch, and 0.6 for the rest: computing it must take more.
# With so many numbers in the hidden states that is 3 ms (BERT-tiny) to 24 (gte-base) on an H200 at 40% of its peak, and
# 1.2 to 4.2 are launched. Their largest tensor has 268 MB. Computed from the models' arithmetic, not measured.
GPU_NUMBERS = 1 << 25
# Documents of a batch: each has a dense row of the whole vocabulary until it is compacted.
BATCH_DOCUMENTS = {"cpu": 64, "cuda": 1024}


def usual_batch_tokens(device: str, width: int) -> int:
    """How many tokens a batch has when nothing else is asked for, on a type of device with hidden states of a width."""
    return CPU_TOKENS if device == "cpu" else GPU_NUMBERS // width


def plan_batches(
    lengths: npt.NDArray[np.integer], batch_tokens: int, batch_documents: int
) -> list[npt.NDArray[np.int64]]:
    """Split documents into batches of at most `batch_tokens` padded tokens and `batch_documents` documents.

    A document that is longer than the budget gets a batch of its own. Every index occurs once.
    """
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    batches: list[npt.NDArray[np.int64]] = []
    start = 0
    while start < len(order):
        longest = max(1, int(lengths[order[start]]))
        count = min(batch_documents, max(1, batch_tokens // longest))
        batches.append(order[start : start + count])
        start += count
    return batches
