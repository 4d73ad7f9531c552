"""Exact dot products of queries with rows of sparse vectors, with the arithmetic of Lucene.

In: CSR rows, and queries by token id. Out: the rows that share a token with a query, and their scores. Each product of
weights is rounded to float32, the products are summed in double, and the sum is rounded to float32. Only the order of
the sum may differ from Lucene's, which matters only if products differ by a factor above 2**19. Needs only numpy; with
llvmlite (compiled.py) the sums of many queries are the same, and computed by several threads at the same time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.models.compiled import ADDRESS, FLOAT, NUMBER, Compiled, compile_function
from sparse_ingest.records import SparseRows

Matching = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]  # rows, ascending, and their scores


class Postings(NamedTuple):
    """The terms of `row_count` rows that any query has, sorted by token id; `starts` has the first of each token."""

    starts: npt.NDArray[np.int64]
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
        starts = np.concatenate([[0], np.cumsum(np.bincount(token_ids, minlength=len(in_queries)))])
        return cls(starts, rows[order], part.weights[wanted][order].astype(np.float32), row_count)

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

    def above(self) -> Callable[[npt.NDArray[np.uint32], npt.NDArray[np.float32], float], Matching]:
        """Return a function from token ids, weights and a score to the rows with larger scores, for one thread."""
        compiled = compiled_above()
        if compiled is None:
            return self.scores_above
        rows, scores = np.empty(self.row_count, np.int32), np.empty(self.row_count, np.float32)
        # With sums and marks of rows, which the compiled function leaves zero.
        arrays = (self, np.zeros(self.row_count), np.zeros(self.row_count, np.uint8), rows, scores)
        addresses = [array.ctypes.data for array in (self.starts, self.rows, self.weights, *arrays[1:])]

        def above(token_ids: npt.NDArray[np.uint32], weights: npt.NDArray[np.float32], least: float) -> Matching:
            if int(token_ids.max(initial=0)) >= len(self.starts) - 1:  # it would read beyond `starts`
                raise IndexError(
                    f"A query has the token id {token_ids.max()}; the postings have {len(self.starts) - 1}."
                )
            query = token_ids.ctypes.data, weights.ctypes.data, len(token_ids)
            count = compiled(*addresses, *query, self.row_count, least)
            _ = arrays  # they live as long as this function
            return rows[:count].astype(np.int64), scores[:count].copy()

        return above

    def scores_above(
        self, token_ids: npt.NDArray[np.uint32], weights: npt.NDArray[np.float32], least: float
    ) -> Matching:
        """Return the rows that share a token with a query, and their scores, if these are above `least`."""
        rows, scores = self.scores(token_ids, weights)
        larger = scores > least
        return rows[larger], scores[larger]


@cache
def compiled_above() -> Compiled | None:
    """Return the compiled function; None without llvmlite, or if it cannot compile here."""
    try:
        return compile_function(_ABOVE, "above", *[ADDRESS] * 9, NUMBER, NUMBER, FLOAT, returns=NUMBER)
    except (ImportError, RuntimeError):
        return None


def query_token_mask(token_ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    """Return for each token id whether the queries have it; the last place is for all larger ids."""
    in_queries = np.zeros(int(token_ids.max(initial=0)) + 2, dtype=np.bool_)
    in_queries[token_ids] = True
    return in_queries


# For each posting of the query's tokens: sums[row] += float(weight * query weight), seen[row] = 1. Then the rows with a
# float32 sum above `least`. Without fast-math flags LLVM changes no rounding.
_ABOVE = """
define i64 @above(ptr %starts, ptr %rows, ptr %weights, ptr %sums, ptr %seen, ptr %found_rows, ptr %found_scores,
                  ptr %query_tokens, ptr %query, i64 %tokens, i64 %row_count, float %least) {
entry:
  br label %next_token
next_token:
  %token = phi i64 [0, %entry], [%token_after, %end_token]
  %is_token = icmp slt i64 %token, %tokens
  br i1 %is_token, label %one_token, label %next_row
one_token:
  %id_at = getelementptr i32, ptr %query_tokens, i64 %token
  %id_32 = load i32, ptr %id_at
  %id = zext i32 %id_32 to i64
  %start_at = getelementptr i64, ptr %starts, i64 %id
  %start = load i64, ptr %start_at
  %end_at = getelementptr i64, ptr %start_at, i64 1
  %end = load i64, ptr %end_at
  %factor_at = getelementptr float, ptr %query, i64 %token
  %factor = load float, ptr %factor_at
  br label %next_posting
next_posting:
  %posting = phi i64 [%start, %one_token], [%posting_after, %one_posting]
  %is_posting = icmp slt i64 %posting, %end
  br i1 %is_posting, label %one_posting, label %end_token
one_posting:
  %row_at = getelementptr i32, ptr %rows, i64 %posting
  %row_32 = load i32, ptr %row_at
  %row = zext i32 %row_32 to i64
  %weight_at = getelementptr float, ptr %weights, i64 %posting
  %weight = load float, ptr %weight_at
  %product = fmul float %weight, %factor
  %exact = fpext float %product to double
  %sum_at = getelementptr double, ptr %sums, i64 %row
  %before = load double, ptr %sum_at
  %sum = fadd double %before, %exact
  store double %sum, ptr %sum_at
  %seen_at = getelementptr i8, ptr %seen, i64 %row
  store i8 1, ptr %seen_at
  %posting_after = add i64 %posting, 1
  br label %next_posting
end_token:
  %token_after = add i64 %token, 1
  br label %next_token
next_row:
  %at = phi i64 [0, %next_token], [%at_after, %end_row]
  %count = phi i64 [0, %next_token], [%count_after, %end_row]
  %is_row = icmp slt i64 %at, %row_count
  br i1 %is_row, label %one_row, label %finish
one_row:
  %was_at = getelementptr i8, ptr %seen, i64 %at
  %was = load i8, ptr %was_at
  %was_seen = icmp ne i8 %was, 0
  br i1 %was_seen, label %seen_row, label %end_row
seen_row:
  store i8 0, ptr %was_at
  %total_at = getelementptr double, ptr %sums, i64 %at
  %total = load double, ptr %total_at
  store double 0.0, ptr %total_at
  %score = fptrunc double %total to float
  %out_row_at = getelementptr i32, ptr %found_rows, i64 %count
  %at_32 = trunc i64 %at to i32
  store i32 %at_32, ptr %out_row_at
  %out_score_at = getelementptr float, ptr %found_scores, i64 %count
  store float %score, ptr %out_score_at
  %is_larger = fcmp ogt float %score, %least
  %one = zext i1 %is_larger to i64
  %count_more = add i64 %count, %one
  br label %end_row
end_row:
  %count_after = phi i64 [%count, %one_row], [%count_more, %seen_row]
  %at_after = add i64 %at, 1
  br label %next_row
finish:
  ret i64 %count
}
"""
