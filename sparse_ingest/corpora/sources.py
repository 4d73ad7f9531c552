"""A corpus as a chain of sources, one per file or dataset, and its rows as a stream of `SourceRow`s.

A `Source` yields records: the columns of a row, or the reason why it has none, and where the next row starts. `Corpus`
converts them to documents (documents.py). Rows are numbered from 0 over all sources, bad ones too. A source that
cannot be read to its end raises `CorpusError`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeAlias

from msgspec import Struct
from msgspec.structs import replace

from sparse_ingest.corpora.documents import BadRow, FieldNames, document_of
from sparse_ingest.corpora.pieces import Search, Task
from sparse_ingest.errors import CorpusError, shown
from sparse_ingest.records import SourceRow

# Names of a table's columns -> the columns to read, with their roles; see `needed_columns`.
ChooseColumns = Callable[[Sequence[str]], Mapping[str, str]]


class Position(NamedTuple):
    """Where a row starts: source, offset and line within it (see `Record`), row within the corpus."""

    file: int
    offset: int
    line: int
    row: int


START = Position(0, 0, 1, 0)
PositionTuple: TypeAlias = tuple[int, int, int, int]  # the values of a `Position`, created faster


class Record(Struct, frozen=True, gc=False):
    """One row of a source: its columns, or None and the reason.

    `line` is where the row starts, from 1 (without lines the number of the row); `offset` (a decompressed byte, or a
    row) and `next_line` are where the next row starts. `plain`: no string needs an escape in JSON. `file` is the data
    file in a dataset with several.
    """

    columns: Mapping[str, object] | None
    reason: str | None
    line: int
    offset: int
    next_line: int
    plain: bool = False
    file: str = ""


class Source(Protocol):
    """One file or dataset of a corpus."""

    name: str  # in the identity: without folder and credentials
    label: str  # in messages
    unit: str  # of `Record.line`: "line", or "row" if the format has no lines
    bytes: int | None  # the stored size, if it is known
    rereadable: bool  # whether `records` may be called again, and from an offset

    @property
    def seekable(self) -> bool:
        """Whether `records` can begin at an offset without reading what is before."""

    def identity(self) -> dict[str, object]:
        """Return the values that must not change when a run is resumed."""

    def passed(self, offset: int) -> int | None:
        """Return an estimate of the `bytes` before the row at `offset`; None if it is unknown."""

    def merged(self) -> list[str]:
        """Return a message if quotes may have merged rows that were read."""

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on (0 is the start), which is line `line` (from 1). Raise `CorpusError`."""

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield tasks that count the rows of pieces, in order; they may run at the same time. See pieces.py."""


@dataclass(frozen=True)
class Corpus:
    """The sources of a corpus in order, and how their rows become documents."""

    sources: tuple[Source, ...]
    fields: FieldNames
    notes: tuple[str, ...] = ()  # about skipped files

    @property
    def rereadable(self) -> bool:
        """Whether all rows can be read again."""
        return all(source.rereadable for source in self.sources)

    def identity(self) -> list[dict[str, object]]:
        """Return the identity of each source in order."""
        return [source.identity() for source in self.sources]

    def merged(self) -> list[str]:
        """Return a message for each source in which quotes may have merged rows that were read."""
        return [message for source in self.sources for message in source.merged()]

    def share(self, position: PositionTuple) -> float | None:
        """Return the share of the corpus before a position, by stored bytes; None if sizes are unknown."""
        sizes = [source.bytes for source in self.sources]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes) or not sum(known):
            return None
        file, offset, *_ = position
        passed = self.sources[file].passed(offset)
        return None if passed is None else (sum(known[:file]) + passed) / sum(known)

    def rows(self, start: Position = START) -> Iterator[tuple[SourceRow, PositionTuple]]:
        """Yield every row from `start` on, each with the position of the next one."""
        fields = self.fields
        first, offset, line, row = start
        for index, source in enumerate(self.sources[first:], first):
            label, unit = source.label, source.unit
            for record in source.records(offset, line):
                document, reason = None, record.reason
                if record.columns is not None:
                    try:
                        document = document_of(record.columns, fields, row, plain=record.plain)
                    except BadRow as bad:
                        reason = str(bad)
                if reason and record.file:
                    reason = f"{reason} (in {record.file})"
                found = SourceRow(row, label, record.line, document, reason, unit)
                row += 1
                yield found, (index, record.offset, record.next_line, row)
            offset, line = 0, 1


class Cursor:
    """The rows of a corpus from a movable position, up to the first `limit` rows of the corpus."""

    def __init__(self, corpus: Corpus, limit: int | None) -> None:
        self._corpus = corpus
        self._limit = limit
        self.jump(START)

    def jump(self, position: Position) -> None:
        """Continue at `position`."""
        self._place: PositionTuple = position
        self._ahead: deque[tuple[SourceRow, PositionTuple]] = deque()
        rows = self._corpus.rows(position)
        self._rows = rows if self._limit is None else itertools.islice(rows, max(0, self._limit - position.row))

    @property
    def position(self) -> Position:
        """Where the next row starts."""
        return Position(*self._place)

    def peek(self, count: int) -> list[SourceRow]:
        """Return the next rows without moving."""
        self._ahead.extend(itertools.islice(self._rows, max(0, count - len(self._ahead))))
        return [row for row, _ in itertools.islice(self._ahead, count)]

    def take(self, count: int) -> Iterator[SourceRow]:
        """Yield at most `count` rows, of a shard, and advance `position`.

        A duplicate id among them makes a bad row, whose reason has the place of the first. Every id is kept in memory.
        """
        first: dict[str, tuple[str, int, str]] = {}
        for row, place in itertools.islice(self._next_rows(), count):
            self._place = place
            document = row.document
            if document is not None:
                here = (row.file, row.line, row.unit)
                there = first.setdefault(document.id, here)
                if there is not here:
                    row = replace(row, document=None, reason=skipped_duplicate(document.id, *there))
            yield row

    def rows(self) -> Iterator[SourceRow]:
        """Yield all remaining rows and advance `position`. Duplicate ids are not detected."""
        for row, place in self._next_rows():
            self._place = place
            yield row

    @property
    def rereadable(self) -> bool:
        """Whether its rows can be read again."""
        return self._corpus.rereadable

    def _next_rows(self) -> Iterator[tuple[SourceRow, PositionTuple]]:
        # `yield from` would close the corpus with the generator that is dropped at the end of a shard.
        return itertools.chain(iter(lambda: self._ahead.popleft() if self._ahead else None, None), self._rows)

    def places(self, start: Position, rows: set[int]) -> dict[int, SourceRow]:
        """Return rows without their documents, read again from `start`; the cursor stays after the last one.

        Standard input cannot be read again: its rows have their number instead of the line.
        """
        if not self._corpus.rereadable:
            label = self._corpus.sources[0].label
            return {row: SourceRow(row, label, row + 1, None, None, "row") for row in rows}
        self.jump(start)
        found: dict[int, SourceRow] = {}
        for row, _ in self._next_rows() if rows else ():
            if row.row in rows:
                found[row.row] = replace(row, document=None)
                if len(found) == len(rows):
                    break
        return found

    @property
    def expected_rows(self) -> int | None:
        """An estimate of the number of rows from the share that was read, or the limit; None if it is unknown."""
        share = self._corpus.share(self.position)
        rows = round(self.position.row / share) if share else self._limit
        return rows if rows is None or self._limit is None else min(rows, self._limit)


def repeated_id(doc_id: str, first: str) -> str:
    """Return the message of an id that an earlier row has, at the place `first`."""
    return f"duplicate id {shown(doc_id)} (first seen at {first})"


def skipped_duplicate(doc_id: str, file: str, line: int, unit: str) -> str:
    """Return the reason in `skipped/` of a row whose id an earlier row has; runs have this form of the place."""
    return f"duplicate id {shown(doc_id)}: first at {file} {unit} {line}"


def bad_document(source: SourceRow) -> CorpusError:
    """Return the error of a row without a document, for `--on-bad-document fail`."""
    return CorpusError(f"{source.place}: {source.reason}. Fix the corpus, or pass --on-bad-document skip.")
