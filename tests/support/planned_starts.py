"""The starts of shards by a walk over all rows, which the planner must find."""

from __future__ import annotations

from collections import deque
from functools import partial

from sparse_ingest.corpora.sources import Corpus, Cursor, Position
from sparse_ingest.corpora.starts import Starts, find_starts
from sparse_ingest.errors import CorpusError


def walk(corpus: Corpus, shard_rows: int, limit: int | None) -> tuple[int, list[Position]]:
    cursor, positions = Cursor(corpus, limit), []
    while cursor.peek(1):
        positions.append(cursor.position)
        deque(cursor.take(shard_rows), maxlen=0)
    return cursor.position.row, positions


def rows_from(corpus: Corpus, position: Position) -> list:
    return list(corpus.rows(position))


def outcome(find) -> object:
    try:
        return find()
    except CorpusError as error:
        return str(error)


def assert_same(corpus: Corpus, shard_rows: int, limit: int | None = None, **options) -> Starts | None:
    """Compare the planner with a walk, also their errors, and check what else `Starts` promises."""
    expected = outcome(lambda: walk(corpus, shard_rows, limit))
    found = outcome(lambda: find_starts(corpus, shard_rows, limit, **options))
    if not isinstance(found, Starts):
        assert found == expected
        return None
    assert (found.rows, found.positions) == expected
    for position, begin in zip(found.positions, found.begins, strict=True):
        if begin != position:
            # A row beyond the limit may be one that cannot be read.
            assert outcome(partial(rows_from, corpus, begin)) == outcome(partial(rows_from, corpus, position))
    assert [shard for group in found.groups for shard in group] == list(range(len(found.positions)))
    return found
