"""Exact dot-product search over a stream of sparse vectors, with the arithmetic of Lucene (models/dot_products.py).

Memory: one part of the vectors plus k hits per query. For the scores of an index, pass weights of cluster/scores.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.models.dot_products import Postings, query_token_mask
from sparse_ingest.records import SparseRows


class QueryVector(NamedTuple):
    """The weights of a query by token id, unique and in any order."""

    token_ids: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, weights: Mapping[str, float], token_ids: Mapping[str, int]) -> QueryVector:
        """Return the vector of weights by token string; tokens without an id are omitted."""
        known = {token_ids[token]: weight for token, weight in weights.items() if token in token_ids}
        return cls(np.fromiter(known, np.uint32, len(known)), np.fromiter(known.values(), np.float32, len(known)))


class ExactHits(NamedTuple):
    """The best rows of one query, best first; equal scores in order of rows.

    `positions` count the rows of all parts from 0. Rows that share no token with the query are not hits.
    """

    doc_ids: list[str]
    positions: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]


def search_exact(parts: Iterable[SparseRows], queries: Sequence[QueryVector], k: int) -> list[ExactHits]:
    """Return the k best rows for each query, by score, then by order of rows."""
    asked = query_token_mask(np.concatenate([np.empty(0, np.uint32), *(query.token_ids for query in queries)]))
    return search_postings(((Postings.of(part, asked), part.doc_ids) for part in parts), queries, k)


def search_postings(
    parts: Iterable[tuple[Postings, Sequence[str]]], queries: Sequence[QueryVector], k: int
) -> list[ExactHits]:
    """Return what `search_exact` returns, for parts whose postings are known; each has the ids of its rows."""
    best = [ExactHits([], np.empty(0, np.int64), np.empty(0, np.float32)) for _ in queries]
    first_row = 0
    # Contiguous, for the compiled function.
    arrays = [
        (np.ascontiguousarray(query.token_ids, np.uint32), np.ascontiguousarray(query.weights, np.float32))
        for query in queries
    ]
    threads = max(1, min(len(os.sched_getaffinity(0)), len(queries)))

    def search(postings: Postings, doc_ids: Sequence[str], first: int) -> None:
        above = postings.above() if len(queries) > 1 else postings.scores_above  # compiling takes 50 ms
        for number in range(first, len(queries), threads):
            held = best[number]
            least = float(held.scores[-1]) if len(held.scores) == k else -math.inf
            rows, scores = above(*arrays[number], least)
            if not len(rows):
                continue
            kept = best_places(scores, k)
            all_scores = np.concatenate([held.scores, scores[kept]])
            all_ids = held.doc_ids + [doc_ids[row] for row in rows[kept].tolist()]
            all_positions = np.concatenate([held.positions, rows[kept] + first_row])
            order = best_places(all_scores, k)
            best[number] = ExactHits([all_ids[at] for at in order.tolist()], all_positions[order], all_scores[order])

    with ThreadPoolExecutor(threads) as pool:
        for postings, doc_ids in parts:
            work = partial(search, postings, doc_ids)
            # One query is not worth a thread.
            list(map(work, [0]) if threads == 1 else pool.map(work, range(threads)))
            first_row += postings.row_count
    return best


def best_places(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Return the positions of the k largest scores, best first; equal scores stay in order."""
    places = np.arange(len(scores))
    if len(scores) > k:
        # Equal scores at the border are removed below, where the order is stable.
        places = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
    return places[np.argsort(-scores[places], kind="stable")[:k]]
