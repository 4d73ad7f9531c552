"""Rows of text as sources: JSON lines, csv and tsv with the quotes of RFC 4180, and MS MARCO's tsv, without quotes.

Blank lines are not rows. The first row of csv and tsv names the columns, unless `columns` does; values are strings.
A row with another number of columns is bad. A quote that is never closed is an error. A stray quote merges the rows up
to the next quote: `merged` counts rows that look merged, with a quoted value that spans lines and contains the
separator. With quoting `none` each line is a row. In format `msmarco` a line is id, tab, text.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import repeat
from typing import Literal

from sparse_ingest.corpora.documents import JSON_BLANKS, BadRow, columns_text, json_object, utf8
from sparse_ingest.corpora.line_pieces import line_pieces
from sparse_ingest.corpora.pieces import RowUnits, Search, Task
from sparse_ingest.corpora.sources import ChooseColumns, Record
from sparse_ingest.corpora.stored import BYTE_ORDER_MARK, ContentStream, LineSource, StoredFile
from sparse_ingest.corpora.table_blocks import Block, split_block
from sparse_ingest.errors import CorpusError, shown
from sparse_ingest.records import place_text
from sparse_ingest.storage.foreign_json import parse_json

MSMARCO_COLUMNS = ("_id", "text")

# Characters of one value; csv needs four bytes for each.
_MAX_VALUE = 1 << 26
_MAX_ARRAY = 1 << 30  # bytes; Python objects take several times as many
_SEPARATORS = {"csv": ",", "tsv": "\t", "msmarco": "\t"}
_JSON_BLANKS = JSON_BLANKS.encode()
_BLANK_LINES = (b"", b"\n", b"\r", b"\r\n")  # without quotes
_NO_QUOTES = "pass --quoting none if quotes have no meaning in this file"

Quoting = Literal["rfc4180", "none"]


def _check_first(source: JsonLines | TextTable) -> RowUnits:
    next(source.records(0, 1), None)
    return RowUnits(())


class JsonLines(LineSource):
    """A file of JSON lines."""

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every line from `offset` on that is not blank."""
        for raw in self.lines(offset, line):
            content = raw.removeprefix(BYTE_ORDER_MARK) if offset == 0 else raw
            offset += len(raw)
            line += 1
            try:
                columns = self._columns(content)
            except BadRow as bad:
                yield Record(None, str(bad), line - 1, offset, line)
                continue
            if columns is not None:
                # Strings of a line without a backslash need none in JSON.
                yield Record(columns, None, line - 1, offset, line, b"\\" not in raw)

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield tasks that count lines, and before them one that reads the first row to check the kind of content."""
        yield partial(_check_first, self)
        yield from line_pieces(self, search, lambda line: not line.strip(_JSON_BLANKS))

    def _columns(self, raw: bytes) -> dict[str, object] | None:
        return json_object(raw)


class JsonArray(LineSource):
    """A file of one JSON array of objects, which is read into memory. An offset is a row."""

    unit = "row"

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every object from `offset` on."""
        with self.opened([1]) as opened:
            content = opened.content.read(_MAX_ARRAY + 1).removeprefix(BYTE_ORDER_MARK)
        try:
            rows = parse_json(utf8(content), _MAX_ARRAY)
        except (BadRow, ValueError) as error:
            raise CorpusError(
                f"{self.label} cannot be read: {error}. Convert this JSON array to JSON lines."
            ) from error
        for place, row in enumerate(rows[offset:], offset):
            reason = None if isinstance(row, dict) else f"expected a JSON object, found {shown(row)}"
            yield Record(None if reason else row, reason, place + 1, place + 1, place + 2)

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield a task that reads the file."""
        yield lambda: RowUnits((sum(1 for _ in self.records(0, 1)),))


class TextTable(LineSource):
    """A file of rows of text."""

    def __init__(
        self,
        file: StoredFile,
        label: str,
        choose: ChooseColumns,
        *,
        format: str,
        columns: Sequence[str] | None = None,
        quoting: Quoting | None = None,
    ) -> None:
        super().__init__(file, label)
        self._choose, self.format, self.quoting = choose, format, quoting
        self._spans: list[int] = []  # line and number of lines of the first row that spans lines; the most lines
        self._spanning = 0
        self._counted = 0  # rows up to this line
        self._given = columns or (MSMARCO_COLUMNS if format == "msmarco" else None)

    def identity(self) -> dict[str, object]:
        """Return name, size and format, and the columns if they are not in the file."""
        columns = {"columns": list(self._given)} if self._given else {}
        quoting = {"quoting": "none"} if self.quoting == "none" else {}
        return {**super().identity(), "format": self.format, **columns, **quoting}

    def merged(self) -> list[str]:
        """Return a message if quotes may have merged rows that were read."""
        if not self._spanning:
            return []
        line, lines, longest = self._spans
        others = f" (the first of {self._spanning:,} such rows; the longest spans {longest:,} lines)"
        return [
            f"{place_text(self.label, line)}: a quoted value spans {lines:,} lines and contains the separator"
            f"{others if self._spanning > 1 else ''}. If quotes have no meaning in this file, rows were merged into "
            "one document: read it again with --quoting none."
        ]

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on."""
        names = self._given
        if names is None and offset:
            with self._rows(0, 1) as rows:
                names = self._header(rows)
        with self._rows(offset, line) as rows:
            names = names or self._header(rows)
            if names is not None:
                yield from self._records(rows, names)

    @contextmanager
    def _rows(self, offset: int, line: int) -> Iterator[_Rows]:
        reached = [line]
        with self.opened(reached) as opened:
            opened.skip(offset)
            yield _Rows(self, opened, reached, offset)

    def _records(self, rows: _Rows, names: Sequence[str]) -> Iterator[Record]:
        try:
            chosen = {name: names.index(name) for name in self._choose(names)}
        except BadRow as bad:
            raise CorpusError(f"{place_text(self.label, 1)}: {bad}") from bad
        for at, row, reason in rows:
            if rows.line > at + 1 and any(rows.separator in value and "\n" in value for value in row):
                self._count_merged(at, rows.line - at)
            if not reason and len(row) != len(names):
                found = f"{len(row)} column{'s' if len(row) != 1 else ''}"
                listed = columns_text(dict.fromkeys(names)).removeprefix("the columns are ")
                reason = f"the row has {found}; expected {len(names)}: {listed}"
                if rows.line > at + 1:
                    reason = f"{reason} (the row ends in line {rows.line - 1}; {_NO_QUOTES})"
            columns = None if reason else {name: row[place] for name, place in chosen.items()}
            yield Record(columns, reason, at, rows.offset, rows.line)
            while block := rows.block(len(names), list(chosen.values())):
                for merged in block.merged:
                    self._count_merged(block.lines[merged], block.lines[merged + 1] - block.lines[merged])
                found_rows = (dict(zip(chosen, values, strict=True)) for values in zip(*block.values, strict=True))
                yield from map(Record, found_rows, repeat(None), block.lines, block.ends, block.lines[1:])

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield tasks that count lines, if each one is a row: the meaning of a quote depends on all before it."""
        if self.format != "msmarco" and self.quoting != "none":
            yield lambda: None
            return
        yield partial(_check_first, self)
        start, line = 0, 1
        if self._given is None:
            with suppress(CorpusError), self._rows(0, 1) as rows:  # the first task raises the error
                self._header(rows)
                start, line = rows.offset, rows.line
        yield from line_pieces(self, search, lambda line: line in _BLANK_LINES, start=start, line=line)

    def _count_merged(self, line: int, lines: int) -> None:
        if line > self._counted:  # rows may be read again, to find duplicates
            self._counted = line
            self._spanning += 1
            self._spans = [*(self._spans[:2] or (line, lines)), max([lines, *self._spans[2:]])]

    def _header(self, rows: _Rows) -> Sequence[str] | None:
        """Return the names in the first row; None for an empty file."""
        line, names, reason = next(iter(rows), (1, None, None))
        if names and not reason and len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            reason = f"duplicate column {shown(twice)}"
        if reason:
            advice = "Fix it; for a file without a header, name its columns with --columns."
            raise CorpusError(f"{place_text(self.label, line)}: the header cannot be read: {reason}. {advice}")
        return names


class _Rows:
    """The rows of a table; `offset` and `line` are where the next row starts."""

    def __init__(self, table: TextTable, opened: ContentStream, reached: list[int], offset: int) -> None:
        self._table, self._content, self._reached = table, opened.content, reached
        self._lines = table.lines_of(opened, reached)
        self.offset, self.line = offset, reached[0]
        self.separator = _SEPARATORS[table.format]
        self._has_quotes = table.format != "msmarco" and table.quoting != "none"
        self._refused = 0  # the end of a block with rows that need the csv module
        self._reason: str | None = None
        self._reader: Iterator[list[str]]
        if self._has_quotes:
            csv.field_size_limit(_MAX_VALUE)  # of the process; the default is 128 KB
            self._reader = csv.reader(self._texts(), delimiter=self.separator, strict=True)
        else:
            self._reader = (text.rstrip("\n").removesuffix("\r").split(self.separator) for text in self._texts())

    def block(self, columns: int, chosen: Sequence[int]) -> Block | None:
        """Return the rows that are in memory, if they can be split as a block: `ends` are offsets, `lines` numbers."""
        if self.offset < self._refused or not isinstance(self._content, io.BufferedReader):
            return None
        content = self._content.peek()
        block = split_block(content, self.separator, columns, chosen, quotes=self._has_quotes)
        if block is None:
            self._refused = self.offset + len(content)
            return None
        self._content.read(block.ends[-1])
        ends = [self.offset + end for end in block.ends]
        lines = [self.line, *(self.line + lines for lines in block.lines)]
        self.offset, self.line = ends[-1], lines[-1]
        self._reached[0] = self.line
        return block._replace(ends=ends, lines=lines)

    def __iter__(self) -> Iterator[tuple[int, list[str], str | None]]:
        """Yield the first line of each row, its values, and what is wrong with it."""
        while True:
            line, self._reason = self.line, None
            try:
                row = next(self._reader, None)
            except csv.Error as error:
                reason = self._reason_of(error, line)
                if self.line > line + 1:
                    reason = f"{reason} (the row ends in line {self.line - 1})"
                if "quote" in reason:
                    reason = f"{reason}; {_NO_QUOTES}"
                yield line, [], self._reason or reason
                continue
            if row is None:
                return
            if row and row != [""]:
                yield line, row, self._reason

    def _texts(self) -> Iterator[str]:
        """Yield each line as text. The reader takes no more lines than its row has."""
        first = self.offset == 0
        for raw in self._lines:
            self.offset += len(raw)
            self.line += 1
            if first:
                raw, first = raw.removeprefix(BYTE_ORDER_MARK), False
            try:
                text = utf8(raw)
            except BadRow as bad:  # the row still ends where it does
                text, self._reason = raw.decode(errors="replace"), self._reason or str(bad)
            if "\0" in text:
                self._reason = self._reason or "the row has a NUL byte; expected text in UTF-8, not UTF-16"
            yield text

    def _reason_of(self, error: csv.Error, line: int) -> str:
        """Return what is wrong with the row that starts in a line. Raise `CorpusError` for an unclosed quote."""
        text = str(error)
        endless = None
        if "unexpected end" in text:
            endless = f"a quote opens in this row and is not closed in the {self.line - line} lines up to the end"
        if "field limit" in text:
            endless = f"a value is longer than {_MAX_VALUE:,} characters; is a quote not closed?"
        if endless:
            advice = f"Close or double it, or {_NO_QUOTES}"
            raise CorpusError(f"{place_text(self._table.label, line)}: {endless}. {advice}.") from error
        if "new-line" in text:
            return "a carriage return is outside quotes; rows end with a line feed, with or without one before it"
        if "expected after" in text:
            return "something follows a closing quote; double a quote within a value"
        return f"broken quoting: {text}"
