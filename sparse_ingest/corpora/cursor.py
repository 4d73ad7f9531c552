"""A cursor over the rows of a corpus: it knows its position, looks ahead, and jumps."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

from sparse_ingest.corpora.sources import START, Corpus, Position, refuse_repeated_ids
from sparse_ingest.records import SourceRow


class Cursor:
    """The rows of a corpus from a movable position, cut at `limit` rows."""

    def __init__(self, corpus: Corpus, limit: int | None) -> None:
        self._corpus = corpus
        self._limit = limit
        self.jump(START)

    def jump(self, position: Position) -> None:
        """Go on reading at `position`."""
        self.position = position
        self._ahead: deque[tuple[SourceRow, Position]] = deque()
        rows = self._corpus.rows(position)
        self._rows = rows if self._limit is None else itertools.islice(rows, max(0, self._limit - position.row))

    def peek(self, count: int) -> list[SourceRow]:
        """The next rows, without moving."""
        self._ahead.extend(itertools.islice(self._rows, max(0, count - len(self._ahead))))
        return [row for row, _ in itertools.islice(self._ahead, count)]

    def take(self, count: int) -> Iterator[SourceRow]:
        """Move over at most `count` rows; `position` follows. An id that repeats among them makes a bad row."""
        for row, position in refuse_repeated_ids(itertools.islice(self._next_rows(), count)):
            self.position = position
            yield row

    def rows(self) -> Iterator[SourceRow]:
        """Move over all rows that are left. Repeated ids are not looked for."""
        for row, position in self._next_rows():
            self.position = position
            yield row

    @property
    def rereadable(self) -> bool:
        """Whether it can jump back."""
        return self._corpus.rereadable

    def _next_rows(self) -> Iterator[tuple[SourceRow, Position]]:
        # Not `yield from`: it would close the corpus together with the generator that is left at a shard's end.
        return itertools.chain(iter(lambda: self._ahead.popleft() if self._ahead else None, None), self._rows)

    def places(self, start: Position, rows: set[int]) -> dict[int, SourceRow]:
        """Return some rows without their documents, read again from `start` to the last; the cursor stays there.

        Standard input cannot be read again: its rows have their number from 1 in place of the line.
        """
        if not self._corpus.rereadable:
            label = self._corpus.sources[0].label
            return {row: SourceRow(row, label, row + 1, None, None, "row") for row in rows}
        self.jump(start)
        found: dict[int, SourceRow] = {}
        for row, _ in self._next_rows() if rows else ():
            if row.row in rows:
                found[row.row] = row._replace(document=None)
                if len(found) == len(rows):
                    break
        return found

    @property
    def expected_rows(self) -> int | None:
        """An estimate of the rows of the corpus from the share that was read; None if that is unknown."""
        share = self.share
        return round(self.position.row / share) if share else None

    @property
    def share(self) -> float | None:
        """The share of the corpus that was read, by stored bytes; None if it is unknown."""
        return self._corpus.share(self.position)
