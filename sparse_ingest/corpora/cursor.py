"""Reading a corpus shard by shard: a cursor that knows where it is, looks ahead, and jumps.

Not covered: what the rows become.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from sparse_ingest.corpora.files import START, Corpus, Position, refuse_repeated_ids
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
        rows = self._corpus.rows(position)
        self._rows = rows if self._limit is None else itertools.islice(rows, max(0, self._limit - position.row))

    def peek(self, count: int) -> list[SourceRow]:
        """The next rows, without moving."""
        ahead = list(itertools.islice(self._rows, count))
        self._rows = itertools.chain(ahead, self._rows)
        return [row for row, _ in ahead]

    def take(self, count: int) -> Iterator[SourceRow]:
        """Move over at most `count` rows; `position` follows. An id that repeats among them makes a bad row."""
        for row, position in refuse_repeated_ids(itertools.islice(self._rows, count)):
            self.position = position
            yield row

    @property
    def share(self) -> float | None:
        """How much of the corpus has been read, by bytes; None where sizes or offsets do not tell."""
        sizes = [file.bytes for file in self._corpus.files]
        if any(size is None or file.path.suffix == ".gz" for size, file in zip(sizes, self._corpus.files, strict=True)):
            return None
        total = sum(size or 0 for size in sizes)
        before = sum(size or 0 for size in sizes[: self.position.file])
        return (before + self.position.offset) / total if total else None
