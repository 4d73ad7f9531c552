"""The best rows of many queries, found part by part, in several threads.

Each found row is one integer, its key: the float32 score, with its bits changed so that larger scores are larger
integers, then the complement of its position, so that of equal scores the first row is the best. The k largest keys of
a query do not depend on how threads divide the work; parts come in order. With llvmlite one compiled function sums and
keeps the keys (as a heap); without it numpy does, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sparse_ingest.errors import UsageError
from sparse_ingest.models.compiled import ADDRESS, NUMBER, compiled_or_none
from sparse_ingest.models.dot_products import Postings

MOST_ROWS = 1 << 32  # a position has 32 bits of a key
_NO_ROW = np.iinfo(np.int64).min  # less than any key
_LANES = 8  # rows that the compiled function compares at the same time


class BestRows:
    """The k best rows so far of each query, which is token ids and weights. Threads may add for different queries."""

    def __init__(
        self, queries: Sequence[tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]], k: int, *, compiled: bool
    ) -> None:
        self._starts = np.cumsum([0, *(len(token_ids) for token_ids, _ in queries)])
        # Exactly these types, for the compiled function.
        self._token_ids = np.concatenate([np.empty(0, np.uint32), *(ids for ids, _ in queries)]).astype(np.uint32)
        self._weights = np.concatenate([np.empty(0, np.float32), *(weights for _, weights in queries)]).astype(
            np.float32
        )
        self._k = k
        self._keys = np.empty((len(queries), 0), np.int64)  # for each query a heap: the first key is the least
        self._search = compiled_or_none(_SEARCH, "search", *_TYPES) if compiled else None

    def make_room(self, rows: int) -> None:
        """Make room for the best of the first `rows` rows."""
        if rows > MOST_ROWS:
            raise UsageError(f"Exact search is limited to {MOST_ROWS:,} documents: search an index instead.")
        count, width = self._keys.shape
        if width < min(self._k, rows):
            added = min(self._k, max(rows, 2 * width)) - width
            self._keys = np.sort(np.concatenate([np.full((count, added), _NO_ROW), self._keys], axis=1), axis=1)

    def add(self, postings: Postings, doc_ids: Sequence[str], first_row: int, numbers: range) -> dict[int, str]:
        """Search a part for some queries, given the position of its first row.

        Return the ids of the rows that became the best of a query, by position; better rows of the part may have
        replaced some.
        """
        largest = int(self._token_ids.max(initial=0))
        if largest >= len(postings.starts) - 1:  # the compiled function would read beyond `starts`
            raise IndexError(f"A query has the token id {largest}; the postings have {len(postings.starts) - 1}.")
        taken = np.zeros(postings.row_count, np.bool_)
        if self._search is not None:
            sums = np.full(-(-postings.row_count // _LANES) * _LANES, -0.0)
            arrays = (*postings[:3], sums, taken, self._starts, self._token_ids, self._weights, self._keys)
            addresses = [array.ctypes.data for array in arrays]
            self._search(*addresses, postings.row_count, first_row, self._keys.shape[1], numbers.start, numbers.stop)
        else:
            for number in numbers if postings.row_count else ():
                self._add_one(postings, first_row, number, taken)
        return {first_row + row: doc_ids[row] for row in np.flatnonzero(taken).tolist()}

    def _add_one(self, postings: Postings, first_row: int, number: int, taken: npt.NDArray[np.bool_]) -> None:
        terms, held = slice(*self._starts[number : number + 2]), self._keys[number]
        rows, scores = postings.scores(self._token_ids[terms], self._weights[terms])
        keys = _ordered(scores.view(np.int32)).astype(np.int64) << 32 | MOST_ROWS - 1 - first_row - rows
        both = np.concatenate([held, keys[keys > held[0]]])
        held[:] = np.partition(both, len(both) - len(held))[-len(held) :]
        taken[rows[keys >= held[0]]] = True

    def without_replaced(self, ids: dict[int, str]) -> dict[int, str]:
        """Return the ids without those of rows that better rows replaced, if there may be many of those."""
        if len(ids) <= 2 * self._keys.size:
            return ids
        return {position: ids[position] for position in _positions(np.unique(self._keys)).tolist() if position in ids}

    def ranking(self, number: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the positions and the scores of the best rows of a query, best first."""
        keys = np.sort(self._keys[number])[::-1]
        keys = keys[keys > _NO_ROW]
        return _positions(keys), _ordered((keys >> 32).astype(np.int32)).view(np.float32)


