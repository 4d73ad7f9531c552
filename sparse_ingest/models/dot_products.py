"""Exact dot products of queries with rows of sparse vectors, with the arithmetic of Lucene.

In: CSR rows, and queries by token id. Out: the rows that share a token with a query, and their scores. Each product of
weights is rounded to float32, the products are summed in double, and the sum is rounded to float32. Only the order of
the sum may differ from Lucene's, which matters only if products differ by a factor above 2**19. Needs only numpy.
With llvmlite (compiled.py) sorting is faster.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.models.compiled import ADDRESS, NUMBER, compiled_or_none
from sparse_ingest.records import SparseRows

Matching = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]  # rows, ascending, and their scores


class Postings(NamedTuple):
    """The terms of `row_count` rows that any query has, sorted by token id; `starts` has the first of each token."""

    starts: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    row_count: int

    @classmethod
    def of(cls, part: SparseRows, in_queries: npt.NDArray[np.bool_], *, compiled: bool = False) -> Postings:
        """Return the postings of rows; `in_queries` is the result of `query_token_mask`.

        With `compiled`, a function compiled once per process sorts if llvmlite is installed.
        """
        row_count = len(part.indptr) - 1
        rows = np.repeat(np.arange(row_count, dtype=np.int32), np.diff(part.indptr))
        types = f"%id = type i{part.token_ids.itemsize * 8}\n%weight = type i{part.weights.itemsize * 8}\n"
        sort = compiled_or_none(types + _SORT, "sort", NUMBER, NUMBER, *[ADDRESS] * 8) if compiled else None
        if sort is not None:
            starts, nexts = np.empty(len(in_queries) + 1, np.int64), np.zeros(len(in_queries), np.int64)
            # The last place is for the terms that no query has.
            sorted_rows, weights = np.empty(len(rows) + 1, np.int32), np.empty(len(rows) + 1, part.weights.dtype)
            inputs = map(np.ascontiguousarray, (part.token_ids, rows, part.weights, in_queries))
            arrays = (*inputs, starts, nexts, sorted_rows, weights)
            sort(len(rows), len(in_queries), *(array.ctypes.data for array in arrays))
            return cls(starts, sorted_rows[: starts[-1]], weights[: starts[-1]].astype(np.float32), row_count)
        wanted = in_queries[np.minimum(part.token_ids, np.uint32(len(in_queries) - 1))]
        token_ids = part.token_ids[wanted]
        # Stable, so that the rows of a token stay ascending; for 16-bit ids numpy sorts by radix.
        order = np.argsort(token_ids, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(token_ids, minlength=len(in_queries)))])
        return cls(starts, rows[wanted][order], part.weights[wanted][order].astype(np.float32), row_count)

    def scores(self, token_ids: npt.NDArray[np.uint32], weights: npt.NDArray[np.floating]) -> Matching:
        """Return the rows that share a token with a query, and their scores."""
        starts, ends = self.starts[token_ids].tolist(), self.starts[token_ids + 1].tolist()
        slices = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
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
        start, end = self.starts[token_id : token_id + 2]
        place = start + np.searchsorted(self.rows[start:end], row)
        return float(self.weights[place]) if place < end and self.rows[place] == row else None


def query_token_mask(token_ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Return for each token id whether the queries have it; the last place is for all larger ids."""
    in_queries = np.zeros(int(token_ids.max(initial=0)) + 2, dtype=np.bool_)
    in_queries[token_ids] = True
    return in_queries


# Count the terms of each token, sum the counts of the tokens of queries, then store the row and the weight of each term
# at the next place of its token; those of other tokens all at the last place.
_SORT = """
define void @sort(i64 %terms, i64 %tokens, ptr %term_tokens, ptr %term_rows, ptr %term_weights, ptr %in_queries,
                  ptr %starts, ptr %nexts, ptr %rows, ptr %weights) {
entry:
  %last_token = sub i64 %tokens, 1
  br label %count
count:
  %counted = phi i64 [0, %entry], [%counted_after, %one_count]
  %is_count = icmp slt i64 %counted, %terms
  br i1 %is_count, label %one_count, label %sum
one_count:
  %counted_at = getelementptr %id, ptr %term_tokens, i64 %counted
  %counted_id = load %id, ptr %counted_at
  %counted_64 = zext %id %counted_id to i64
  %counted_is_larger = icmp ugt i64 %counted_64, %last_token
  %counted_token = select i1 %counted_is_larger, i64 %last_token, i64 %counted_64
  %number_at = getelementptr i64, ptr %nexts, i64 %counted_token
  %number = load i64, ptr %number_at
  %number_after = add i64 %number, 1
  store i64 %number_after, ptr %number_at
  %counted_after = add i64 %counted, 1
  br label %count
sum:
  %summed = phi i64 [0, %count], [%summed_after, %one_sum]
  %start = phi i64 [0, %count], [%start_after, %one_sum]
  %start_at = getelementptr i64, ptr %starts, i64 %summed
  store i64 %start, ptr %start_at
  %is_sum = icmp slt i64 %summed, %tokens
  br i1 %is_sum, label %one_sum, label %term
one_sum:
  %requested_at = getelementptr i8, ptr %in_queries, i64 %summed
  %requested = load i8, ptr %requested_at
  %is_requested = icmp ne i8 %requested, 0
  %first_at = getelementptr i64, ptr %nexts, i64 %summed
  %size = load i64, ptr %first_at
  %requested_size = select i1 %is_requested, i64 %size, i64 0
  %start_after = add i64 %start, %requested_size
  %first = select i1 %is_requested, i64 %start, i64 %terms
  store i64 %first, ptr %first_at
  %summed_after = add i64 %summed, 1
  br label %sum
term:
  %at = phi i64 [0, %sum], [%at_after, %one_term]
  %is_term = icmp slt i64 %at, %terms
  br i1 %is_term, label %one_term, label %finish
one_term:
  %token_at = getelementptr %id, ptr %term_tokens, i64 %at
  %token_id = load %id, ptr %token_at
  %token_64 = zext %id %token_id to i64
  %is_larger = icmp ugt i64 %token_64, %last_token
  %token = select i1 %is_larger, i64 %last_token, i64 %token_64
  %next_at = getelementptr i64, ptr %nexts, i64 %token
  %next = load i64, ptr %next_at
  %row_from = getelementptr i32, ptr %term_rows, i64 %at
  %row = load i32, ptr %row_from
  %row_to = getelementptr i32, ptr %rows, i64 %next
  store i32 %row, ptr %row_to
  %weight_from = getelementptr %weight, ptr %term_weights, i64 %at
  %value = load %weight, ptr %weight_from
  %weight_to = getelementptr %weight, ptr %weights, i64 %next
  store %weight %value, ptr %weight_to
  %wanted_at = getelementptr i8, ptr %in_queries, i64 %token
  %wanted = load i8, ptr %wanted_at
  %step = zext i8 %wanted to i64
  %next_after = add i64 %next, %step
  store i64 %next_after, ptr %next_at
  %at_after = add i64 %at, 1
  br label %term
finish:
  ret void
}
"""
