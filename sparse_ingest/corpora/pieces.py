"""The rows of a source in pieces that can be counted at the same time, and where shards start in them.

`Source.pieces` yields tasks; each counts the rows of one piece and returns a `Piece`. starts.py runs the tasks.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from threading import Event
from typing import Literal, NamedTuple, Protocol, TypeAlias

from sparse_ingest.errors import Interrupted


@dataclass(frozen=True)
class Search:
    """Which rows the planner looks for: the first of every `shard_rows` rows of the corpus, up to `limit` rows.

    Files of lines are cut into pieces of `piece_bytes`.
    """

    shard_rows: int
    limit: int | None
    piece_bytes: int
    stopped: Event

    def shard_borders(self, rows_before: int) -> range:
        """Return how many rows are before the start of each shard, not counting `rows_before`."""
        return range(self.shard_rows - rows_before % self.shard_rows, sys.maxsize, self.shard_rows)

    def check_stopped(self) -> None:
        """Raise `Interrupted` if the search has ended: on request, or by an error in another piece."""
        if self.stopped.is_set():
            raise Interrupted("Stopped while finding where shards start; the same command starts again.")


class Border(NamedTuple):
    """A border between rows of a source, after some `rows` of a piece.

    `offset` and `line` are as in the `Record` before it, `line` from 1 in the piece. `begin` is the offset to read the
    following rows from, None for the start of the next source. A reader that begins there reads and drops `before`
    rows; one that stops there has read `after` further rows.
    """

    rows: int
    offset: int
    line: int
    begin: int | None
    before: int = 0
    after: int = 0


class Piece(Protocol):
    """The counted rows of a piece of a source."""

    @property
    def rows(self) -> int:
        """The number of rows."""

    @property
    def lines(self) -> int:
        """The number of lines, as `Record.next_line` counts them."""

    @property
    def end(self) -> int | None:
        """The offset after the last line; None if no line ends in the piece."""

    def borders_after(self, rows: range) -> list[Border]:
        """Return the borders after these numbers of rows, at least 1. May read the source again."""


# None: only reading the rows one after another finds their borders, or the error.
Task: TypeAlias = Callable[[], Piece | None]


@dataclass(frozen=True)
class RowUnits:
    """Rows whose offsets follow from the sizes of row groups or record batches, which are read from their start.

    With `bits` an offset is a unit and, in so many low bits, a row in it; otherwise it is a row, counted from `first`.
    The rows after the last one begin at `following`. `dropped` says what a reader that begins or stops within a unit
    reads in vain: nothing, the rows before that, or the complete unit.
    """

    sizes: tuple[int, ...]
    dropped: Literal["nothing", "before", "unit"] = "before"
    bits: int | None = None
    first: int = 0
    following: int | None = None  # None: the start of the next source

    @property
    def rows(self) -> int:
        """The number of rows."""
        return sum(self.sizes)

    lines = rows

    @property
    def end(self) -> int:
        """The offset after the last row."""
        return self.first + self.rows if self.bits is None else len(self.sizes) << self.bits

    def borders_after(self, rows: range) -> list[Border]:
        """Return the borders after these numbers of rows."""
        ends = list(accumulate(self.sizes))
        found = []
        for row in rows:
            unit = bisect_left(ends, row)
            left = ends[unit] - row
            passed = self.sizes[unit] - left
            offset = self.first + row
            if self.bits is not None:
                offset = unit << self.bits | passed if left else (unit + 1) << self.bits
            before = passed if left and self.dropped != "nothing" else 0
            after = left if self.dropped == "unit" else 0
            begin = self.following if row == ends[-1] else offset
            found.append(Border(row, offset, row + 1, begin, before, after))
        return found
