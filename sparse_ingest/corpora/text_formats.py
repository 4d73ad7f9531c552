r"""Rows of text as sources: JSON lines, csv and tsv with RFC 4180's quotes, and MS MARCO's tsv, which has none.

JSON lines are one object per line; blank lines are no rows.

The first row of csv and tsv names the columns, unless `columns` does. A quoted value may contain the separator, line
breaks and doubled quotes. A row with another number of columns is bad, and a blank line is no row. Every value is a
string, also one that looks like a number. A quote that is never closed would take in the rest of the file: it is not a
bad row but an error.

In format `msmarco` a line is id, tab, text, and every other character stands for itself.

Not covered: what makes a row a document.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence

from sparse_ingest.corpora.documents import BadRow, columns_there, json_object, shown, utf8
from sparse_ingest.corpora.sources import ChooseColumns, Record
from sparse_ingest.corpora.stored import BYTE_ORDER_MARK, Lines, StoredFile
from sparse_ingest.errors import CorpusError

MSMARCO_COLUMNS = ("_id", "text")

# Characters of one value. csv keeps four bytes for each while a quote is open, and OpenSearch takes no larger document.
_MAX_VALUE = 1 << 27
_SEPARATORS = {"csv": ",", "tsv": "\t"}


class JsonLines:
    """A file of JSON lines. An offset is a byte of its content."""

    unit = "line"

    def __init__(self, file: StoredFile, label: str) -> None:
        self.name, self.label, self.bytes = file.name, label, file.bytes
        self.rereadable = file.bytes is not None
        self._lines = Lines(file)

    def identity(self) -> dict[str, object]:
        """The name, and the size where there is one."""
        return {"name": self.name} if self.bytes is None else {"name": self.name, "bytes": self.bytes}

    def passed(self, offset: int) -> int | None:
        """How many stored bytes lie before the row at `offset`."""
        return self._lines.passed(offset)

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Every line from `offset` on that is not blank."""
        for raw in self._lines.read(offset, line):
            content = raw.removeprefix(BYTE_ORDER_MARK) if offset == 0 else raw
            offset += len(raw)
            line += 1
            try:
                columns = json_object(content)
            except BadRow as bad:
                yield Record(None, str(bad), line - 1, offset, line)
                continue
            if columns is not None:
                # A line without a backslash holds no string that needs one: writing it again is a copy.
                yield Record(columns, None, line - 1, offset, line, b"\\" not in raw)


class TextTable:
    """A file of rows of text. An offset is a byte of its content."""

    unit = "line"

    def __init__(
        self, file: StoredFile, label: str, choose: ChooseColumns, *, format: str, columns: Sequence[str] | None = None
    ) -> None:
        self.name, self.label, self.bytes = file.name, label, file.bytes
        self.rereadable = file.bytes is not None
        self._file, self._choose, self._format, self._given = file, choose, format, columns
        if format == "msmarco":
            self._given = columns or MSMARCO_COLUMNS
        self._lines = Lines(file)

    def identity(self) -> dict[str, object]:
        """Name and size, the format, and the columns where they are not in the file."""
        size = {} if self.bytes is None else {"bytes": self.bytes}
        columns = {"columns": list(self._given)} if self._given else {}
        return {"name": self.name, **size, "format": self._format, **columns}

    def passed(self, offset: int) -> int | None:
        """How many stored bytes lie before the row at `offset`."""
        return self._lines.passed(offset)

    def records(self, offset: int, line: int) -> Iterator[Record]:
        """Every row from `offset` on."""
        rows = _Rows(self._lines.read(offset, line), offset, line, self._format)
        names = self._given
        if names is None:
            names = self._header(_Rows(Lines(self._file).read(), 0, 1, self._format) if offset else rows)
        if names is None:
            return
        try:
            chosen = [(name, names.index(name)) for name in self._choose(names)]
        except BadRow as bad:
            raise CorpusError(f"{self.label} line 1: {bad}") from bad
        while (read := self._next(rows)) is not None:
            at, row, reason = read
            if not reason and len(row) != len(names):
                listed = columns_there(dict.fromkeys(names)).removeprefix("the columns there are ")
                reason = f"the row has {_number(len(row))}; {len(names)} were expected: {listed}"
            columns = None if reason else {name: row[place] for name, place in chosen}
            yield Record(columns, reason, at, rows.offset, rows.line)

    def _next(self, rows: _Rows) -> tuple[int, list[str], str | None] | None:
        try:
            return rows.next()
        except _NeverClosed as error:
            advice = "Close or double it." if self._format == "csv" else (
                "Close or double it, or say --format msmarco if quotes mean nothing in this file."
            )  # fmt: skip
            raise CorpusError(f"{self.label} line {error.line}: {error}. {advice}") from error

    def _header(self, rows: _Rows) -> list[str] | None:
        """The names in the first row; None for a file without one."""
        if (read := self._next(rows)) is None:
            return None
        line, names, reason = read
        if not reason and len(set(names)) < len(names):
            twice = next(name for place, name in enumerate(names) if name in names[:place])
            reason = f"it names the column {shown(twice)} twice"
        if reason:
            advice = "Mend it; a file without a header needs its columns named, with --columns."
            raise CorpusError(f"{self.label} line {line}: the header cannot be read: {reason}. {advice}")
        return names


