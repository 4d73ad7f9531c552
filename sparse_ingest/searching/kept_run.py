"""A run in memory: the postings and the fields of its documents, for many exact searches of one run.

Only for runs that fit; others are read from their shards for every search (run_search.py). The hits are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from sparse_ingest.models.dot_products import Postings
from sparse_ingest.queries.weight_table import QueryWeights, to_float32
from sparse_ingest.records import TermShare
from sparse_ingest.runs.checking import finished_shards, shard_parts
from sparse_ingest.runs.run import Run
from sparse_ingest.runs.shards import parse_fields
from sparse_ingest.searching.exact import QueryVector, search_postings
from sparse_ingest.searching.hits import Hit, heaviest_first

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
        self._token_ids = {token: token_id for token_id, token in enumerate(run.vocabulary()) if token is not None}

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
        by_id = sorted((token for token in weights if token in self._token_ids), key=self._token_ids.__getitem__)
        query = QueryVector.of({token: weights[token] for token in by_id}, self._token_ids)
        parts = ((part.postings, part.doc_ids) for part in self._parts)
        [found] = search_postings(parts, [query], size, compiled=True)
        hits = []
        for place, doc_id in enumerate(found.doc_ids):
            position = int(found.positions[place])
            part = self._parts[int(np.searchsorted(self._firsts, position, side="right")) - 1]
            row = position - part.first
            fields, score = parse_fields(part.fields[row], doc_id), float(found.scores[place])
            hits.append(Hit(place + 1, score, doc_id, fields, self._shares(weights, part.postings, row)))
        return hits

    def _shares(self, weights: QueryWeights, postings: Postings, row: int) -> list[TermShare]:
        """Return the terms that a query and a row share."""
        shares = []
        for token, weight in weights.items():
            token_id = self._token_ids.get(token)
            if token_id is not None and (held := postings.weight(token_id, row)) is not None:
                shares.append(TermShare(token, weight, held, to_float32(weight * held)))
        return heaviest_first(shares)
