"""Rows of text as sources: JSON lines, csv and tsv with the quotes of RFC 4180, and MS MARCO's tsv, without quotes.

Blank lines are not rows. The first row of csv and tsv names the columns, unless `columns` does; values are strings.
A row with another number of columns is bad. A quote that is never closed is an error. A stray quote merges the rows up
to the next quote: `merged` counts rows that look merged, with a quoted value that spans lines and contains the
separator. With quoting `none` each line is a row. In format `msmarco` a line is id, tab, text.

Rows are found by numpy in a block (regular_rows.py), after its first irregular row by a regular expression, and by the
csv module where a row has a quote in an unusual place or is bad.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from io import BufferedReader
from typing import Literal, NamedTuple, TypeAlias

from sparse_ingest.corpora.documents import JSON_BLANKS, BadRow, columns_text, json_object, not_utf8, utf8
from sparse_ingest.corpora.line_pieces import line_pieces
from sparse_ingest.corpora.pieces import RowUnits, Search, Task
from sparse_ingest.corpora.regular_rows import regular_rows
from sparse_ingest.corpora.sources import ChooseColumns, Record
from sparse_ingest.corpora.stored import BYTE_ORDER_MARK, DAMAGE, LineSource, StoredFile
from sparse_ingest.errors import CorpusError, shown
from sparse_ingest.records import place_text
from sparse_ingest.storage.foreign_json import parse_json

MSMARCO_COLUMNS = ("_id", "text")

# Characters of one value; csv needs four bytes for each.
_MAX_VALUE = 1 << 26
_MAX_ARRAY = 1 << 30  # bytes; Python objects take several times as many
_SEPARATORS = {"csv": ",", "tsv": "\t", "msmarco": "\t"}
_SEEN_SEPARATORS = "\t;,|"
_JSON_BLANKS = JSON_BLANKS.encode()
_BLANK_LINES = (b"", b"\n", b"\r", b"\r\n")  # without quotes
_MOST_COLUMNS = 8  # of a row with quotes; the csv module reads wider ones
_LEAST_BLOCK = 1 << 15  # bytes; in 16 KB the regular expression finds rows as fast as numpy
_SKIPPED_BLOCKS = 7  # after a block in which numpy found less than half of the bytes
_NO_QUOTES = "pass --quoting none if quotes have no meaning in this file"

# First line, values, the reason if it is bad, else None, and the offset and line where the next row starts.
_Row: TypeAlias = tuple[int, list[str], str | None, int, int]
Quoting = Literal["rfc4180", "none"]


class _BlockRows(NamedTuple):
    """The values of each column of some rows, the offset after each row, the line of each and of the following row."""

    columns: list[list[str]]
    offsets: list[int]
    lines: list[int]


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
        self._first_span = 0, 0  # line and number of lines of the first row that spans lines
        self._spanning = self._longest = 0  # number of such rows, the most lines
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
        line, lines = self._first_span
        others = f" (the first of {self._spanning:,} such rows; the longest spans {self._longest:,} lines)"
        return [
            f"{place_text(self.label, line)}: a quoted value spans {lines:,} lines and contains the separator"
            f"{others if self._spanning > 1 else ''}. If quotes have no meaning in this file, rows were merged into "
            "one document: read it again with --quoting none."
        ]

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Yield every row from `offset` on."""
        reader, names = _Rows(self, offset, line), self._given
        rows = iter(reader)
        if names is None:
            names = self._header(iter(_Rows(self, 0, 1)) if offset else rows)
        if names is None:
            return
        try:
            chosen = [(name, names.index(name)) for name in self._choose(names)]
        except BadRow as bad:
            raise CorpusError(f"{place_text(self.label, 1)}: {bad}{self._other_form(names)}") from bad
        reader.expect(len(names))
        for row in rows:
            yield self._record(row, names, chosen)
            if found := reader.block_rows():
                yield from self._records(found, chosen)
            for matched in reader.matched_rows():
                yield self._record(matched, names, chosen)

    def _record(self, row: _Row, names: Sequence[str], chosen: Sequence[tuple[str, int]]) -> Record:
        at, values, reason, offset, following = row
        if following > at + 1:
            self._count_span(values, at, following)
        if not reason and len(values) != len(names):
            found = f"{len(values)} column{'s' if len(values) != 1 else ''}"
            listed = columns_text(dict.fromkeys(names)).removeprefix("the columns are ")
            reason = f"the row has {found}; expected {len(names)}: {listed}"
            if following > at + 1:
                reason = f"{reason} (the row ends in line {following - 1}; {_NO_QUOTES})"
        columns = None if reason else {name: values[place] for name, place in chosen}
        return Record(columns, reason, at, offset, following)

    def _records(self, rows: _BlockRows, chosen: Sequence[tuple[str, int]]) -> Iterator[Record]:
        names = [name for name, _ in chosen]
        values = zip(*(rows.columns[place] for _, place in chosen), strict=True)
        places = zip(values, rows.lines[:-1], rows.offsets, rows.lines[1:], strict=True)
        for place, (row, at, offset, following) in enumerate(places):
            if following > at + 1:
                self._count_span([values[place] for values in rows.columns], at, following)
            yield Record(dict(zip(names, row)), None, at, offset, following)  # noqa: B905 (as in columns.py)

    def pieces(self, search: Search) -> Iterator[Task]:
        """Yield tasks that count lines, if each one is a row: the meaning of a quote depends on all before it."""
        if self.format != "msmarco" and self.quoting != "none":
            yield lambda: None
            return
        yield partial(_check_first, self)
        rows = _Rows(self, 0, 1)
        if self._given is None:
            with suppress(CorpusError):  # which the first task raises
                self._header(iter(rows))
        yield from line_pieces(self, search, lambda line: line in _BLANK_LINES, start=rows.offset, line=rows.line)

    def _count_span(self, values: Sequence[str], line: int, following: int) -> None:
        """Count a row of several lines if it looks merged; `following` is the line in which the next row starts."""
        separator = _SEPARATORS[self.format]
        # Rows may be read again, to find duplicates.
        if line > self._counted and any("\n" in value and separator in value for value in values):
            self._counted, spanned = line, following - line
            if not self._spanning:
                self._first_span = line, spanned
            self._spanning += 1
            self._longest = max(spanned, self._longest)

    def _other_form(self, names: Sequence[str]) -> str:
        """Return advice for a header that seems to have another separator."""
        own = _SEPARATORS[self.format]
        if self._given or len(names) > 1 or not any(one in names[0] for one in _SEEN_SEPARATORS if one != own):
            return ""
        return (
            f"; if {shown(names[0])} is several columns, convert the file: {self.format} has {shown(own)} between them"
        )

    def _header(self, rows: Iterator[_Row]) -> Sequence[str] | None:
        """Return the names in the first row; None for an empty file."""
        line, names, reason, *_ = next(rows, (1, None, None))
        if reason:
            advice = "Fix it; for a file without a header, name its columns with --columns."
            raise CorpusError(f"{place_text(self.label, line)}: the header cannot be read: {reason}. {advice}")
        return names


