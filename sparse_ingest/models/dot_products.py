"""Exact dot products of queries with rows of sparse vectors, with the arithmetic of Lucene.

In: CSR rows, and queries by token id. Out: the rows that share a token with a query, and their scores. Each product of
weights is rounded to float32, the products are summed in double, and the sum is rounded to float32. Only the order of
the sum may differ from Lucene's, which matters only if products differ by a factor above 2**19. Needs only numpy.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.records import SparseRows


class Postings(NamedTuple):
    """The terms of `row_count` rows that any query has, sorted by token id."""

    token_ids: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    row_count: int

    @classmethod
    def of(cls, part: SparseRows, in_queries: npt.NDArray[np.bool_]) -> Postings:
        """Return the postings of rows; `in_queries` is the result of `query_token_mask`."""
        wanted = in_queries[np.minimum(part.token_ids, np.uint32(len(in_queries) - 1))]
        token_ids, row_count = part.token_ids[wanted], len(part.indptr) - 1
        rows = np.repeat(np.arange(row_count, dtype=np.int32), np.diff(part.indptr))[wanted]
        # Stable, so that the rows of a token stay ascending; for 16-bit ids numpy sorts by radix.
        order = np.argsort(token_ids, kind="stable")
        # 32-bit like the ids of queries; otherwise every search would convert the array first.
        token_ids = token_ids[order].astype(np.uint32)
        return cls(token_ids, rows[order], part.weights[wanted][order].astype(np.float32), row_count)

    def scores(
        self, token_ids: npt.NDArray[np.uint32], weights: npt.NDArray[np.floating]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the rows that share a token with a query, ascending, and their scores."""
        starts = np.searchsorted(self.token_ids, token_ids, side="left")
        ends = np.searchsorted(self.token_ids, token_ids, side="right")
        slices = [slice(start, end) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        products = [self.weights[at] * weight for at, weight in zip(slices, weights.astype(np.float32), strict=True)]
        rows = np.concatenate([np.empty(0, np.int32), *(self.rows[at] for at in slices)])
        sums = np.bincount(rows, weights=np.concatenate([np.empty(0, np.float32), *products]), minlength=self.row_count)
        # Not `sums > 0`: a product may be too small for float32, and the server still counts that row as a hit.
        found = np.zeros(self.row_count, dtype=np.bool_)
        found[rows] = True
        matching = np.flatnonzero(found)
        return matching, sums[matching].astype(np.float32)

    def weight(self, token_id: int, row: int) -> float | None:
        """Return the weight of a token in a row; None if the row lacks it."""
        start, end = np.searchsorted(self.token_ids, np.array([token_id, token_id + 1], np.uint32))
        place = start + np.searchsorted(self.rows[start:end], row)
        return float(self.weights[place]) if place < end and self.rows[place] == row else None


def query_token_mask(token_ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Return for each token id whether the queries have it; the last place is for all larger ids."""
    in_queries = np.zeros(int(token_ids.max(initial=0)) + 2, dtype=np.bool_)
    in_queries[token_ids] = True
    return in_queries
