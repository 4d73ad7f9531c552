"""A corpus as a chain of sources: one object per file or dataset in, one stream of `SourceRow`s out.

A `Source` gives records: the columns of each row, or the reason why there are none, and where the next row starts.
`Corpus` puts sources one behind the other and makes the columns documents (documents.py). Rows count from 0 over all
sources and bad ones count too. A source that breaks off is no bad row but the end: `CorpusError`.

Not covered: how a format is read (text_formats.py, columns.py), and duplicates over more rows than
`refuse_repeated_ids` is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sparse_ingest.corpora.documents import BadRow, FieldNames, document_of, shown
from sparse_ingest.errors import CorpusError
from sparse_ingest.records import SourceRow

# Names of a table's columns -> those to read, with what each is; see `needed_columns`.
ChooseColumns = Callable[[Sequence[str]], Mapping[str, str]]


class Position(NamedTuple):
    """Where a row starts: source, offset and line within it, row within the corpus.

    `offset` is what the source needs to go on there: bytes (decompressed) of lines, the row of a table in columns.
    """

    file: int
    offset: int
    line: int
    row: int


START = Position(0, 0, 1, 0)


class Record(NamedTuple):
    """One row as a source reads it: its columns, or None and the reason.

    `line` is where the row begins, from 1 (the row within the file where the format has no lines); `offset` and
    `next_line` are where the next one does. `plain` promises that no string of the row needs an escape in JSON.
    """

    columns: Mapping[str, object] | None
    reason: str | None
    line: int
    offset: int
    next_line: int
    plain: bool = False


class Source(Protocol):
    """One file or dataset of a corpus."""

    name: str  # in the identity: no folder, no credentials
    label: str  # in the places of its rows
    unit: str  # what `Record.line` counts: "line", or "row" if the format has no lines
    bytes: int | None  # the stored size, if it is known
    rereadable: bool  # whether `records` may be called again, and from an offset

    def identity(self) -> dict[str, object]:
        """What a resumed run must find again."""

    def passed(self, offset: int) -> int | None:
        """How many of `bytes` lie before the row at `offset`, about; None where that is unknown."""

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Every row from `offset` on, where line `line` begins; 0 and 1 are the start. Raises `CorpusError`."""


@dataclass(frozen=True)
class Corpus:
    """The sources of a corpus in order, and how their rows become documents."""

    sources: tuple[Source, ...]
    fields: FieldNames

    @property
    def rereadable(self) -> bool:
        """Whether the rows can be read again."""
        return all(source.rereadable for source in self.sources)

    def identity(self) -> list[dict[str, object]]:
        """Names in order, and sizes where there are any: what a resumed run must find again."""
        return [source.identity() for source in self.sources]

    def share(self, position: Position) -> float | None:
        """How much of the corpus lies before a position, by stored bytes; None where sizes do not tell."""
        sizes = [source.bytes for source in self.sources]
        known = [size for size in sizes if size is not None]
        if len(known) < len(sizes) or not sum(known):
            return None
        passed = self.sources[position.file].passed(position.offset)
        return None if passed is None else (sum(known[: position.file]) + passed) / sum(known)

    def rows(self, start: Position = START) -> Iterator[tuple[SourceRow, Position]]:
        """Every row from `start` on, each with the position where the next one starts."""
        fields = self.fields
        _, offset, line, row = start
        for index, source in enumerate(self.sources[start.file :], start.file):
            label, unit = source.label, source.unit
            for columns, reason, at, next_offset, next_line, plain in source.records(offset, line):
                if columns is None:
                    found = SourceRow(row, label, at, None, reason, unit)
                else:
                    try:
                        document = document_of(columns, fields, row, plain=plain)
                        found = SourceRow(row, label, at, document, None, unit)
                    except BadRow as bad:
                        found = SourceRow(row, label, at, None, str(bad), unit)
                row += 1
                yield found, Position(index, next_offset, next_line, row)
            offset, line = 0, 1


def refuse_repeated_ids(rows: Iterable[tuple[SourceRow, Position]]) -> Iterator[tuple[SourceRow, Position]]:
    """The same rows, but one whose id came before has no document: its reason says where the first one is.

    Every id given is kept in memory: give it a shard, not a corpus.
    """
    first: dict[str, tuple[str, int, str]] = {}
    for found in rows:
        source, position = found
        if source.document is not None:
            here = (source.file, source.line, source.unit)
            there = first.setdefault(source.document.id, here)
            if there is not here:
                file, line, unit = there
                reason = f"duplicate id {shown(source.document.id)}: first at {file} {unit} {line}"
                found = source._replace(document=None, reason=reason), position
        yield found


def bad_document(source: SourceRow) -> CorpusError:
    """The error of a row without a document, for `--on-bad-document fail`."""
    return CorpusError(f"{source.place}: {source.reason}. Mend it, or leave it out with --on-bad-document skip.")