class _Rows:
    """The rows of a table; `offset` and `line` are where the next unread row starts."""

    def __init__(self, table: TextTable, offset: int, line: int) -> None:
        self._table, self.offset = table, offset
        self._reached = [line]
        self._separator = _SEPARATORS[table.format]
        self._has_quotes = table.format != "msmarco" and table.quoting != "none"
        self._reason: str | None = None
        self._content: BufferedReader | None = None
        self._match: Callable[[bytes, int], re.Match[bytes] | None] | None = None  # a regular row
        self._columns = 0
        self._skipped = 0  # blocks to come without numpy
        self._block, self._block_start, self._block_end = b"", 0, 0  # the buffered bytes up to a NUL, their offsets

    @property
    def line(self) -> int:
        """Return the line where the next unread row starts."""
        return self._reached[0]

    def expect(self, columns: int) -> None:
        """Set the number of columns, so that regular rows are read without the csv module."""
        self._columns = columns
        ends = rf"{self._separator}\r\n"
        value = f'("[^"]*+(?:""[^"]*+)*+"|(?:[^"{ends}][^{ends}]*+)?)'
        row = self._separator.join([value] * columns) if columns <= _MOST_COLUMNS else "(?!)"
        self._match = re.compile(rf"{row}\r?\n".encode()).match

    def __iter__(self) -> Iterator[_Row]:
        with self._table.opened(self._reached) as opened:
            opened.skip(self.offset)
            self._content = opened.content
            reader = self._reader(self._texts(self._table.lines_of(opened, self._reached)))
            while True:
                line, self._reason = self.line, None
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    reason = self._reason_of(error, line)
                    yield line, [], self._reason or reason, self.offset, self.line
                else:
                    if row is None:
                        return
                    if not row or row == [""]:
                        continue  # the header may follow, and is read line by line
                    yield line, row, self._reason, self.offset, self.line

    def _reader(self, texts: Iterable[str]) -> Iterator[list[str]]:
        """Yield the values of each row. Does not read past its last line."""
        if self._has_quotes:
            csv.field_size_limit(_MAX_VALUE)  # of the process; the default is 128 KB
            return csv.reader(texts, delimiter=self._separator, strict=True)
        return map(self._split, texts)

    def _split(self, line: str) -> list[str]:
        """Return the values of a line without quotes."""
        return line.removesuffix("\n").removesuffix("\r").split(self._separator)

    def block_rows(self) -> _BlockRows | None:
        """Return the rows that numpy finds in the next block, up to an irregular one, and move past them."""
        if self.offset < self._block_end or self._content is None:
            return None
        try:
            buffered = self._content.peek()
        except (*DAMAGE, OSError):
            return None  # the next row raises it again, with its line
        self._block, self._block_start = buffered.partition(b"\0")[0], self.offset
        self._block_end = self.offset + len(buffered)
        if self._skipped or len(self._block) < _LEAST_BLOCK:
            self._skipped = max(0, self._skipped - 1)
            return None
        columns, ends, lines = regular_rows(self._block, self._separator, self._columns, quotes=self._has_quotes)
        if not ends or ends[-1] < len(buffered) // 2:
            self._skipped = _SKIPPED_BLOCKS
        if not ends:
            return None
        rows = _BlockRows(columns, [self.offset + end for end in ends], [self.line, *(self.line + n for n in lines)])
        self._move(rows.offsets[-1], rows.lines[-1])
        return rows

    def matched_rows(self) -> Iterator[_Row]:
        """Yield the other rows of the block, up to one that is incomplete or that needs the csv module."""
        if self._match is None or self.offset >= self._block_end:
            return
        block, base, line, quotes = self._block, self._block_start, self.line, self._has_quotes
        start = self.offset - base
        with suppress(UnicodeDecodeError):
            while end := block.find(b"\n", start) + 1:
                first, raw = line, block[start:end]
                if quotes and b'"' in raw:
                    if not (found := self._match(block, start)):
                        break
                    row = [_unquoted(text) if text[:1] == '"' else text for text in map(bytes.decode, found.groups())]
                    end = found.end()
                    line += block.count(b"\n", start, end)
                else:
                    if quotes and b"\r" in raw[:-2]:
                        break
                    row = self._split(raw.decode())
                    line += 1
                start = end
                if row != [""]:
                    yield first, row, None, base + end, line
        self._move(base + start, line)

    def _move(self, offset: int, line: int) -> None:
        assert self._content is not None
        self._content.read(offset - self.offset)
        self.offset, self._reached[0] = offset, line

    def _texts(self, lines: Iterator[bytes]) -> Iterator[str]:
        """Yield each line as text."""
        first = self.offset == 0
        for raw in lines:
            self.offset += len(raw)
            if first:
                raw, first = raw.removeprefix(BYTE_ORDER_MARK), False
            try:
                text = raw.decode()
            except UnicodeDecodeError as error:  # the row still ends where it does
                text, self._reason = raw.decode(errors="replace"), self._reason or not_utf8(error)
            if "\0" in text:
                self._reason = self._reason or "the row has a NUL byte; expected text in UTF-8, not UTF-16"
            yield text
        self._table.file.refuse_changed()  # before csv reports an unclosed quote

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
            reason = "a carriage return is outside quotes; rows end with a line feed, with or without one before it"
        elif "expected after" in text:
            reason = "something follows a closing quote; double a quote within a value"
        else:
            reason = f"broken quoting: {text}"
        if self.line > line + 1:
            reason = f"{reason} (the row ends in line {self.line - 1})"
        return f"{reason}; {_NO_QUOTES}" if "quote" in reason else reason


def _unquoted(value: str) -> str:
    inner = value[1:-1]
    return inner.replace('""', '"') if '"' in inner else inner
