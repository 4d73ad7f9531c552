"""Exact dot-product search over a stream of sparse vectors, with the arithmetic of OpenSearch.

In: parts of CSR rows, one after another, and all queries together. Out: for each query its k best rows. Scores are
those of Lucene (models/dot_products.py). Memory is that of one part plus k hits a query. What an index keeps of a
weight is not applied here: pass vectors that went through cluster/scores.py to get its scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.models.dot_products import Postings, asked_tokens
from sparse_ingest.records import SparseRows


class QueryVector(NamedTuple):
    """A query by token ids, each at most once, in any order."""

    token_ids: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, weights: Mapping[str, float], token_ids: Mapping[str, int]) -> QueryVector:
        """Return the vector of weights by token string; tokens without an id are omitted."""
        known = {token_ids[token]: weight for token, weight in weights.items() if token in token_ids}
        return cls(np.fromiter(known, np.uint32, len(known)), np.fromiter(known.values(), np.float32, len(known)))


class ExactHits(NamedTuple):
    """The best rows of one query, best first; equal scores in order of rows.

    `positions` count the rows of all parts from 0. A row that shares no token with the query is no hit.
    """

    doc_ids: list[str]
    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


def search_exact(parts: Iterable[SparseRows], queries: Sequence[QueryVector], k: int) -> list[ExactHits]:
    """Find the k best rows for each query, by score, then by order of rows."""
    best = [ExactHits([], np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
    asked = asked_tokens(np.concatenate([np.empty(0, np.uint32), *(query.token_ids for query in queries)]))
    first_row = 0
    for part in parts:
        postings = Postings.of(part, asked)
        for number, query in enumerate(queries):
            rows, scores = postings.scores(query.token_ids, query.weights)
            best[number] = _merge(best[number], part.doc_ids, rows, scores, first_row=first_row, k=k)
        first_row += len(part.doc_ids)
    return best


def _merge(
    best: ExactHits,
    doc_ids: Sequence[str],
    rows: npt.NDArray[np.int64],
    scores: npt.NDArray[np.float32],
    *,
    first_row: int,
    k: int,
) -> ExactHits:
    """The k best of the hits so far and the rows of a part, which all come after them."""
    if len(best.scores) == k:
        better = scores > best.scores[-1]
        rows, scores = rows[better], scores[better]
    if len(scores) > k:
        # Equal scores at the border are cut off below, where the order is stable.
        kept = scores >= np.partition(scores, len(scores) - k)[len(scores) - k]
        rows, scores = rows[kept], scores[kept]
    all_scores = np.concatenate([best.scores, scores])
    all_ids = best.doc_ids + [doc_ids[row] for row in rows.tolist()]
    all_positions = np.concatenate([best.positions, rows + first_row])
    order = np.argsort(-all_scores, kind="stable")[:k]
    return ExactHits([all_ids[at] for at in order.tolist()], all_positions[order], all_scores[order])