class _NeverClosed(Exception):
    """A quote that no other quote closes."""

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(reason)
        self.line = line


class _Rows:
    """Rows of values from lines; `offset` and `line` are where the next row begins."""

    def __init__(self, lines: Iterator[bytes], offset: int, line: int, format: str) -> None:
        self.offset, self.line = offset, line
        self._lines = lines
        self._reason: str | None = None
        self._reader: Iterator[list[str]]
        if format == "msmarco":
            self._reader = (text.rstrip("\n").removesuffix("\r").split("\t") for text in self._texts())
        else:
            csv.field_size_limit(_MAX_VALUE)  # of the process; the default is 128 KB
            self._reader = csv.reader(self._texts(), delimiter=_SEPARATORS[format], strict=True)

    def next(self) -> tuple[int, list[str], str | None] | None:
        """The line where the next row begins, its values, and what is wrong with it; None at the end."""
        while True:
            line, self._reason = self.line, None
            try:
                row = next(self._reader, None)
            except csv.Error as error:
                reason = _reason_of(error, line, self.line - line)
                if self.line > line + 1:  # which says how much is lost
                    reason = f"{reason} (the row ends in line {self.line - 1})"
                return line, [], self._reason or reason
            if row is None:
                return None
            if row and row != [""]:
                return line, row, self._reason

    def _texts(self) -> Iterator[str]:
        """Each line as text, just before the reader takes it: it never takes more lines than its row needs."""
        first = self.offset == 0
        for raw in self._lines:
            self.offset += len(raw)
            self.line += 1
            if first:
                raw, first = raw.removeprefix(BYTE_ORDER_MARK), False
            try:
                text = raw.decode()
            except UnicodeDecodeError:
                text = self._noted(raw)
            if "\0" in text:
                self._reason = self._reason or "a NUL byte stands in the row; text was expected (UTF-8, not UTF-16)"
            yield text

    def _noted(self, raw: bytes) -> str:
        """A line that is not UTF-8, still handed over so that the row ends where it does."""
        try:
            return utf8(raw)
        except BadRow as bad:
            self._reason = self._reason or str(bad)
            return raw.decode(errors="replace")


def _reason_of(error: csv.Error, line: int, lines: int) -> str:
    said = str(error)
    if "unexpected end" in said:
        raise _NeverClosed(line, f"a quote opens in this row and is not closed in the {lines} lines up to the end")
    if "field limit" in said:
        raise _NeverClosed(line, f"a value is longer than {_MAX_VALUE:,} characters; is a quote not closed?")
    if "new-line" in said:
        return "a carriage return stands outside quotes; rows end with a line feed, with or without one before it"
    if "expected after" in said:
        return "something follows a closing quote; a quote within a value is written twice"
    return f"broken quoting: {said}"


def _number(columns: int) -> str:
    return f"{columns} column{'s' if columns != 1 else ''}"
