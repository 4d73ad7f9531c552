"""Rows of one line each, counted by numpy in pieces of a file, with a mark every 1,024 rows.

Lines are found by their line feeds, and are not parsed. A border between two marks is found by counting again from the
mark. A compressed file is one piece, and is counted again from its start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from sparse_ingest.corpora.pieces import Border, Search, Task
from sparse_ingest.corpora.stored import BYTE_ORDER_MARK, MAX_LINE, LineSource, file_changed

_MARK_ROWS = 1024
_BLOCK_BYTES = 1 << 19  # stays in the second-level cache
_LINE_FEED = 10
_LAST_BLANK = 32  # a line whose first byte is greater is not blank
_LINE_END = 2  # bytes, at most; a line that is longer and blank so far stays blank with further blanks
_NOT_BLANK = b"x"  # in place of the start of a line that is not blank

IsBlank: TypeAlias = Callable[[bytes], bool]  # of a line with its line feed
Places: TypeAlias = dict[int, tuple[int, int]]  # number of rows in the span -> offset and line after them


@dataclass(frozen=True)
class _Span:
    """The lines of a source that start from byte `start` on and before byte `stop`; `lines` are before them."""

    source: LineSource
    is_blank: IsBlank
    search: Search
    start: int
    stop: int
    lines: int = 0


def line_pieces(
    source: LineSource, search: Search, is_blank: IsBlank, *, start: int = 0, line: int = 1
) -> Iterator[Task]:
    """Yield the tasks that count the rows from byte `start` on, which starts line `line`."""
    size, step, marks = source.bytes or 0, search.piece_bytes, range(_MARK_ROWS, sys.maxsize, _MARK_ROWS)
    if not source.seekable:
        size = step = sys.maxsize
        marks = search.shard_borders(0)  # those of the first source, and of others by chance
    first = _Span(source, is_blank, search, start, min(size, start + step), line - 1)
    yield partial(_count, first, marks)
    for cut in range(first.stop, size, step):
        yield partial(_count, replace(first, start=cut, stop=min(size, cut + step), lines=0), marks)


def _count(span: _Span, marks: range) -> _LinesPiece | None:
    piece = _LinesPiece(span, marks, span.search.limit)
    return piece if piece.read() else None


def _places(span: _Span, rows: range) -> Places:
    piece = _LinesPiece(span, rows, rows[-1])
    if not piece.read() or len(piece.places) < len(rows):
        raise file_changed(span.source.file.place, "it has other lines than at first")
    return piece.places


class _LineTooLong(Exception):
    """Reading the lines one after another raises the error."""


class _LinesPiece:
    """The counted rows and lines of a span, up to `limit` rows, with the place after each of `marks` rows."""

    def __init__(self, span: _Span, marks: range, limit: int | None) -> None:
        self._span, self._marks, self._limit = span, marks, limit
        self.places: Places = {}
        self.rows, self.lines = 0, span.lines
        self._line_start = span.start
        self._head = b""  # the part of the current line in earlier blocks, or _NOT_BLANK
        self._is_before = span.start > 0  # the end of the line before the span

    @property
    def end(self) -> int | None:
        """The offset after the last line; None if no line starts in the span."""
        return None if self._is_before else self._line_start

    def borders_after(self, rows: range) -> list[Border]:
        """Return the borders after these numbers of rows."""
        if self._span.source.seekable:
            return [Border(row, offset, line, offset) for row in rows for offset, line in [self._place(row)]]
        places = self.places if self.places.keys() >= set(rows) else _places(self._span, rows)
        borders = [Border(row, *places[row], places[row][0], row) for row in rows]
        return [border._replace(begin=None, before=0) if border.rows == self.rows else border for border in borders]

    def _place(self, row: int) -> tuple[int, int]:
        """Return offset and line after a number of rows, counted from the mark before it."""
        left = row % _MARK_ROWS
        span, mark = self._span, self.places.get(row - left)
        if mark:
            span = replace(span, start=mark[0], lines=mark[1] - 1)
        return mark if mark and not left else _places(span, range(left, left + 1))[left]

    def read(self) -> bool:
        """Read the span. Return False if a line is too long."""
        buffer = bytearray(_BLOCK_BYTES)
        block = np.frombuffer(buffer, np.uint8)
        # A line starts at `start` if the byte before it is a line feed.
        base, is_complete = max(0, self._span.start - 1), False
        with self._span.source.opened([1]) as opened:
            opened.skip(base)
            while not is_complete and (size := opened.content.readinto(buffer)):
                self._span.search.check_stopped()
                try:
                    is_complete = self._add(base, block[:size])
                except _LineTooLong:
                    return False
                base += size
        if not is_complete and self._head:
            self._count(base - 1, np.zeros(1, np.int64), [0] if self._span.is_blank(self._head) else [])
            self._line_start = base
        return True

    def _add(self, base: int, block: npt.NDArray[np.uint8]) -> bool:
        """Count the lines that end in the block at offset `base`. Return whether no more are needed."""
        first = 0  # where the current line starts in the block
        if base == 0 and block[: len(BYTE_ORDER_MARK)].tobytes() == BYTE_ORDER_MARK:
            first = len(BYTE_ORDER_MARK)
        ends = np.flatnonzero(block == _LINE_FEED)
        if self._is_before:
            if not len(ends):
                return base + len(block) >= self._span.stop
            first, ends = int(ends[0]) + 1, ends[1:]
            self._line_start = base + first
            if self._line_start >= self._span.stop:
                return True
            self._is_before = False
        last = int(np.searchsorted(ends, self._span.stop - 1 - base))
        is_complete = last < len(ends)  # the next line starts after the span
        ends = ends[: last + 1]
        if len(ends):
            self._check_length(base + int(ends[0]) + 1)
            self._count(base, ends, self._blank_lines(block, first, ends))
            first = int(ends[-1]) + 1
            self._line_start, self._head = base + first, b""
        if is_complete or (self._limit is not None and self.rows >= self._limit):
            return True
        self._check_length(base + len(block))
        self._keep_head(block[first:])
        return False

    def _check_length(self, end: int) -> None:
        if end - self._line_start >= MAX_LINE:
            raise _LineTooLong

    def _keep_head(self, rest: npt.NDArray[np.uint8]) -> None:
        """Keep what shows later whether the line that continues in the next block is blank."""
        if self._head == _NOT_BLANK or not len(rest):
            return
        if not self._head and rest[0] > _LAST_BLANK:
            self._head = _NOT_BLANK
            return
        text = self._head + rest.tobytes()
        if len(text) > _LINE_END:
            text = text[: _LINE_END + 1] if self._span.is_blank(text) else _NOT_BLANK
        self._head = text

    def _blank_lines(self, block: npt.NDArray[np.uint8], first: int, ends: npt.NDArray[np.int64]) -> list[int]:
        """Return which of the lines that end in the block are blank; the first one starts at `first`."""
        starts = np.concatenate(([first], ends[:-1] + 1))
        may_be_blank = block[starts] <= _LAST_BLANK
        if self._head:
            may_be_blank[0] = self._head != _NOT_BLANK
        found = []
        for index in np.flatnonzero(may_be_blank).tolist():
            line = block[starts[index] : ends[index] + 1].tobytes()
            if self._span.is_blank(line if index else self._head + line):
                found.append(index)
        return found

    def _count(self, base: int, ends: npt.NDArray[np.int64], blank: list[int]) -> None:
        """Count the lines that end at `ends` in the block at offset `base`, and the rows among them."""
        of_rows = np.delete(np.arange(len(ends)), blank) if blank else None
        rows, marks = self.rows + len(ends) - len(blank), self._marks
        passed = max(0, -((marks.start - self.rows - 1) // marks.step))
        for row in range(marks.start + passed * marks.step, min(marks.stop, rows + 1), marks.step):
            index = row - self.rows - 1
            if of_rows is not None:
                index = int(of_rows[index])
            self.places[row] = base + int(ends[index]) + 1, self.lines + index + 2
        self.rows, self.lines = rows, self.lines + len(ends)