def _positions(keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return ~keys & MOST_ROWS - 1


def _ordered(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the bits of float32 numbers as integers in the order of the numbers, and the reverse."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


_TYPES = (*[ADDRESS] * 9, *[NUMBER] * 5)
# For each query: sums[row] += float(weight * query weight) for each posting of its tokens. The sum of a row without one
# stays -0.0 (in the order of `_ordered` -1), which no other has, because 0.0 is added. Then the key of a row replaces
# the least of the heap if it is larger, and the sums become -0.0 again. LLVM changes no rounding without fast-math.
_SEARCH = """
define void @search(ptr %starts, ptr %rows, ptr %weights, ptr %sums, ptr %taken, ptr %query_starts, ptr %query_tokens,
                    ptr %query_weights, ptr %all_keys, i64 %row_count, i64 %first_row, i64 %k, i64 %first_query,
                    i64 %last_query) {
entry:
  br label %query
query:
  %number = phi i64 [%first_query, %entry], [%number_after, %end_query]
  %is_query = icmp slt i64 %number, %last_query
  br i1 %is_query, label %one_query, label %finish
one_query:
  %token_first_at = getelementptr i64, ptr %query_starts, i64 %number
  %token_first = load i64, ptr %token_first_at
  %token_last_at = getelementptr i64, ptr %token_first_at, i64 1
  %token_last = load i64, ptr %token_last_at
  br label %token
token:
  %token_place = phi i64 [%token_first, %one_query], [%token_after, %end_token]
  %is_token = icmp slt i64 %token_place, %token_last
  br i1 %is_token, label %one_token, label %hits
one_token:
  %id_at = getelementptr i32, ptr %query_tokens, i64 %token_place
  %id_32 = load i32, ptr %id_at
  %id = zext i32 %id_32 to i64
  %start_at = getelementptr i64, ptr %starts, i64 %id
  %start = load i64, ptr %start_at
  %end_at = getelementptr i64, ptr %start_at, i64 1
  %end = load i64, ptr %end_at
  %factor_at = getelementptr float, ptr %query_weights, i64 %token_place
  %factor = load float, ptr %factor_at
  br label %posting
posting:
  %posting_place = phi i64 [%start, %one_token], [%posting_after, %one_posting]
  %is_posting = icmp slt i64 %posting_place, %end
  br i1 %is_posting, label %one_posting, label %end_token
one_posting:
  %row_at = getelementptr i32, ptr %rows, i64 %posting_place
  %row_32 = load i32, ptr %row_at
  %row = zext i32 %row_32 to i64
  %weight_at = getelementptr float, ptr %weights, i64 %posting_place
  %weight = load float, ptr %weight_at
  %product = fmul float %weight, %factor
  %exact = fpext float %product to double
  %added = fadd double %exact, 0.0
  %sum_at = getelementptr double, ptr %sums, i64 %row
  %before = load double, ptr %sum_at
  %sum = fadd double %before, %added
  store double %sum, ptr %sum_at
  %posting_after = add i64 %posting_place, 1
  br label %posting
end_token:
  %token_after = add i64 %token_place, 1
  br label %token
hits:
  %offset = mul i64 %number, %k
  %keys = getelementptr i64, ptr %all_keys, i64 %offset
  br label %block
block:
  %block_row = phi i64 [0, %hits], [%block_after, %end_block]
  %is_block = icmp slt i64 %block_row, %row_count
  br i1 %is_block, label %one_block, label %end_query
one_block:
  %block_at = getelementptr double, ptr %sums, i64 %block_row
  %block_sums = load <8 x double>, ptr %block_at, align 8
  %block_scores = fptrunc <8 x double> %block_sums to <8 x float>
  %block_bits = bitcast <8 x float> %block_scores to <8 x i32>
  %signs = ashr <8 x i32> %block_bits, splat (i32 31)
  %flips = and <8 x i32> %signs, splat (i32 2147483647)
  %ordered = xor <8 x i32> %block_bits, %flips
  %worst = load i64, ptr %keys
  %worst_high = ashr i64 %worst, 32
  %least = trunc i64 %worst_high to i32
  %least_one = insertelement <8 x i32> poison, i32 %least, i64 0
  %least_all = shufflevector <8 x i32> %least_one, <8 x i32> poison, <8 x i32> zeroinitializer
  %larger = icmp sgt <8 x i32> %ordered, %least_all
  %summed = icmp ne <8 x i32> %ordered, splat (i32 -1)
  %block_hits = and <8 x i1> %larger, %summed
  %bits = bitcast <8 x i1> %block_hits to i8
  br label %hit
hit:
  %waiting = phi i8 [%bits, %one_block], [%waiting_after, %one_hit], [%waiting_after, %put]
  %is_hit = icmp ne i8 %waiting, 0
  br i1 %is_hit, label %one_hit, label %end_block
one_hit:
  %lane_8 = call i8 @llvm.cttz.i8(i8 %waiting, i1 true)
  %waiting_less = sub i8 %waiting, 1
  %waiting_after = and i8 %waiting, %waiting_less
  %lane = zext i8 %lane_8 to i64
  %hit_row = add i64 %block_row, %lane
  %score = extractelement <8 x i32> %ordered, i8 %lane_8
  %score_64 = zext i32 %score to i64
  %high = shl i64 %score_64, 32
  %position = add i64 %first_row, %hit_row
  %low = xor i64 %position, 4294967295
  %key = or i64 %high, %low
  %root = load i64, ptr %keys
  %is_better = icmp sgt i64 %key, %root
  br i1 %is_better, label %sink, label %hit
sink:
  %hole = phi i64 [0, %one_hit], [%child, %rise]
  %hole_at = getelementptr i64, ptr %keys, i64 %hole
  %twice = shl i64 %hole, 1
  %left = add i64 %twice, 1
  %has_left = icmp slt i64 %left, %k
  br i1 %has_left, label %children, label %put
children:
  %left_at = getelementptr i64, ptr %keys, i64 %left
  %left_key = load i64, ptr %left_at
  %next = add i64 %twice, 2
  %has_right = icmp slt i64 %next, %k
  %right = select i1 %has_right, i64 %next, i64 %left
  %right_at = getelementptr i64, ptr %keys, i64 %right
  %right_key = load i64, ptr %right_at
  %is_right = icmp slt i64 %right_key, %left_key
  %child = select i1 %is_right, i64 %right, i64 %left
  %child_key = select i1 %is_right, i64 %right_key, i64 %left_key
  %is_less = icmp slt i64 %child_key, %key
  br i1 %is_less, label %rise, label %put
rise:
  store i64 %child_key, ptr %hole_at
  br label %sink
put:
  store i64 %key, ptr %hole_at
  %taken_at = getelementptr i8, ptr %taken, i64 %hit_row
  store i8 1, ptr %taken_at
  br label %hit
end_block:
  store <8 x double> splat (double -0.0), ptr %block_at, align 8
  %block_after = add i64 %block_row, 8
  br label %block
end_query:
  %number_after = add i64 %number, 1
  br label %query
finish:
  ret void
}

declare i8 @llvm.cttz.i8(i8, i1)
"""
