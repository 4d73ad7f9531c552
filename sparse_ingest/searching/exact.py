"""Exact dot-product search over a stream of sparse vectors, with the arithmetic of OpenSearch.

In: parts of CSR rows, one after the other, and all queries at once. Out: for each query its k best rows. A score is
computed as Lucene does: each product of query weight and document weight is rounded to float32, products are summed
in double, the sum is rounded to float32 once. Only the order of the sum may differ, and a sum of float32 products in
double is exact unless their sizes are more than 2**19 apart. Memory is that of one part plus k hits a query.
Not covered: what an index keeps of a weight; pass vectors that went through cluster/scores.py to get its scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

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


class _Postings(NamedTuple):
    """The terms of one part that any query asks for, by token id."""

    token_ids: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]


def search_exact(parts: Iterable[SparseRows], queries: Sequence[QueryVector], k: int) -> list[ExactHits]:
    """Find the k best rows for each query, by score, then by order of rows."""
    best = [ExactHits([], np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
    asked = _asked_tokens(queries)
    first_row = 0
    for part in parts:
        postings = _postings(part, asked)
        for number, query in enumerate(queries):
            rows, scores = _scores(postings, query, len(part.doc_ids))
            best[number] = _merge(best[number], part.doc_ids, rows, scores, first_row=first_row, k=k)
        first_row += len(part.doc_ids)
    return best


def _asked_tokens(queries: Sequence[QueryVector]) -> npt.NDArray[np.bool_]:
    """For each token id whether a query has it; the last place stands for all larger ids."""
    together = np.concatenate([np.empty(0, np.uint32), *(query.token_ids for query in queries)])
    asked = np.zeros(int(together.max(initial=0)) + 2, dtype=np.bool_)
    asked[together] = True
    return asked


def _postings(part: SparseRows, asked: npt.NDArray[np.bool_]) -> _Postings:
    wanted = asked[np.minimum(part.token_ids, np.uint32(len(asked) - 1))]
    token_ids = part.token_ids[wanted]
    rows = np.repeat(np.arange(len(part.doc_ids), dtype=np.int32), np.diff(part.indptr))[wanted]
    # Stable, so that the rows of a token stay ascending; for 16-bit ids numpy sorts by radix.
    order = np.argsort(token_ids, kind="stable")
    # 32-bit like the ids of queries, or every search in them would convert the array first.
    token_ids = token_ids[order].astype(np.uint32)
    return _Postings(token_ids, rows[order], part.weights[wanted][order].astype(np.float32))


def _scores(
    postings: _Postings, query: QueryVector, row_count: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The rows that share a token with the query, ascending, and their scores."""
    starts = np.searchsorted(postings.token_ids, query.token_ids, side="left")
    ends = np.searchsorted(postings.token_ids, query.token_ids, side="right")
    slices = [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    products = [
        postings.weights[at] * weight for at, weight in zip(slices, query.weights.astype(np.float32), strict=True)
    ]
    rows = np.concatenate([np.empty(0, np.int32), *(postings.rows[at] for at in slices)])
    sums = np.bincount(rows, weights=np.concatenate([np.empty(0, np.float32), *products]), minlength=row_count)
    # Not `sums > 0`: a product may be too small for float32, and the server still counts that row as a hit.
    found = np.zeros(row_count, dtype=np.bool_)
    found[rows] = True
    matching = np.flatnonzero(found)
    return matching, sums[matching].astype(np.float32)


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
