"""Which documents share a forward pass: a pure function of their token lengths and the token budget.

Documents are taken longest first, so a batch holds documents of almost the same length, which attention computes
together; equal lengths keep corpus order. Nothing here depends on time, threads or devices, so a run that is continued
elsewhere makes the same batches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


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
