"""A run in memory: the postings and the fields of its documents, for many exact searches of one run.

Only for runs that fit; others are read from their shards for every search (run_search.py). The hits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from sparse_ingest.models.dot_products import Postings
from sparse_ingest.queries.weight_table import QueryWeights
from sparse_ingest.runs.checking import finished_shards, shard_parts
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import parse_fields
from sparse_ingest.searching.exact import search_postings
from sparse_ingest.searching.hits import Hit
from sparse_ingest.searching.run_search import ordered_vector, shares, token_ids_of

MOST_BYTES = 1 << 30
_TERM_BYTES = 12  # token id, row and weight
_DOCUMENT_BYTES = 150  # the objects of its id and its fields


class _Part(NamedTuple):
    postings: Postings
    doc_ids: Sequence[str]
    fields: Sequence[str]
    first: int  # position of its first row


class KeptRun:
    """The finished shards of a run, in memory. Thread-safe."""

    def __init__(self, run: Run, parts: Sequence[_Part]) -> None:
        self._parts = parts
        self._firsts = [part.first for part in parts]
        self._token_ids = token_ids_of(run)

    @classmethod
    def read(cls, run: Run, most_bytes: int = MOST_BYTES) -> Self | None:
        """Read the finished shards; None if they need more than `most_bytes`."""
        every_token = np.ones(len(run.vocabulary()) + 1, np.bool_)
        parts: list[_Part] = []
        first = held = 0
        search_postings((), [], 1, compiled=True)  # compiles now, so that the first query need not wait
        for shard in finished_shards(run):
            for part in shard_parts(run, shard):
                rows = part.vectors
                held += (
                    _TERM_BYTES * len(rows.weights) + sum(map(len, part.fields)) + _DOCUMENT_BYTES * len(part.fields)
                )
                if held > most_bytes:
                    return None
                parts.append(_Part(Postings.of(rows, every_token, compiled=True), rows.doc_ids, part.fields, first))
                first += len(part.fields)
        return cls(run, parts)

    def search(self, weights: QueryWeights, size: int) -> list[Hit]:
        """Return the best documents, as `search_run` does. Tokens that the vocabulary lacks are ignored."""
        query = ordered_vector(weights, self._token_ids)
        known = {token: self._token_ids[token] for token in weights if token in self._token_ids}
        parts = ((part.postings, part.doc_ids) for part in self._parts)
        [found] = search_postings(parts, [query], size, compiled=True)
        hits = []
        for place, doc_id in enumerate(found.doc_ids):
            position = int(found.positions[place])
            part = self._parts[int(np.searchsorted(self._firsts, position, side="right")) - 1]
            row = position - part.first
            fields, score = parse_fields(part.fields[row], doc_id), float(found.scores[place])
            there = {token: part.postings.weight(token_id, row) for token, token_id in known.items()}
            held = {token: weight for token, weight in there.items() if weight is not None}
            hits.append(Hit(place + 1, score, doc_id, fields, shares(weights, held)))
        return hits
