"""Rows of text as sources: JSON lines, csv and tsv with the quotes of RFC 4180, and MS MARCO's tsv, without quotes.

Blank lines are not rows. The first row of csv and tsv names the columns, unless `columns` does; values are strings.
A row with another number of columns is bad. A quote that is never closed is an error. A stray quote merges the rows up
to the next quote: `merged` counts rows that look merged, with a quoted value that spans lines and contains the
separator. With quoting `none` each line is a row. In format `msmarco` a line is id, tab, text.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Literal

from sparse_ingest.corpora.documents import JSON_BLANKS, BadRow, columns_text, json_object, not_utf8, utf8
from sparse_ingest.corpora.line_pieces import line_pieces
from sparse_ingest.corpora.pieces import RowUnits, Search, Task
from sparse_ingest.corpora.sources import ChooseColumns, Record
from sparse_ingest.corpora.stored import BYTE_ORDER_MARK, LineSource, StoredFile
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
        rows = _Rows(self, offset, line)
        names = self._given
        if names is None:
            names = self._header(_Rows(self, 0, 1) if offset else rows)
        if names is None:
            return
        try:
            chosen = [(name, names.index(name)) for name in self._choose(names)]
        except BadRow as bad:
            raise CorpusError(f"{place_text(self.label, 1)}: {bad}") from bad
        for at, row, reason in rows:
            if rows.line > at + 1:
                self._count_span(row, at, rows.line - at)
            if not reason and len(row) != len(names):
                found = f"{len(row)} column{'s' if len(row) != 1 else ''}"
                listed = columns_text(dict.fromkeys(names)).removeprefix("the columns are ")
                reason = f"the row has {found}; expected {len(names)}: {listed}"
                if rows.line > at + 1:
                    reason = f"{reason} (the row ends in line {rows.line - 1}; {_NO_QUOTES})"
            columns = None if reason else {name: row[place] for name, place in chosen}
            yield Record(columns, reason, at, rows.offset, rows.line)

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield tasks that count lines, if each one is a row: the meaning of a quote depends on all before it."""
        if self.format != "msmarco" and self.quoting != "none":
            yield lambda: None
            return
        yield partial(_check_first, self)
        rows = _Rows(self, 0, 1)
        if self._given is None:
            with suppress(CorpusError):  # which the first task raises
                self._header(rows)
        yield from line_pieces(self, search, lambda line: line in _BLANK_LINES, start=rows.offset, line=rows.line)

    def _count_span(self, row: list[str], line: int, lines: int) -> None:
        # Rows may be read again, to find duplicates.
        separator = _SEPARATORS[self.format]
        if line > self._counted and any(separator in value and "\n" in value for value in row):
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

    def __init__(self, table: TextTable, offset: int, line: int) -> None:
        self._table, self.offset, self.line = table, offset, line
        self._reason: str | None = None
        self._reader: Iterator[list[str]]
        separator = _SEPARATORS[table.format]
        if table.format == "msmarco" or table.quoting == "none":
            self._reader = (text.rstrip("\n").removesuffix("\r").split(separator) for text in self._texts())
        else:
            csv.field_size_limit(_MAX_VALUE)  # of the process; the default is 128 KB
            self._reader = csv.reader(self._texts(), delimiter=separator, strict=True)

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
        for raw in self._table.lines(self.offset, self.line):
            self.offset += len(raw)
            self.line += 1
            if first:
                raw, first = raw.removeprefix(BYTE_ORDER_MARK), False
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:  # the row still ends where it does
                text, self._reason = raw.decode(errors="replace"), self._reason or not_utf8(error)
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
