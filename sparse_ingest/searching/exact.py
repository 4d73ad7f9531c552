"""Exact dot-product search over a stream of sparse vectors, with the arithmetic of Lucene (models/dot_products.py).

Memory: two parts of the vectors plus 2 * k hits per query, each with the id of its row. For the scores of an index,
pass weights of cluster/scores.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_ingest.models.dot_products import Postings, query_token_mask
from sparse_ingest.records import SparseRows, check_weights
from sparse_ingest.searching.best_rows import BestRows


class QueryVector(NamedTuple):
    """The weights of a query by token id, unique and in any order."""

    token_ids: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.float32]

    @classmethod
    def of(cls, weights: Mapping[str, float], token_ids: Mapping[str, int]) -> QueryVector:
        """Return the vector of weights by token string; tokens without an id are omitted.

        Raises:
            UsageError: a weight is not a number above zero within float32 range.
        """
        check_weights(weights)
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
    compiled = len(queries) > 1  # compiling takes 0.1 s
    prepared = ((Postings.of(part, asked, compiled=compiled), part.doc_ids) for part in parts)
    return search_postings(prepared, queries, k, compiled=compiled)


def search_postings(
    parts: Iterable[tuple[Postings, Sequence[str]]], queries: Sequence[QueryVector], k: int, *, compiled: bool
) -> list[ExactHits]:
    """Return what `search_exact` returns, for parts whose postings are known; each has the ids of its rows.

    With `compiled`, a function compiled once per process does the work if llvmlite is installed.
    """
    best, ids, first_row = BestRows(queries, k, compiled=compiled), dict[int, str](), 0
    threads = len(os.sched_getaffinity(0))
    step = max(8, -(-len(queries) // (2 * threads)))  # fewer queries are not worth a thread
    blocks = [range(len(queries))[first : first + step] for first in range(0, len(queries), step)]
    searched: Iterable[dict[int, str]] = ()
    with ThreadPoolExecutor(threads) as pool:
        # A part is prepared while the one before it is searched.
        for postings, doc_ids in parts if k > 0 else ():
            for found in searched:
                ids.update(found)
            best.make_room(first_row + postings.row_count)
            ids = best.without_replaced(ids)
            search = partial(best.add, postings, doc_ids, first_row)
            searched = pool.map(search, blocks) if len(blocks) > 1 else list(map(search, blocks))
            first_row += postings.row_count
        for found in searched:
            ids.update(found)
    rankings = map(best.ranking, range(len(queries)))
    return [
        ExactHits([ids[place] for place in positions.tolist()], positions, scores) for positions, scores in rankings
    ]


def best_places(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Return the positions of the k largest scores, best first; equal scores stay in order."""
    places = np.arange(len(scores))
    if len(scores) > k:
        # Equal scores at the border are removed below, where the order is stable.
        places = np.flatnonzero(scores >= np.partition(scores, len(scores) - k)[len(scores) - k])
    return places[np.argsort(-scores[places], kind="stable")[:k]]
